"""Where the commands print, and their tables."""

import json
import shlex

from rich import box
from rich.table import Table

from lilora.terminal import plain_console

console = plain_console()


def console_line(text: str) -> None:
    console.print(text, soft_wrap=True)


def adapters_line(target_modules: str | list[str]) -> str:
    """Which layers are adapted, in the form in which a shell takes it as an option again."""
    value = target_modules if isinstance(target_modules, str) else json.dumps(target_modules)
    return f"adapters: --set {shlex.quote(f'target_modules={value}')}"


def plain_table(names: list[str], numbers: list[str]) -> Table:
    """Columns of text, then of numbers; on a narrow terminal text goes on in the next line and nothing is cut."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in names:
        table.add_column(name, overflow="fold")
    for number in numbers:
        table.add_column(number, justify="right", no_wrap=True)
    return table
