"""`lilora report` and `lilora analyze`: of banks alone."""

import json
from pathlib import Path
from typing import Annotated

import typer

from lilora.errors import UserError
from lilora_kernels.facts import environment

from .options import BankPath, Json, check_not_read
from .output import console, console_line


def report(
    banks: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN",
            help="Banks, run folders, or the metrics.json files of runs and reports; several seeds of a method are averaged.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the report; default: the first bank's run folder.")
    ] = None,
    title: str = "Continual learning",
    as_json: Json = False,
) -> None:
    """Write tables, curves and one HTML page of one or more runs."""
    from lilora.bank.bank import Bank
    from lilora.continual.run_folder import run_of
    from lilora.reports.report import print_tables, write_report
    from lilora.reports.runs import read_runs

    if out is None:
        if banks[0].is_file():
            raise UserError(f"{banks[0]} is a file, beside which no report is put; give its folder as --out")
        out = Bank.open(banks[0]).path.parent
    if len(banks) > 1:  # of one the runs in it stay
        check_not_read("--out", out / "metrics.json", filter(Path.is_file, banks))
    found = (read_runs(path) if path.is_file() else [run_of(Bank.open(path))] for path in banks)
    runs = [run for of_path in found for run in of_path]
    page = write_report(out, runs, title, environment())
    if as_json:
        print(json.dumps({"report": str(page), "runs": [run.to_dict() for run in runs]}))
    else:
        print_tables(runs, console)
        console_line(f"report: {page}")


def analyze(
    bank: BankPath,
    threshold: Annotated[
        float, typer.Option(help="A redundant rank has less of its squared norm outside the span of the other task's.")
    ] = 0.5,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the plots and metrics.json; default: analysis in the run folder.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare the tasks of a bank, without its model.

    Similar factors, redundant ranks, drift of the shared basis.
    """
    from rich.progress import Progress

    from lilora.bank.bank import Bank
    from lilora.reports.analyze import analyze as run
    from lilora.reports.analyze import print_analysis, write_analysis

    opened = Bank.open(bank)
    with Progress(disable=as_json, transient=True) as progress:
        analysis = run(opened, threshold, progress.track)
    out = out or opened.path.parent / "analysis"
    write_analysis(out, analysis)
    if as_json:
        print(json.dumps(analysis.to_dict()))
    else:
        print_analysis(analysis, console)
        console_line(f"plots: {out}")
