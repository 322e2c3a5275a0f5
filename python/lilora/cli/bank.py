"""`lilora bank`: its commands."""

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import AnyBank, App, BankPath, Base, Json, NewFolder, choice, model_config
from .output import console, console_line, plain_table

app = App(no_args_is_help=True, help="List, import, export, merge and remove tasks of a bank.")


@app.command("ls")
def ls(bank: AnyBank, as_json: Json = False) -> None:
    """List the tasks of a bank with their sizes."""
    from lilora.bank.hub import open_bank

    content = open_bank(bank).describe()
    if as_json:
        print(json.dumps(content))
    else:
        print_bank(content)


@app.command("export")
def export(
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
    """Write tasks as LoRA folders, without the base model."""
    from lilora.bank.hub import open_bank
    from lilora.continual.publish import FORMATS, export_tasks

    choice("--format", form, FORMATS)
    folders = export_tasks(open_bank(bank), task, out, form)
    if as_json:
        print(json.dumps({"folders": folders}))
        return
    for name, folder in folders.items():
        console_line(f"{name}: {folder}")


@app.command("merge")
def merge(
    bank: AnyBank,
    out: NewFolder,
    task: Annotated[str | None, typer.Option(help="Which task; not for methods that need no task.")] = None,
    model: Base = None,
    as_json: Json = False,
) -> None:
    """Write the base model with a task in its weights.

    A plain HuggingFace model with its processor.
    """
    from lilora.bank.hub import open_bank
    from lilora.continual.publish import merge_task

    merge_task(open_bank(bank), task, out, model)
    if as_json:
        print(json.dumps({"folder": str(out)}))
    else:
        console_line(f"merged model: {out}")


@app.command("rm")
def rm(bank: BankPath, task: Annotated[str, typer.Option(help="Which task.")], as_json: Json = False) -> None:
    """Remove a task and its scores; the others keep their ids."""
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
        print_bank(opened.describe())


@app.command("import")
def import_(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="lilora, pclr or dac: the method's released code wrote it; or peft."),
    ],
    files: Annotated[
        list[Path],
        typer.Argument(
            help="lilora: lilora_task_bank.bin. pclr: one lrp.bin or lrp_ts.bin. dac: the .pt of each task, peft: the folder "
            "of each LiLoRA adapter, in the order of training."
        ),
    ],
    model: Annotated[str, typer.Option(help="The base model that it was trained on: a folder or a hub id.")],
    out: Annotated[Path, typer.Option(help="Folder of the new bank.")],
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Names of the tasks in the order of training, comma-separated. Default: task and a number (lilora, "
            "pclr), those of the files (dac) or folders (peft)."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a bank of what other code has trained.

    For eval and generate; the files are read as plain tensors.
    """
    from rich.progress import track

    from lilora.continual.imported import SOURCES, import_bank

    choice("SOURCE", source, tuple(SOURCES))
    names = tasks.split(",") if tasks else None
    bar = partial(track, disable=as_json, transient=True)
    bank, notes = import_bank(SOURCES[source], files, model, model_config(model), out, names, bar)
    content = bank.describe()
    if as_json:
        print(json.dumps({**content, "notes": notes}))
        return
    print_bank(content)
    for note in notes:
        console_line(note)


def print_bank(content: dict[str, Any]) -> None:
    """What `Bank.describe` tells, for people: a line per task, and per set of shared factors."""
    console_line(f"{content['path']} on {content['base_model']['id']}: {len(content['tasks'])} task(s)")
    table = plain_table(["id", "task", "shared factors"], ["parameters", "MiB"])
    for task in content["tasks"]:
        table.add_row(str(task["id"]), task["name"], task["shared"], *_sizes(task))
    table.add_section()
    for shared in content["shared"]:
        table.add_row("", "shared", shared["fingerprint"], *_sizes(shared))
    together = [*content["tasks"], *content["shared"]]
    total = {name: sum(part[name] for part in together) for name in ("parameters", "bytes")}
    table.add_row("", "all", "", *_sizes(total))
    console.print(table)


def _sizes(part: dict[str, Any]) -> tuple[str, str]:
    return f"{part['parameters']:,}", f"{part['bytes'] / 2**20:.2f}"
