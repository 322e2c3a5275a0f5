"""Train a multimodal model on tasks one after another, and serve them together.

A module per group of commands. What a command alone needs is imported inside it, so that `lilora --help` need not wait for it.
"""

import errno
import os
import sys
import warnings
from typing import Annotated

import typer

from lilora import __version__
from lilora.errors import UserError, lost_process, print_error

from . import bank, base, data, evaluate, generate, info, report, train, tune
from .options import App

# What a system says of a path that it does not take: the user's to mend, wherever in a command it is met.
OF_PATHS = {
    getattr(errno, name)
    for name in ["EACCES", "EDQUOT", "EFBIG", "EISDIR", "ELOOP", "ENAMETOOLONG", "ENOSPC", "ENOTDIR", "EPERM", "EROFS"]
    if hasattr(errno, name)
}

# Without rich's boxes, which cut long options where the terminal is narrow.
app = App(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"lilora {__version__}")
        raise typer.Exit


@app.callback(help=__doc__.splitlines()[0])
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What comes before a command."""


app.command(cls=train.TrainCommand)(train.train)
app.command(
    options_metavar="MANIFEST [OPTIONS]", context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)(tune.tune)
app.command("eval")(evaluate.evaluate)
app.command()(report.report)
app.command()(report.analyze)
app.command()(generate.generate)
app.command()(info.params)
app.command()(info.info)
app.add_typer(bank.app, name="bank")
app.add_typer(base.app, name="base")
app.add_typer(data.app, name="data")


def main() -> None:
    """Entry point: a user's mistake is one sentence and exit code 2, of several processes too."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and sys.argv[1:2] != ["train"]:
            raise UserError("only lilora train runs in several processes; start this command without a launcher")
        app()
    except UserError as error:
        print_error(str(error))
        sys.exit(2)
    except OSError as error:
        if error.errno not in OF_PATHS or error.filename is None:
            raise
        print_error(f"{error.filename} cannot be used ({error.strerror}); give another path, or make room for it")
        sys.exit(2)
    except Exception as error:
        from lilora.continual.memory import ran_out

        if ran_out(error):
            print_error(
                f"memory does not hold what this command needs ({str(error).splitlines()[0]}); give smaller sizes or batches, or "
                "a larger device"
            )
            sys.exit(2)
        if not lost_process(error):
            raise
        print_error(
            "another process of this run has ended; run the same command again to go on from the last checkpoint"
        )
        sys.exit(1)
