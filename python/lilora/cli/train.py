"""`lilora train`."""

import json
from collections import Counter
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lilora.errors import UserError, print_error
from lilora_kernels.facts import environment

from .options import (
    Attention,
    Command,
    Data,
    Device,
    Json,
    Likelihood,
    Order,
    Projector,
    SubRank,
    choice,
    say_the_last_counts,
    target_pattern,
)
from .output import adapters_line, console, console_line
from .run_config import config_text, read_config

if TYPE_CHECKING:
    from lilora.continual.manifest import Manifest
    from lilora.continual.run import ContinualRun
    from lilora.continual.run_record import TrainSettings
    from lilora.methods import Method

OF_TRAINING = (
    "weight_decay",
    "batch_size",
    "gradient_accumulation",
    "warmup",
    "max_grad_norm",
    "epochs",
    "max_steps",
    "gradient_checkpointing",
    "dtype",
    "seed",
)  # options that are settings of the training
DEFAULT = "Default: the method's, below."
PRESET = "Default: {}, or what the preset says, below."


class TrainCommand(Command):
    """Its help ends with the methods, as they describe themselves."""

    def format_epilog(self, ctx: typer.Context, formatter: Any) -> None:
        from .method_options import methods_list

        with formatter.section("Methods"):
            formatter.write_dl(methods_list())


def train(
    context: typer.Context,
    tasks: Annotated[
        Path, typer.Argument(metavar="MANIFEST", help="The tasks in YAML, for example examples/digits/tasks.yaml.")
    ],
    config: Annotated[
        Path | None,
        typer.Option(
            callback=read_config,
            is_eager=True,
            help="YAML file of options, such as the run.yaml of a run folder; those of the command win.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Run folder; the same command goes on where it was interrupted. Default: runs/<manifest>-<label>-<seed>."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Base model: a folder or a hub id; default: the manifest's.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            autocompletion=lambda: list(import_module("lilora.methods").METHODS),
            help="How the tasks are trained: one of the methods below.",
        ),
    ] = "lilora",
    preset: Annotated[
        str | None,
        typer.Option(help="Settings by name. Default: the first of the method's, below."),
    ] = None,
    r: Annotated[int | None, typer.Option("--r", min=1, help=f"Rank of the adapters. {DEFAULT}")] = None,
    sub_rank: SubRank = None,
    alpha: Annotated[
        float | None, typer.Option(help="The adapter's output is scaled by alpha / r. Default: the method's, below.")
    ] = None,
    dropout: Annotated[
        float | None, typer.Option(min=0.0, max=0.99, help=f"Dropout on the adapter's input. {DEFAULT}")
    ] = None,
    pairs: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="key=value: any setting of the method, the value as JSON or text; may be given again. A wrong key lists them.",
        ),
    ] = None,
    projector: Projector = None,
    attention: Attention = False,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--lr",
            min=0.0,
            help="Peak learning rate of all tasks, at most 1. Default: the manifest's, or the method's.",
        ),
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(min=0.0, help=DEFAULT)] = None,
    epochs: Annotated[float, typer.Option(min=0.0, help="Passes over each task's training samples.")] = 1.0,
    max_steps: Annotated[int, typer.Option(min=-1, help="Optimizer steps per task; -1: as many as epochs need.")] = -1,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help=f"Samples per batch, of all processes together. {PRESET.format(8)}")
    ] = None,
    gradient_accumulation: Annotated[
        int | None, typer.Option(min=1, help=f"Batches per optimizer step. {PRESET.format(8)}")
    ] = None,
    warmup: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=0.99, help=f"Share of the steps in which the learning rate rises. {PRESET.format(0.03)}"
        ),
    ] = None,
    max_grad_norm: Annotated[
        float | None,
        typer.Option(min=0.0, help=f"Larger gradients are scaled down to this norm; 0: none. {PRESET.format(1.0)}"),
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory for more time.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="Of the base model: auto (as stored), fp32, bf16 or fp16.")] = "auto",
    eval_batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Samples per batch of an evaluation, less where memory runs out. Default: 8 batches of training.",
        ),
    ] = None,
    zero_shot: Annotated[
        bool, typer.Option("--zero-shot", help="Score all tasks before any training too; probes always are.")
    ] = False,
    validate: Annotated[
        bool,
        typer.Option(
            "--validate",
            help="Leave the test splits alone: score the manifest's validation samples or, of a task without, a fifth of its "
            "training samples, at most 500, which are not trained on.",
        ),
    ] = False,
    nll: Likelihood = False,
    save_steps: Annotated[int, typer.Option(min=1, help="Optimizer steps between checkpoints.")] = 200,
    workers: Annotated[int, typer.Option(min=0, help="Processes that prepare training batches.")] = 0,
    report_to: Annotated[
        str, typer.Option(help="Trackers as transformers names them, comma-separated: tensorboard, wandb ...")
    ] = "none",
    task_identifier: Annotated[
        str, typer.Option(help="What finds the task of a sample where none is given.")
    ] = "nearest-centroid",
    image_aspect: Annotated[
        str | None,
        typer.Option(
            help="What the processor is given of images: processor, as they are; pad, squares padded with its mean colour. "
            "Default: the manifest's, or processor."
        ),
    ] = None,
    order: Order = None,
    data: Data = None,
    seed: Annotated[int, typer.Option(min=0, max=4_000_000, help="Of all that is drawn.")] = 0,
    device: Device = "auto",
    label: Annotated[str | None, typer.Option(help="What reports call this run; default: method and preset.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
    as_json: Json = False,
) -> None:
    """Train on tasks one after another, with an evaluation after each.

    The same command goes on where it was interrupted. At the end it writes a report.

    Several processes: accelerate launch --config_file examples/accelerate/ddp.yaml -m lilora train ...
    """
    from lilora.continual.manifest import load_manifest
    from lilora.methods import METHODS

    method_type = METHODS.find(method, "--method")
    choice("--dtype", dtype, ("auto", "fp32", "bf16", "fp16"))
    if image_aspect is not None:
        choice("--image-aspect", image_aspect, ("processor", "pad"))
    manifest = load_manifest(tasks, None if order is None else order.split(","), data, validate)
    model = model or manifest.model
    if model is None:
        raise UserError(f"{tasks} names no base model; pass --model with a folder or a hub id")
    from transformers.utils.logging import disable_progress_bar

    from lilora.continual import processes
    from lilora.continual.run import ContinualRun
    from lilora.continual.run_folder import method_label
    from lilora.continual.trainer import trackers_of

    trackers = trackers_of(report_to)
    settings = _settings(context.params, method_type, model)
    training = _training(context.params, method_type, manifest)
    out = out or Path("runs") / f"{manifest.name}-{label or method_label(method, settings)}-{seed}"
    first = processes.rank() == 0
    console.quiet = not first
    bars = first and not (quiet or as_json)
    if not bars:
        disable_progress_bar()
    opened = ContinualRun.open(
        out, manifest, model, method, settings, training, device, label, task_identifier, image_aspect
    )
    with closing(opened) as run:
        if first:
            _write_options(context, run, method_type)
        say = (lambda line: None) if as_json else console_line
        if method_type.trains_on != "nothing":
            say(adapters_line(settings["target_modules"]))
        try:
            run.train(eval_batch_size, save_steps, workers, bars, say, trackers, zero_shot, nll)
        except KeyboardInterrupt:
            print_error(f"{out}: interrupted; the same command goes on with this run")
            raise
        processes.destroy()
        if first:
            _report(run, as_json)


def _settings(options: dict[str, Any], method: "type[Method]", model: str) -> dict[str, Any]:
    """The settings of a method, from the options as typer names their parameters."""
    from .method_options import method_settings, setting

    pairs = [setting(text) for text in options["pairs"] or []]
    more = dict(pairs)
    for key, times in Counter(key for key, _ in pairs).items():
        if times > 1:
            say_the_last_counts(f"--set {key}", times, more[key])
    more["target_modules"] = more.get("target_modules") or target_pattern(
        model, options["projector"], options["attention"]
    )
    sizes = {name: options[name] for name in ("r", "sub_rank", "alpha", "dropout")}
    return method_settings(method, options["preset"], given(sizes), more)


def _training(options: dict[str, Any], method: "type[Method]", manifest: "Manifest") -> "TrainSettings":
    """How is trained, with the learning rate of each task; UserError where a method cannot have several."""
    from lilora.continual.run_record import TrainSettings

    from .method_options import train_options

    of_training = given({name: options[name] for name in OF_TRAINING})
    training = TrainSettings.of(train_options(method, options["preset"], of_training))
    rate, rates = manifest.learning_rates(method.name, training.learning_rate)
    if options["learning_rate"] is not None:
        rate, rates = options["learning_rate"], {}
    training = TrainSettings.of(training.model_dump() | {"learning_rate": rate, "learning_rates": rates})
    of_tasks = {training.rate_of(task.name) for task in manifest.tasks}
    if method.trains_on == "all" and len(of_tasks) > 1:
        raise UserError(
            f"--method {method.name} trains on all tasks together, and the manifest has learning rates from "
            f"{min(of_tasks):g} to {max(of_tasks):g} for them; give one with --lr"
        )
    return training


def _write_options(context: typer.Context, run: "ContinualRun", method: "type[Method]") -> None:
    """Write run.yaml: the options as given, and what became of those that were not."""
    from lilora.bank.atomic import write_atomically

    from .method_options import setting

    options, config, training = context.params, run.bank.config, run.settings
    of_method = {option: config["settings"][name] for option, name in method.settings_type.options().items()}
    resolved = {option.replace("_", "-"): value for option, value in of_method.items()} | {
        "tasks": options["tasks"].resolve(),
        "out": run.folder.resolve(),
        "data": options["data"] and options["data"].resolve(),
        "model": config["model"],
        "preset": options["preset"] or next(iter(method.presets), None),
        # Where the manifest has rates it says them again: the command's would be that of all tasks.
        "lr": training.learning_rate if not run.manifest.rates else options["learning_rate"],
        **{name.replace("_", "-"): getattr(training, name) for name in OF_TRAINING},
        "set": dict(map(setting, options["pairs"] or [])),
    }
    write_atomically(run.folder / "run.yaml", config_text(context, resolved).encode())


def _report(run: "ContinualRun", as_json: bool) -> None:
    """Write the report of a run that has ended and the bank's card, and print its tables."""
    from lilora.continual.publish import write_bank_card
    from lilora.reports.report import print_tables, write_report

    result = run.result()
    page = write_report(run.folder, [result], f"{result.method} on {run.manifest.name}", environment())
    write_bank_card(run.bank)
    if as_json:
        print(json.dumps(result.to_dict()))
    else:
        print_tables([result], console)
        console_line(f"report: {page}")


def given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
