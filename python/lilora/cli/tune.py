"""`lilora tune`."""

import gc
import io
import itertools
import json
import re
import shlex
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lilora.errors import Diverged, UserError, shortened

from .options import Json
from .output import console, console_line, plain_table

if TYPE_CHECKING:
    from collections.abc import Callable

    from lilora.continual.manifest import Manifest
    from lilora.continual.tuning import Candidate, Result, Round, Tuning
    from lilora.methods import Method

OWN = ("lr", "seed", "out", "label", "validate", "quiet", "json", "help")  # options of train that a tuning gives


def tune(
    context: typer.Context,
    rates: Annotated[
        str | None,
        typer.Option("--lr", help="Learning rates, comma-separated. Default: eight from 1e-5 to 3e-2."),
    ] = None,
    tries: Annotated[
        list[str] | None,
        typer.Option(
            "--try", help="key=[value, ...]: settings of the method, each with every rate; may be given again."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of what is tried; the same command goes on. Default: runs/<manifest>-<method>-tune."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the runs that are tried; take none that you report. Default: 100.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
    as_json: Json = False,
) -> None:
    """Find the learning rate of a method on a manifest.

    Takes the manifest and the options of lilora train, and its own below. Every rate trains the first tasks; the better half
    goes on to twice as many, until one is left or all are trained. What counts is the mean score over the tasks so far, and
    at equal scores the likelihood of the references.

    Test splits are left alone: scores are those of the manifest's validation samples or, of a task without, of a fifth of its
    training samples, at most 500, which are not trained on.
    """
    from lilora.continual.tuning import SEED, Tuning, rounds
    from lilora.methods import METHODS

    from . import app

    command = typer.main.get_command(app).commands["train"]
    given = command.make_context("tune", list(context.args), parent=context.parent)  # refuses what train does not know
    _check_not_given(given)
    manifest, answers = _manifest(given)
    method = METHODS.find(given.params["method"], "--method")
    if method.trains_on == "nothing":
        raise UserError(f"--method {method.name} trains nothing, so no learning rate is better; run lilora train")
    names = [task.name for task in manifest.tasks]
    scored = [number for number, task in enumerate(manifest.tasks, 1) if task.test is not None]
    if not scored:
        raise UserError(f"{given.params['tasks']}: no task has a scorer, by which to choose; add the key to one")
    candidates = _candidates(method, rates, tries or [])
    first = len(names) if method.trains_on == "all" else max(2, scored[0])  # such a run takes no more tasks
    plan = rounds(len(candidates), first, len(names))
    options = {
        name: json.loads(json.dumps(value, default=str))
        for name, value in given.params.items()
        if value not in (None, False, []) and name not in ("context", "out", "seed", "learning_rate")
    }
    out = out or Path("runs") / f"{manifest.name}-{given.params['method']}-tune"
    wanted = Tuning(tasks=names, seed=SEED if seed is None else seed, scored_on=manifest.scored_on, options=options)
    tuning = _opened(out, wanted)

    def run(candidate: "Candidate", tasks: int) -> "Result":
        words = ["--order", ",".join(names[:tasks]), "--seed", str(tuning.seed), "--validate"]
        words += [*(["--nll"] if answers else []), *_words(candidate)]
        return _measured(command, candidate, tasks, [*context.args, *words], out / _folder(candidate))

    _halve(tuning, candidates, plan, run, out, as_json, bar=not (quiet or as_json))
    if as_json:
        print(tuning.model_dump_json())
    else:
        _print(tuning, candidates)
        _print_best(tuning, candidates, out, manifest, method.name, context.args)


def _halve(
    tuning: "Tuning",
    candidates: "list[Candidate]",
    plan: "list[Round]",
    run: "Callable[[Candidate, int], Result]",
    out: Path,
    silent: bool,
    bar: bool,
) -> None:
    """Find the best candidate by `run`, which trains one on so many tasks, and keep all results; UserError if all diverged."""
    from rich.progress import Progress

    from lilora.continual.tuning import halving, write_tuning

    with Progress(disable=not bar, transient=True) as progress:
        task = progress.add_task("tuning", total=sum(candidates * tasks for candidates, tasks in plan))

        def measure(candidate: "Candidate", tasks: int) -> "Result":
            progress.update(task, description=f"{candidate}: {tasks} tasks")
            known = tuning.find(candidate, tasks) or _diverged_before(tuning, candidate, tasks)
            if known is None:
                known = run(candidate, tasks)
                tuning.results.append(known)
                write_tuning(out, tuning)
                if not silent:
                    console_line(_line(known))
            progress.advance(task, tasks)
            return known

        for ranking in halving(candidates, plan, measure):
            best = ranking[0]
    if best.diverged:
        raise UserError(f"all of {len(candidates)} candidates diverged ({best.diverged}); give lower rates with --lr")
    tuning.best = best
    write_tuning(out, tuning)


def _check_not_given(given: typer.Context) -> None:
    """UserError for options of train that a tuning chooses itself."""
    for option in given.command.params:
        name = option.opts[0].lstrip("-")
        source = given.get_parameter_source(option.name)
        if name in OWN and source is not None and source.name == "COMMANDLINE":
            raise UserError(f"--{name} behind lilora tune: it is not passed on to lilora train; leave it out")


def _manifest(given: typer.Context) -> tuple[Any, bool]:
    """The manifest of options of train, and whether its samples have answers whose likelihood is measured."""
    from lilora.continual.kinds import KINDS
    from lilora.continual.manifest import load_manifest

    order = given.params["order"]
    order = None if order is None else order.split(",")
    manifest = load_manifest(given.params["tasks"], order, given.params["data"], validate=True)
    return manifest, KINDS[manifest.kind].answers


def _candidates(method: "type[Method]", rates: str | None, tries: list[str]) -> "list[Candidate]":
    from lilora.continual.tuning import RATES, Candidate

    from .method_options import setting

    found: list[float] = []
    for text in rates.split(",") if rates is not None else map(str, RATES):
        try:
            rate = float(text)
        except ValueError:
            rate = 0
        if not 0 < rate <= 1 or rate in found:
            raise UserError(
                f"--lr {rates}: {text!r} is no rate above 0 and up to 1, or given twice; write 1e-4,3e-4,1e-3"
            )
        found.append(rate)
    settings: dict[str, list[Any]] = {}
    for key, values in map(setting, tries):
        if not isinstance(values, list) or not values or key in settings:
            raise UserError(
                f"--try {key}={shortened(values)}: one list is wanted for each setting, such as {key}=[1, 10]"
            )
        if key not in method.settings_type.model_fields:
            raise method.settings_type.unknown(method.name, key)
        settings[key] = values
    combined = [dict(zip(settings, values, strict=True)) for values in itertools.product(*settings.values())]
    candidates = [Candidate(learning_rate=rate, settings=chosen) for chosen in combined for rate in sorted(found)]
    if len(candidates) < 2:
        raise UserError(f"--lr {rates}: there is nothing to choose from; give at least two rates, comma-separated")
    return candidates


def _opened(out: Path, wanted: "Tuning") -> "Tuning":
    """The tuning that `out` holds, to go on with, or the one that is wanted if it holds none.

    Raises UserError for a tuning with other options, and for a file that holds none.
    """
    from lilora.continual.tuning import FILE

    if not (file := out / FILE).exists():
        return wanted
    try:
        held = type(wanted).model_validate_json(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} is not what lilora tune writes; give another --out, or restore it") from error
    held.best = None
    for name in ("tasks", "seed", "scored_on", "options"):
        old, new = getattr(held, name), getattr(wanted, name)
        if name == "options":
            old, new = (
                {key: value for key, value in one.items() if value != other.get(key)}
                for one, other in ((old, new), (new, old))
            )
        if old != new:
            raise UserError(
                f"--out {out} holds another tuning: {name} {shortened(old)} there and {shortened(new)} here; give "
                "another folder, or delete that one"
            )
    return held


def _diverged_before(tuning: "Tuning", candidate: "Candidate", tasks: int) -> "Result | None":
    """A candidate that diverged on fewer tasks does so on more."""
    held = (r for r in tuning.results if r.candidate == candidate and r.diverged and r.tasks <= tasks)
    return next((result.model_copy(update={"tasks": tasks}) for result in held), None)


def _measured(command: Any, candidate: "Candidate", tasks: int, arguments: list[str], out: Path) -> "Result":
    """What `lilora train` with these arguments, in the folder `out`, reaches."""
    from lilora.bank.bank import Bank
    from lilora.continual.run_folder import run_of
    from lilora.continual.tuning import Result

    started = time.monotonic()
    try:
        with redirect_stdout(io.StringIO()):
            command.main([*arguments, "--out", str(out), "--json"], prog_name="lilora train", standalone_mode=False)
    except Diverged as error:
        return Result(candidate=candidate, tasks=tasks, diverged=str(error))
    finally:
        gc.collect()  # the model, for which there may not be room twice
    matrix = run_of(Bank.open(out)).matrix
    nlls = [matrix.nll(matrix.tasks[-1], task) for task in matrix.columns]
    return Result(
        candidate=candidate,
        tasks=tasks,
        ap=matrix.metrics()["Last" if matrix.unseen else "AP"],
        nll=None if None in nlls else sum(nlls) / len(nlls),
        seconds=round(time.monotonic() - started, 1),
    )


def _folder(candidate: "Candidate") -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", str(candidate))


def _words(candidate: "Candidate") -> list[str]:
    """As options of train."""
    pairs = [f"{key}={json.dumps(value)}" for key, value in candidate.settings.items()]
    return ["--lr", f"{candidate.learning_rate:g}", *(word for pair in pairs for word in ("--set", pair))]


def _line(result: "Result") -> str:
    if result.diverged:
        return f"{result.candidate}: {result.diverged}"
    likelihood = "" if result.nll is None else f", {result.nll:.3f} nats per token"
    return f"{result.candidate}: {result.ap:.1f} points{likelihood} over {result.tasks} tasks"


def _edge(best: "Result", candidates: "list[Candidate]") -> str:
    """Advice where the best of several rates is the lowest or highest."""
    rates = sorted({candidate.learning_rate for candidate in candidates})
    ends = {rates[0]: "lowest", rates[-1]: "highest"} if len(rates) > 1 else {}
    end = ends.get(best.candidate.learning_rate)
    further = {"lowest": "lower", "highest": "higher"}
    return f"this is the {end} rate that was tried; a {further[end]} one may be better" if end else ""


def _print(tuning: "Tuning", candidates: "list[Candidate]") -> None:
    """A row for each candidate, a column for each round."""
    rounds = sorted({result.tasks for result in tuning.results})
    table = plain_table(["points over so many tasks"], [str(tasks) for tasks in rounds])
    for candidate in candidates:
        found = [tuning.find(candidate, tasks) for tasks in rounds]
        cells = ["" if r is None else "diverged" if r.diverged else f"{r.ap:.1f}" for r in found]
        table.add_row(str(candidate), *cells)
    console.print(table)


def _print_best(
    tuning: "Tuning", candidates: "list[Candidate]", out: Path, manifest: "Manifest", method: str, given: list[str]
) -> None:
    """What is best, and how it is used: in the manifest, or in the command of a training; given: the arguments of the tuning."""
    from lilora.continual.tuning import FILE
    from lilora.reports.runs import VALIDATION

    best = tuning.best
    console_line(VALIDATION)
    console_line(f"tried: {out / FILE}")
    console_line(f"best: {_line(best)}")
    if edge := _edge(best, candidates):
        console_line(edge)
    console_line(f"in the manifest: learning_rate: {{{method}: {best.candidate.learning_rate:g}}}")
    if own := [task.name for task in manifest.tasks if task.learning_rate is not None]:
        console_line(
            f"there {', '.join(own)} has a learning_rate of its own, which comes first; here all had the rate tried"
        )
    console_line(f"command: {shlex.join(['lilora', 'train', *given, *_words(best.candidate)])}")
