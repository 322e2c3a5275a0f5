"""What the commands print on."""

from rich.console import Console


def plain_console() -> Console:
    """A console that prints text as it is: a user's label or path may look like rich's markup."""
    return Console(markup=False, emoji=False)


def millions(count: int) -> str:
    """A number of parameters, in full below a hundred thousand."""
    return f"{count / 1e6:,.1f} M" if count >= 1e5 else f"{count:,}"
