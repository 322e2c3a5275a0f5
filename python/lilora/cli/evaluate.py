"""`lilora eval`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lilora.errors import UserError

from .options import AnyBank, Base, Data, Device, Json, Likelihood, bank_router, check_not_read
from .output import console, console_line, plain_table


def evaluate(
    bank: AnyBank,
    tasks: Annotated[Path, typer.Option(help="The task manifest with the test data.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per batch; tasks are mixed.")] = 32,
    model: Base = None,
    routed: Annotated[
        bool,
        typer.Option(
            "--routed",
            help="Score without the task too, as the bank's router finds it; writes routes.png beside the bank.",
        ),
    ] = False,
    predictions: Annotated[
        Path | None,
        typer.Option(help="Folder for every answer: TASK.jsonl, and TASK-routed.jsonl of --routed, as JSON lines."),
    ] = None,
    nll: Likelihood = False,
    data: Data = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Score the tasks of a bank in mixed batches, with one model load.

    Of image classification with CLIP all tasks of the manifest, trained or not. Probes of the manifest are asked with the newest
    task.
    """
    from rich.progress import Progress

    from lilora.continual.base_model import load_bank, open_trained
    from lilora.continual.evaluate import write_answers
    from lilora.continual.kinds import KINDS, kind_name, kind_of
    from lilora.continual.manifest import load_manifest, read_manifest
    from lilora.continual.probes import score_probes

    if nll and routed:
        raise UserError("--nll measures answers with the task given and --routed without; give one of them")
    opened = open_trained(bank)
    kind = kind_of(opened.config)
    manifest = read_manifest(tasks, None, data)
    if KINDS[kind_name(manifest.kind, opened.base_model.id)] is not kind:
        raise UserError(
            f"--tasks {tasks} is of kind {manifest.kind!r} and {bank} is not; give the manifest of its tasks"
        )
    kind.check_manifest(manifest)
    if missing := [task for task in opened.tasks if task not in [spec.name for spec in manifest.tasks]]:
        raise UserError(f"--tasks {tasks} lacks {', '.join(missing)} of {bank}; give the manifest of its training")
    manifest = load_manifest(tasks, None if kind.unseen(manifest) else opened.tasks, data)
    if predictions is not None:
        specs = (*manifest.tasks, *manifest.probes)
        files = [getattr(spec, split) for spec in specs for split in spec.splits]
        for name in (f"{spec.name}{end}" for spec in specs for end in ("", "-routed")):
            check_not_read("--predictions", predictions / f"{name}.jsonl", files)
    opened, method, processor = load_bank(bank, model, device)
    router = bank_router(opened, method) if routed else None
    measures = kind.measures(nll)
    with Progress(disable=as_json) as progress:
        results = kind.evaluate(method, processor, manifest.tasks, batch_size, progress, **measures)
        if router is not None:
            routes = kind.evaluate_routed(method, processor, router, manifest.tasks, results, batch_size, progress)
        probed = score_probes(kind, method, processor, manifest.probes, opened.tasks[-1], batch_size, progress)
    if predictions is not None:
        answers = {result.task: result.answers for result in (*results, *probed)}
        if router is not None:
            answers |= {f"{result.task}-routed": result.routed.answers for result in routes}
        for name, given in answers.items():
            write_answers(predictions / f"{name}.jsonl", given)
    if router is not None:
        show_routes(routes, probed, opened, opened.path.parent if bank.exists() else Path(), as_json)
        return
    if as_json:
        print(
            json.dumps({r.task: cells_of(r) | ({"nll": r.nll} if nll else {}) for r in results} | probe_cells(probed))
        )
        return
    table = plain_table(["task"], ["score", "in format", *["nats per token"] * nll])
    for result in results:
        share = "" if result.format_share is None else f"{100 * result.format_share:.1f} %"
        likelihood = [f"{result.nll:.3f}"] if nll else []
        table.add_row(result.task, f"{result.score:.1f}", share, *likelihood)
    console.print(table)
    print_probes(probed)


def cells_of(result: Any) -> dict[str, Any]:
    return {"score": result.score, "format_share": result.format_share}


def probe_cells(probed: list) -> dict[str, Any]:
    return {result.task: cells_of(result) | {"probe": True} for result in probed}


def print_probes(probed: list) -> None:
    if probed:
        table = plain_table(["probe, never trained"], ["score"])
        for result in probed:
            table.add_row(result.task, f"{result.score:.1f}")
        console.print(table)


def show_routes(results: list, probed: list, bank, out: Path, as_json: bool) -> None:
    """Scores with the task given and routed, how often the route was right, and where the samples went, in print and as a plot.

    The plot is made of all tasks of the bank, if they are in the manifest.
    """
    from lilora.reports.report import print_routes, write_routes

    known = {r.task: r.routes for r in results if r.task in bank.tasks}
    if as_json:
        cells = {}
        for r in results:
            cells[r.task] = cells_of(r.given)
            cells[r.task] |= {"routed_score": r.routed.score, "routed_format_share": r.routed.format_share}
            cells[r.task] |= {"routing_accuracy": r.accuracy if r.task in known else None, "routes": r.routes}
        print(json.dumps(cells | probe_cells(probed)))
        if len(known) == len(bank.tasks):
            write_routes(out, known)
        return
    table = plain_table(["task"], ["score", "score, routed", "routed to it"])
    for r in results:
        share = f"{r.accuracy:.1f} %" if r.task in known else ""
        table.add_row(r.task, f"{r.given.score:.1f}", f"{r.routed.score:.1f}", share)
    table.add_section()
    means = [
        sum(values) / len(results) for values in zip(*((r.given.score, r.routed.score) for r in results), strict=True)
    ]
    accuracies = [r.accuracy for r in results if r.task in known]
    share = f"{sum(accuracies) / len(accuracies):.1f} %" if accuracies else ""
    table.add_row("mean", *(f"{mean:.1f}" for mean in means), share)
    console.print(table)
    print_probes(probed)
    print_routes(known, bank.tasks, console)
    if len(known) == len(bank.tasks):
        console_line(f"routes: {write_routes(out, known)}")
