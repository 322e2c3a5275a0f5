"""`lilora info` and `lilora params`: what runs here, and what a model would take."""

import json
from typing import Annotated

import typer

from lilora.errors import UserError
from lilora_kernels.facts import info as machine_info
from lilora_kernels.facts import rows

from .options import Attention, Json, Projector, Rank, SubRank
from .output import adapters_line, console, console_line, plain_table


def params(
    model: Annotated[
        str, typer.Option(help="llava-1.5-7b (shipped), a folder with config.json, or a hub id.")
    ] = "llava-1.5-7b",
    tasks: Annotated[int, typer.Option(min=1, help="Number of tasks to account for.")] = 6,
    r: Rank = 128,
    sub_rank: SubRank = None,
    projector: Projector = None,
    attention: Attention = False,
    pairs: Annotated[
        list[str] | None, typer.Option("--set", help="target_modules=PATTERN: other layers than are found.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Count the adapter parameters of a model, without its weights."""
    from lilora.reports.params import account

    from .method_options import setting

    more = dict(map(setting, pairs or []))
    target = more.pop("target_modules", None)
    if more or not isinstance(target, str | None):
        raise UserError(f"--set {', '.join(pairs)} is not for params; it takes target_modules=REGULAR-EXPRESSION alone")
    accounting = account(model, r=r, sub_rank=sub_rank, target_modules=target, projector=projector, attention=attention)
    if as_json:
        print(json.dumps(accounting.to_dict(tasks)))
    else:
        console.print(accounting.table(tasks))
        console_line(adapters_line(accounting.target_modules))


def info(as_json: Json = False) -> None:
    """Show versions, devices and backends, and why one cannot run."""
    facts = machine_info()
    if as_json:
        print(json.dumps(facts))
        return
    table = plain_table(["", ""], [])
    table.show_header = False
    for row in rows(facts):
        table.add_row(*row)
    console.print(table)
