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
        list[str] | None,
        typer.Option(
            "--set", help="target_modules=PATTERN: other layers than are found. experts=true: routed experts too."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Count the adapter parameters of a model, without its weights."""
    from lilora.reports.params import account

    from .method_options import setting

    more = dict(map(setting, pairs or []))
    target, experts = more.pop("target_modules", None), more.pop("experts", False)
    ranks = more.pop("expert_r", 8), more.pop("expert_sub_rank", None)
    if more or not isinstance(target, str | None) or not isinstance(experts, bool):
        raise UserError(
            f"--set {', '.join(pairs)} is not for params; it takes target_modules=REGULAR-EXPRESSION, experts=true, expert_r and "
            "expert_sub_rank alone"
        )
    accounting = account(
        model,
        r=r,
        sub_rank=sub_rank,
        target_modules=target,
        projector=projector,
        attention=attention,
        expert_ranks=ranks if experts else None,
    )
    if as_json:
        print(json.dumps(accounting.to_dict(tasks)))
        return
    console.print(accounting.table(tasks))
    console_line(adapters_line(accounting.target_modules))
    if accounting.warning:
        console_line(f"Warning: {accounting.warning}.")


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
