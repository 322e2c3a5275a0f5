"""Where the commands print."""

from lilora.terminal import plain_console

console = plain_console()


def console_line(text: str) -> None:
    console.print(text, soft_wrap=True)
