"""What the commands print on."""

from rich.console import Console


def plain_console() -> Console:
    """A console that prints text as it is: a user's label or path may look like rich's markup."""
    return Console(markup=False, emoji=False)
