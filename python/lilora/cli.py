"""Learn tasks one after another with a multimodal model, and serve them together."""

import json
import os
import sys
import warnings
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from lilora.errors import UserError, lost_process, print_error
from lilora.terminal import plain_console

if TYPE_CHECKING:
    pass

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__.splitlines()[0]
)
bank_app = typer.Typer(
    no_args_is_help=True, help="A bank of learned tasks: look into it, import, export, merge, remove."
)
app.add_typer(bank_app, name="bank")
console = plain_console()

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Order = Annotated[str | None, typer.Option(help="Task names, comma-separated: which tasks to learn, in this order.")]
Data = Annotated[Path | None, typer.Option(help="Folder of the tasks' files, instead of the one the manifest names.")]
BankPath = Annotated[Path, typer.Argument(help="A bank folder, or the run folder that holds one.")]
AnyBank = Annotated[Path, typer.Argument(help="A bank folder, the run folder that holds one, or a hub repository.")]
NewFolder = Annotated[Path, typer.Option("--out", help="New or empty folder.")]
Rank = Annotated[int, typer.Option("--r", min=1, help="Rank of the shared factors, and of the LoRA baselines.")]
SubRank = Annotated[int | None, typer.Option(min=1, help="Rank of a task's own factors (lilora). Default: r // 2.")]
Projector = Annotated[bool, typer.Option(help="Adapt the projector's linear layers too, as the paper does.")]
Attention = Annotated[bool, typer.Option(help="Adapt the attention's linear layers too.")]

# Options of `lilora train` that a method may want otherwise; these are those of the LiLoRA paper.
REFERENCE = {"r": 128, "alpha": None, "dropout": 0.05, "learning_rate": 2e-5, "weight_decay": 0.01}
DEFAULT = "Default: that of the method's paper."
PEFT_LORA = ("lora", "dirlora", "ewc", "lwf")  # their settings have the names of peft.LoraConfig


@app.command()
def train(
    tasks: Annotated[Path, typer.Argument(help="The task manifest, for example examples/digits/tasks.yaml.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Run folder; the same command goes on where it was interrupted. Default: runs/<manifest>-<method>-<seed>."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Base model: a folder or a hub id; default: the manifest's.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="lilora, pclr, dac; lora (one LoRA for all tasks), dirlora (a LoRA per task), ewc, lwf, olora or moelora."
        ),
    ] = "lilora",
    preset: Annotated[
        str | None,
        typer.Option(
            help="lilora: frozen (default: old tasks stay bit for bit), paper, released; pclr and dac: paper (default), released."
        ),
    ] = None,
    r: Annotated[int | None, typer.Option("--r", min=1, help=f"Rank of the adapters. {DEFAULT}")] = None,
    sub_rank: SubRank = None,
    alpha: Annotated[
        float | None, typer.Option(help="The adapter's output is scaled by alpha / r. Default: 2 r; 1 for dac.")
    ] = None,
    dropout: Annotated[
        float | None, typer.Option(min=0.0, max=0.99, help=f"Dropout on the adapter's input. {DEFAULT}")
    ] = None,
    more: Annotated[
        list[str] | None, typer.Option("--set", help="key=value: any other setting of the method; may be given again.")
    ] = None,
    projector: Projector = True,
    attention: Attention = False,
    learning_rate: Annotated[
        float | None, typer.Option("--lr", min=0.0, help=f"Peak learning rate of the cosine schedule. {DEFAULT}")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(min=0.0, help=DEFAULT)] = None,
    epochs: Annotated[float, typer.Option(min=0.0, help="Passes over each task's training samples.")] = 1.0,
    max_steps: Annotated[int, typer.Option(min=-1, help="Optimizer steps per task; -1: as many as epochs need.")] = -1,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per batch, of all processes together.")] = 8,
    gradient_accumulation: Annotated[int, typer.Option(min=1, help="Batches per optimizer step.")] = 2,
    warmup: Annotated[
        float, typer.Option(min=0.0, max=0.99, help="Share of the steps in which the learning rate rises.")
    ] = 0.03,
    gradient_checkpointing: bool = False,
    dtype: Annotated[str, typer.Option(help="Of the base model: auto (as stored), fp32, bf16 or fp16.")] = "auto",
    eval_batch_size: Annotated[int, typer.Option(min=1)] = 64,
    save_steps: Annotated[int, typer.Option(min=1, help="Optimizer steps between checkpoints.")] = 200,
    workers: Annotated[int, typer.Option(min=0, help="Processes that prepare training batches.")] = 0,
    report_to: Annotated[
        str, typer.Option(help="Trackers as transformers names them, comma-separated: tensorboard, wandb ...")
    ] = "none",
    order: Order = None,
    data: Data = None,
    seed: Annotated[int, typer.Option(min=0, max=4_000_000)] = 0,
    device: Device = "auto",
    label: Annotated[str | None, typer.Option(help="What reports call this run; default: method and preset.")] = None,
    quiet: Annotated[bool, typer.Option(help="No progress bars.")] = False,
    as_json: Json = False,
) -> None:
    """Learn a sequence of tasks, evaluating after each; resumable; writes a report.

    Several processes: accelerate launch --config_file examples/accelerate/ddp.yaml -m lilora train ...
    """
    from lilora.continual.manifest import load_manifest
    from lilora.continual.publish import write_bank_card
    from lilora.methods import METHODS
    from lilora.reports.report import print_tables, write_report

    if method not in METHODS:
        raise UserError(f"--method {method} is unknown; choose one of {', '.join(METHODS)}")
    choice("--dtype", dtype, ("auto", "fp32", "bf16", "fp16"))
    manifest = load_manifest(tasks, order.split(",") if order else None, data)
    model = model or manifest.model
    if model is None:
        raise UserError(f"{tasks} names no base model; pass --model with a folder or a hub id")
    from transformers.utils.logging import disable_progress_bar

    from lilora.continual import processes
    from lilora.continual.recorded import TrainSettings
    from lilora.continual.run import ContinualRun
    from lilora.continual.run_folder import method_label
    from lilora.continual.trainer import trackers_of

    trackers = trackers_of(report_to)
    further = dict(map(setting, more or []))
    further["target_modules"] = further.get("target_modules") or target_pattern(model, projector, attention)
    given = {"r": r, "alpha": alpha, "dropout": dropout, "learning_rate": learning_rate, "weight_decay": weight_decay}
    options = REFERENCE | METHODS[method].defaults | {name: value for name, value in given.items() if value is not None}
    options["alpha"] = 2.0 * options["r"] if options["alpha"] is None else options["alpha"]
    settings = method_settings(method, preset, sub_rank, options, further)
    training = TrainSettings.of(
        {
            "learning_rate": options["learning_rate"],
            "weight_decay": options["weight_decay"],
            "epochs": epochs,
            "max_steps": max_steps,
            "batch_size": batch_size,
            "gradient_accumulation": gradient_accumulation,
            "warmup": warmup,
            "gradient_checkpointing": gradient_checkpointing,
            "dtype": dtype,
            "seed": seed,
        }
    )
    out = out or Path("runs") / f"{manifest.name}-{label or method_label(method, settings)}-{seed}"

    console.quiet = processes.rank() > 0
    if console.quiet:
        disable_progress_bar()
    opened = ContinualRun.open(
        out,
        manifest,
        model,
        method,
        settings,
        training,
        device,
        label,
    )
    with closing(opened) as run:
        bars = not (quiet or as_json or console.quiet)
        run.train(
            eval_batch_size, save_steps, workers, bars, (lambda line: None) if as_json else console_line, trackers
        )
        processes.destroy()
        if processes.rank() > 0:
            return
        result = run.result()
        page = write_report(out, [result], f"{result.method} on {manifest.name}", environment())
        write_bank_card(run.bank)
        if as_json:
            print(json.dumps(result.to_dict()))
        else:
            print_tables([result], console)
            console_line(f"report: {page}")


@app.command("eval")
def evaluate(
    bank: AnyBank,
    tasks: Annotated[Path, typer.Option(help="The task manifest with the test data.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per batch; tasks are mixed.")] = 32,
    model: Annotated[str | None, typer.Option(help="Base model; default: the one the bank was made with.")] = None,
    routed: Annotated[
        bool,
        typer.Option(
            "--routed",
            help="Score without the task too, as the bank's router finds it; writes routes.png beside the bank.",
        ),
    ] = False,
    data: Data = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Score all tasks of a bank with the task given: one model load, mixed batches.

    Of image classification all tasks of the manifest, learned or not.
    """
    from rich.progress import Progress

    from lilora.continual.base_model import load_bank
    from lilora.continual.kinds import KINDS, kind_of
    from lilora.continual.manifest import load_manifest

    opened, method, processor = load_bank(bank, model, device)
    router = bank_router(opened, method) if routed else None
    kind = kind_of(opened.config)
    manifest = load_manifest(tasks, None if kind.unseen else opened.tasks, data)
    if KINDS[manifest.kind] is not kind:
        raise UserError(
            f"--tasks {tasks} is of kind {manifest.kind!r} and {bank} is not; give the manifest of its tasks"
        )
    with Progress(disable=as_json) as progress:
        results = kind.evaluate(method, processor, manifest.tasks, batch_size, progress)
        if router is not None:
            routes = kind.evaluate_routed(method, processor, router, manifest.tasks, results, batch_size, progress)
    if router is not None:
        show_routes(routes, opened, opened.path.parent if bank.exists() else Path(), as_json)
        return
    if as_json:
        print(json.dumps({r.task: {"score": r.score, "format_share": r.format_share} for r in results}))
        return
    table = Table("task", "score", "in format")
    for result in results:
        share = "" if result.format_share is None else f"{100 * result.format_share:.1f} %"
        table.add_row(result.task, f"{result.score:.1f}", share)
    console.print(table)


@app.command()
def report(
    banks: Annotated[list[Path], typer.Argument(help="Banks or run folders; several seeds of a method are averaged.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the report; default: the first bank's run folder.")
    ] = None,
    title: str = "Continual learning",
    as_json: Json = False,
) -> None:
    """Write score matrix, curves and metrics of one or more runs as PNG, JSON and one self-contained HTML page."""
    from lilora.bank.bank import Bank
    from lilora.continual.run_folder import run_of
    from lilora.reports.report import print_tables, write_report

    opened = [Bank.open(path) for path in banks]
    runs = [run_of(bank) for bank in opened]
    page = write_report(out or opened[0].path.parent, runs, title, environment())
    if as_json:
        print(json.dumps({"report": str(page), "runs": [run.to_dict() for run in runs]}))
    else:
        print_tables(runs, console)
        console_line(f"report: {page}")


@app.command()
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
    """Compare the tasks of a bank without its model: similar factors, redundant ranks, drift of the shared basis."""
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


@app.command()
def generate(
    bank: AnyBank,
    prompt: Annotated[str, typer.Option(help="The question.")],
    task: Annotated[
        str | None, typer.Option(help="Which task's adapter answers; default: the one that the bank's router finds.")
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="Image file; may be given several times, or not at all.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    model: Annotated[str | None, typer.Option(help="Base model; default: the one the bank was made with.")] = None,
    device: Device = "auto",
) -> None:
    """Answer one question with one task of a bank."""
    import torch

    from lilora.continual import evaluate as evaluation
    from lilora.continual.base_model import load_bank
    from lilora.continual.collator import Collator
    from lilora.continual.images import open_image
    from lilora.continual.instructions import Sample

    for path in image or ():
        open_image(path)
    opened, method, processor = load_bank(bank, model, device, task, answers=True)
    sample = Sample("prompt", tuple(image or ()), prompt, ("",))
    if task is None and method.needs_task:
        router = bank_router(opened, method)
        (task,) = router.route(Collator(processor, {"": 0}, train=False)([("", sample)]))
        print(f"task: {task}", file=sys.stderr)
    task = task or opened.tasks[-1]
    if not method.mixed_batches:
        method.activate(task, train=False)
    method.model.eval()
    collator = Collator(processor, {task: 0}, train=False)
    with torch.inference_mode():
        print(evaluation.generate(method, processor, collator, [(task, sample)], {task: max_new_tokens})[0])


@app.command()
def params(
    model: Annotated[
        str, typer.Option(help="llava-1.5-7b (shipped), a folder with config.json, or a hub id.")
    ] = "llava-1.5-7b",
    tasks: Annotated[int, typer.Option(min=1, help="Number of tasks to account for.")] = 6,
    r: Rank = 128,
    sub_rank: SubRank = None,
    projector: Projector = True,
    attention: Attention = False,
    as_json: Json = False,
) -> None:
    """Count adapter parameters of a model, by its config alone: no weights are loaded."""
    from lilora.reports.params import account

    accounting = account(model, r=r, sub_rank=sub_rank, projector=projector, attention=attention)
    if as_json:
        print(json.dumps(accounting.to_dict(tasks)))
    else:
        console.print(accounting.table(tasks))


@app.command()
def info(as_json: Json = False) -> None:
    """Versions, devices, and which backends can run here and why others cannot."""
    import torch

    from lilora_kernels.backends import unsupported_reasons

    facts: dict[str, Any] = {**environment(), "cpu build": cpu_build(), **cuda_build(), "backends": {}}
    on_gpu = torch.cuda.is_available()
    x = torch.empty(1, 1, device="cuda", dtype=torch.bfloat16) if on_gpu else torch.empty(1, 1)
    for op in ("delta", "linear", "delta_pair", "rank_gate"):
        facts["backends"][op] = {
            name: "available" if why is None else why for name, why in unsupported_reasons(op, x, 128, 64).items()
        }
    if as_json:
        print(json.dumps(facts))
        return
    table = Table(show_header=False)
    for key, value in facts.items():
        if key not in ("backends", "build_info"):
            table.add_row(key, str(value))
    for op, backends in facts["backends"].items():
        for name, state in backends.items():
            table.add_row(f"{op}: {name}", state)
    console.print(table)


@bank_app.command("ls")
def bank_ls(bank: AnyBank, as_json: Json = False) -> None:
    """List the tasks of a bank with their sizes."""
    from lilora.bank.hub import open_bank

    content = open_bank(bank).describe()
    if as_json:
        print(json.dumps(content))
    else:
        console.print(bank_table(content))


@bank_app.command("export")
def bank_export(
    bank: AnyBank,
    out: NewFolder,
    task: Annotated[
        str | None,
        typer.Option(help="Which task; default: all, each in a folder of its name. Not for methods that need no task."),
    ] = None,
    form: Annotated[
        str,
        typer.Option(
            "--format", help="lora: a plain LoRA, for PEFT, vLLM ...; lilora: an adapter of PEFT with lilora imported."
        ),
    ] = "lora",
    as_json: Json = False,
) -> None:
    """Write tasks as LoRA folders, from the bank alone: no base model is loaded."""
    from lilora.bank.hub import open_bank
    from lilora.continual.publish import FORMATS, export_tasks

    choice("--format", form, FORMATS)
    folders = export_tasks(open_bank(bank), task, out, form)
    if as_json:
        print(json.dumps({"folders": folders}))
        return
    for name, folder in folders.items():
        console_line(f"{name}: {folder}")


@bank_app.command("merge")
def bank_merge(
    bank: AnyBank,
    out: NewFolder,
    task: Annotated[str | None, typer.Option(help="Which task; not for methods that need no task.")] = None,
    model: Annotated[str | None, typer.Option(help="Base model; default: the one the bank was made with.")] = None,
    as_json: Json = False,
) -> None:
    """Write the base model with a task in its weights: a plain HuggingFace model with its processor."""
    from lilora.bank.hub import open_bank
    from lilora.continual.publish import merge_task

    merge_task(open_bank(bank), task, out, model)
    if as_json:
        print(json.dumps({"folder": str(out)}))
    else:
        console_line(f"merged model: {out}")


@bank_app.command("rm")
def bank_rm(
    bank: BankPath, task: Annotated[str, typer.Option(help="Which task to forget.")], as_json: Json = False
) -> None:
    """Remove a task and its scores from a bank; the others keep their ids."""
    from lilora.bank.bank import Bank
    from lilora.continual.publish import write_bank_card
    from lilora.continual.run_folder import remove_task

    opened = Bank.open(bank)
    with opened.writing():
        remove_task(opened, task)
        write_bank_card(opened)
    if as_json:
        print(json.dumps(opened.describe()))
    else:
        console.print(bank_table(opened.describe()))


@bank_app.command("import")
def bank_import(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="lilora, pclr or dac: the method's released code wrote it; or peft."),
    ],
    files: Annotated[
        list[Path],
        typer.Argument(
            help="lilora: lilora_task_bank.bin. pclr: one lrp.bin or lrp_ts.bin. dac: the .pt of each task, peft: the folder "
            "of each LiLoRA adapter, in the order they were learned."
        ),
    ],
    model: Annotated[str, typer.Option(help="The base model that it was trained on: a folder or a hub id.")],
    out: Annotated[Path, typer.Option(help="Folder of the new bank.")],
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Names of the tasks in the order they were learned, comma-separated. Default: task and a number (lilora, "
            "pclr), those of the files (dac) or folders (peft)."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a bank of what other code has learned, for eval and generate; the files are read as plain tensors."""
    from rich.progress import Progress

    from lilora.bank.records import BaseModelId
    from lilora.continual.base_model import load_base
    from lilora.continual.kinds import KINDS
    from lilora.continual.publish import write_bank_card
    from lilora.importers.checkpoint import write_bank
    from lilora.importers.dac import read_dac
    from lilora.importers.lilora import read_lilora
    from lilora.importers.pclr import read_pclr
    from lilora.importers.peft_folder import read_peft
    from lilora.methods import METHODS, make_method

    readers = {"lilora": read_lilora, "pclr": read_pclr, "dac": read_dac, "peft": read_peft}
    choice("SOURCE", source, tuple(readers))
    kind = "classification" if model_config(model).model_type == "clip" else "instruction"
    base, _ = load_base(model, "auto", "cpu", KINDS[kind])
    identity = BaseModelId.of(base, model)
    found = readers[source](files, base, tasks.split(",") if tasks else None)
    method = "lilora" if source == "peft" else source
    settings = {**METHODS[method].presets["released"], **found.settings}
    make_method(method, base, settings)  # refuses what it could not be restored with
    config = {"method": method, "settings": settings, "train": {"dtype": "auto"}, "kind": kind, "model": model}
    with Progress(disable=as_json, transient=True) as progress:
        bank = write_bank(out, config, identity, found.tasks, progress.track)
    write_bank_card(bank)
    content = bank.describe()
    if as_json:
        print(json.dumps({**content, "notes": found.notes}))
        return
    console.print(bank_table(content))
    for note in found.notes:
        console_line(note)


# --- helpers ------------------------------------------------------------------------------------------------------------


def bank_table(content: dict[str, Any]) -> Table:
    """What `Bank.describe` tells, for people."""
    table = Table(
        "id", "task", "parameters", "MiB", "shared factors", title=f"{content['path']} on {content['base_model']['id']}"
    )
    for task in content["tasks"]:
        table.add_row(
            str(task["id"]), task["name"], f"{task['parameters']:,}", f"{task['bytes'] / 2**20:.2f}", task["shared"]
        )
    for shared in content["shared"]:
        table.add_row(
            "", "shared", f"{shared['parameters']:,}", f"{shared['bytes'] / 2**20:.2f}", shared["fingerprint"]
        )
    return table


def console_line(text: str) -> None:
    console.print(text, soft_wrap=True)


def choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{option} {value} is unknown; choose one of {', '.join(choices)}")


def method_settings(
    method: str, preset: str | None, sub_rank: int | None, options: dict[str, Any], further: dict[str, Any]
) -> dict[str, Any]:
    """The settings that `make_method` takes, from the options of `lilora train`."""
    from lilora.methods import METHODS
    from lilora_kernels.layers.lilora import default_sub_rank

    presets = METHODS[method].presets
    if preset is not None:
        if not presets:
            raise UserError(f"--preset {preset}: {method} has no presets; leave it out")
        choice("--preset", preset, tuple(presets))
    preset_settings = presets[preset or next(iter(presets))] if presets else {}
    sizes: dict[str, Any] = {"r": options["r"], "alpha": options["alpha"], "dropout": options["dropout"]}
    if method == "lilora":
        sizes["sub_rank"] = default_sub_rank(options["r"]) if sub_rank is None else sub_rank
    if method in PEFT_LORA:
        sizes = {"r": options["r"], "lora_alpha": options["alpha"], "lora_dropout": options["dropout"]}
    return {**sizes, **preset_settings, **further}


def setting(text: str) -> tuple[str, Any]:
    """A `key=value` of --set; the value is JSON, or else a string."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise UserError(f"--set {text} is not key=value; for example --set cap=256")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def target_pattern(model: str, projector: bool, attention: bool) -> str:
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
    from lilora.continual.task_identification import NearestCentroid

    if not method.needs_task:
        raise UserError(f"{bank.path}: {method.name} needs no task, so there is nothing to route; leave out --routed")
    return NearestCentroid.load(bank, method.model)


def show_routes(results: list, bank, out: Path, as_json: bool) -> None:
    """Scores with the task given and found, how often it was found, and where the samples went, in print and as a plot.

    The plot is made of all tasks of the bank, if they are in the manifest.
    """
    from lilora.reports.report import print_routes, write_routes

    learned = {r.task: r.routes for r in results if r.task in bank.tasks}
    if as_json:
        cells = {}
        for r in results:
            cells[r.task] = {"score": r.given.score, "format_share": r.given.format_share}
            cells[r.task] |= {"routed_score": r.routed.score, "routed_format_share": r.routed.format_share}
            cells[r.task] |= {"routing_accuracy": r.accuracy if r.task in learned else None, "routes": r.routes}
        print(json.dumps(cells))
        if len(learned) == len(bank.tasks):
            write_routes(out, learned)
        return
    table = Table("task", "score", "score, routed", "routed to it")
    for r in results:
        found = f"{r.accuracy:.1f} %" if r.task in learned else ""
        table.add_row(r.task, f"{r.given.score:.1f}", f"{r.routed.score:.1f}", found)
    table.add_section()
    means = [
        sum(values) / len(results) for values in zip(*((r.given.score, r.routed.score) for r in results), strict=True)
    ]
    accuracies = [r.accuracy for r in results if r.task in learned]
    found = f"{sum(accuracies) / len(accuracies):.1f} %" if accuracies else ""
    table.add_row("mean", *(f"{mean:.1f}" for mean in means), found)
    console.print(table)
    print_routes(learned, bank.tasks, console)
    if len(learned) == len(bank.tasks):
        console_line(f"routes: {write_routes(out, learned)}")


def environment() -> dict[str, str]:
    """What the numbers were made with."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {os.cpu_count()} cores"
    packages = ("lilora-kernels", "torch", "triton", "transformers", "peft", "accelerate")
    return {"python": platform.python_version(), **{name: installed(name) for name in packages}, "device": device}


def cpu_build() -> str:
    """The instructions that the CPU kernels use here, or why they are missing."""
    from lilora_kernels.cpu_library import INSTRUCTIONS, load

    kernels = load()
    return kernels if isinstance(kernels, str) else f"loaded, {INSTRUCTIONS[kernels.instructions - 1]}"


def cuda_build() -> dict[str, Any]:
    """What the CUDA kernels were built with, and whether they load and run on the first GPU, in words and as data."""
    import torch

    from lilora_kernels.cuda_library import build_info, load_error
    from lilora_kernels.ops.cuda_runtime import unusable

    built, error = build_info(), load_error()
    if error is None and torch.cuda.is_available():
        error = unusable(torch.device("cuda", 0))
    made = f"CUDA {built['cuda']}, torch {built['torch']}, for {', '.join(built['architectures'])}; "
    state = "loaded" if error is None else error
    return {"cuda build": (made if built["cuda"] else "") + state, "build_info": built}


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
    except Exception as error:
        if not lost_process(error):
            raise
        print_error(
            "another process of this run has ended; run the same command again to go on from the last checkpoint"
        )
        sys.exit(1)
