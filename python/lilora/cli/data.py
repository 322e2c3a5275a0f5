"""`lilora data`: of a manifest's data alone."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .options import App, Data, Json
from .output import console, console_line, plain_table

app = App(help="Look at the data of a manifest.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def check(
    tasks: Annotated[Path, typer.Argument(metavar="MANIFEST", help="A YAML file that names the tasks in order.")],
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Say of every task what is there and what is missing.

    No model is needed. It says where what is missing must lie. Exit code 1 if anything is missing or wrong.
    """
    from lilora.continual.data_check import check_data, lies_there
    from lilora.continual.manifest import importable, read_manifest

    manifest = read_manifest(tasks, data=data)
    with importable(tasks.resolve().parent):
        reports = list(check_data(manifest))
    incomplete = [report for report in reports if report.state != "ok"]
    if as_json:
        print(
            json.dumps({"data": str(manifest.data), "complete": not incomplete, "splits": [asdict(r) for r in reports]})
        )
        raise typer.Exit(bool(incomplete))
    table = plain_table(["task", "split", "state"], ["samples", "images", "missing"])
    for report in reports:
        counts = (report.samples, report.images, report.missing_images) if report.samples is not None else ("", "", "")
        table.add_row(report.task, report.split, report.state, *map(str, counts))
    console.print(table)
    for report in incomplete:
        console_line(report.problem)
    if incomplete:
        console_line(
            f"{len(incomplete)} of {len(reports)} splits are not complete under {lies_there(manifest.data)}; how they must "
            f"lie is said in the comments of {tasks}"
        )
    raise typer.Exit(bool(incomplete))
