"""Where the commands print, and their tables."""

from rich import box
from rich.table import Table

from lilora.terminal import plain_console

console = plain_console()


def console_line(text: str) -> None:
    console.print(text, soft_wrap=True)


def plain_table(names: list[str], numbers: list[str]) -> Table:
    """Columns of text, then of numbers; on a narrow terminal text goes on in the next line and nothing is cut."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in names:
        table.add_column(name, overflow="fold")
    for number in numbers:
        table.add_column(number, justify="right", no_wrap=True)
    return table
