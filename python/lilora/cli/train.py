"""`lilora train`."""

import json
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from lilora.errors import UserError

from .facts import environment
from .options import Attention, Data, Device, Json, Order, Projector, SubRank, choice, target_pattern
from .output import console, console_line

DEFAULT = "Default: that of the method's paper."


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
    pairs: Annotated[
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

    from .method_options import method_settings, setting

    method_type = METHODS.find(method, "--method")
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

    more = dict(map(setting, pairs or []))
    more["target_modules"] = more.get("target_modules") or target_pattern(model, projector, attention)
    sizes = {"r": r, "sub_rank": sub_rank, "alpha": alpha, "dropout": dropout}
    settings = method_settings(method_type, preset, given(sizes), more)
    training = TrainSettings.of(
        {
            **method_type.train_defaults,
            **given({"learning_rate": learning_rate, "weight_decay": weight_decay}),
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
        run.train(eval_batch_size, save_steps, workers, bars, (lambda line: None) if as_json else console_line)
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


def given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
