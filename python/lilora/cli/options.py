"""Options that several commands have, what their values mean, and what is said of those that are given twice."""

import os
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from lilora.errors import UserError, print_note


def say_the_last_counts(option: str, times: int, last: Any) -> None:
    """Say of an option that is given several times which of its values counts; of several processes the first one does."""
    if int(os.environ.get("RANK", 0)) == 0:
        print_note(f"{option} is given {times} times; the last one counts, {last}")


class Command(TyperCommand):
    """Says that of an option which takes one value, and is given several times, the last one counts."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = list(args)
        rest = super().parse_args(ctx, args)
        if ctx.parent is None:  # not what a user wrote: `lilora tune` puts options behind those
            return rest
        *_, order = self.make_parser(ctx).parse_args(given)
        for option, times in Counter(order).items():
            one = option.param_type_name == "option" and not option.multiple and option.nargs == 1
            if times > 1 and one and (not option.is_flag or option.secondary_opts):
                last = ctx.params[option.name]
                if option.is_flag:
                    last = (option.opts if last else option.secondary_opts)[0]
                say_the_last_counts(option.opts[0], times, last)
        return rest


class App(typer.Typer):
    """A group of commands, each a `Command`."""

    def command(self, name: str | None = None, *, cls: type[TyperCommand] = Command, **more: Any) -> Callable:
        return super().command(name, cls=cls, **more)


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Likelihood = Annotated[
    bool, typer.Option("--nll", help="Measure how likely the references are, too: nats per token, lower is better.")
]
Order = Annotated[str | None, typer.Option(help="Task names, comma-separated: which tasks to train on, in this order.")]
Data = Annotated[Path | None, typer.Option(help="Folder of the tasks' files, instead of the one the manifest names.")]
BankPath = Annotated[Path, typer.Argument(metavar="BANK", help="A bank folder, or the run folder that holds one.")]
AnyBank = Annotated[
    Path, typer.Argument(metavar="BANK", help="A bank folder, the run folder that holds one, or a hub repository.")
]
Base = Annotated[str | None, typer.Option(help="Base model. Default: the one the bank was made with.")]
NewFolder = Annotated[Path, typer.Option("--out", help="New or empty folder.")]
Rank = Annotated[int, typer.Option("--r", min=1, help="Rank of the shared factors, and of the LoRA baselines.")]
SubRank = Annotated[
    int | None,
    typer.Option(min=1, help="Rank of a task's own factors, where a method has them (lilora). Default: r // 2."),
]
Projector = Annotated[
    bool | None, typer.Option(help="Adapt the projector's linear layers too; default: where the family has them.")
]
Attention = Annotated[bool, typer.Option(help="Adapt the attention's linear layers too.")]


def choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{option} {value} is unknown; choose one of {', '.join(choices)}")


def check_not_read(option: str, path: Path, read: Iterable[Path]) -> None:
    """UserError where the file that an option writes is one that the command reads, under whatever name."""
    for file in read:
        with suppress(OSError):  # one of them is not there
            if path.samefile(file):
                raise UserError(f"{option} would write {path} over {file}, which the command reads; give another place")


def target_pattern(model: str, projector: bool | None, attention: bool) -> str:
    from lilora.families import target_modules

    return target_modules(model_config(model), projector=projector, attention=attention)


def model_config(model: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"--model {model}: has no readable config ({reason}); give a model folder or a hub id"
        ) from error


def bank_router(bank, method):
    from lilora.continual.kinds import kind_of
    from lilora.continual.task_identification import identifier_of

    if not kind_of(bank.config).needs_task(method):
        raise UserError(f"{bank.path}: {method.name} needs no task, so there is nothing to route; leave out --routed")
    return identifier_of(bank.config).load(bank, method.model)
