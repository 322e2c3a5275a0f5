"""The `lilora` command, also as `python -m lilora`: launchers of several processes want a module."""

import sys

from lilora.errors import missing_extra, print_error


def main() -> None:
    """Run the command; a package of the extra that is not there is one sentence and exit code 2."""
    try:
        from lilora.cli import main as command

        command()
    except ModuleNotFoundError as missing:
        if str(missing.name).partition(".")[0] == "lilora":
            raise
        print_error(missing_extra(missing))
        sys.exit(2)


if __name__ == "__main__":
    main()
