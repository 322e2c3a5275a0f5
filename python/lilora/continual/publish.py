"""What leaves a bank: tasks as LoRA folders, merged models, and the model cards of these and of the bank itself."""

import json
from pathlib import Path

from lilora.bank.atomic import new_folder
from lilora.bank.bank import Bank
from lilora.bank.export import lora_use, write_lora
from lilora.bank.hub import write_card
from lilora.bank.index import BaseModelId
from lilora.errors import UserError
from lilora.importers.peft_folder import write_peft
from lilora.methods import METHODS
from lilora.reports.runs import VALIDATION
from lilora.reports.scores import ScoreMatrix

from .base_model import load_base
from .collator import Collator
from .kinds import kind_of
from .run_record import image_aspect_of, train_settings
from .vision import exported_head, own_head

FORMATS = ("lora", "lilora")


def export_tasks(bank: Bank, task: str | None, out: Path, form: str = "lora") -> dict[str, str]:
    """Write a task of a bank, or a folder for each of them, into the new or empty folder `out`: task -> its folder.

    form: "lora", a plain LoRA; or "lilora", PEFT's folder of a LiLoRA adapter with its shared factors. The base model is
    not needed. Where inference needs no task one LoRA serves all of them; it lies in `out` itself.

    Raises:
        UserError: an unknown task, a method whose tasks are no LoRA, a damaged bank, or a folder in use.
    """
    train_settings(bank)
    method = METHODS[bank.config["method"]]
    if form == "lilora" and not method.peft_adapters:
        raise UserError(
            f"--format lilora: tasks of {method.name}, as in {bank.path}, are no adapters of PEFT's LILORA; use lora"
        )
    kind = kind_of(bank.config)
    if form == "lilora" and kind.heads:
        raise UserError(
            f"--format lilora: tasks of {bank.path} have classifiers of their own, which it does not hold; use lora"
        )
    one = task is not None or not kind.needs_task(method)
    names = [chosen_task(bank, task)] if one else bank.tasks
    base, auto_class = bank.base_model.id, kind.auto_class
    ids = {record["name"]: record["id"] for record in bank.describe()["tasks"]}
    with new_folder(out) as folder:
        for name in names:
            place = folder if one else folder / name
            place.mkdir(exist_ok=True)
            about = f"{what_of(bank, name)}, as a "
            if form == "lora":
                head, options = exported_head(bank, name) if kind.heads else ({}, "")
                write_lora(place, method.as_lora(bank, name), base, saved=head)
                about, use = f"{about}plain LoRA.", lora_use(base, auto_class, options=options)
            else:
                (own, _), (_, shared) = bank.load_task(name), bank.load_task(bank.tasks[-1])
                first = ids[name] == 0
                write_peft(place, own, shared, bank.config["settings"], base, first)
                about += "LiLoRA adapter of PEFT, with the factors that it shares with other tasks."
                use = lora_use(base, auto_class, "import lilora  # teaches PEFT the method")
            card(place, bank, name, about, use, library="peft", tags=["lora"])
    return {name: str(out if one else out / name) for name in names}


def merge_task(bank: Bank, task: str | None, out: Path, model: str | None = None) -> None:
    """Write the base model with a task in its weights, and its processor, into the new or empty folder `out`.

    One model is in memory, on the CPU, in the dtype that it was trained in; a weight is rounded once, from fp32. Its
    generation stops at the token that the tasks learned to end answers with, too.

    Raises:
        UserError: an unknown task, a method that cannot be merged, another base model, or a folder in use.
    """
    settings = train_settings(bank)
    name, method = chosen_task(bank, task), METHODS[bank.config["method"]]
    with new_folder(out) as folder:
        model = model or bank.base_model.id
        base, processor = load_base(model, settings.dtype, "cpu", kind_of(bank.config))
        bank.check_base_model(BaseModelId.of(base, model))
        try:
            method.merge(base, bank, name)
        except AttributeError as error:  # a linear that the base model does not have
            raise UserError(
                f"{bank.path} adapts what {model} does not have ({error}); restore it from a copy"
            ) from error
        if kind_of(bank.config).heads:
            own_head(base, bank, name)
        if kind_of(bank.config).answers:
            stops = Collator(processor, {}, train=False).stops(base)
            base.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]
        architectures = base.config.architectures
        base.save_pretrained(folder)
        base.config.architectures = architectures  # some are loaded as a class of ours
        base.config.save_pretrained(folder)
        processor.save_pretrained(folder)
        loader = kind_of(bank.config).auto_class
        use = (
            "```python\n"
            f"from transformers import {loader}\n\n"
            f'model = {loader}.from_pretrained("FOLDER-OR-REPOSITORY")\n'
            "```"
        )
        about = f"{what_of(bank, name)}, in the weights of a plain model."
        card(folder, bank, name, about, use, library="transformers", tags=[], relation="finetune")


def what_of(bank: Bank, task: str) -> str:
    of = f"task `{task}`" if _needs_task(bank) else "all its tasks"
    return f"What `{bank.base_model.id}` has learned of {of} with `{bank.config['method']}`"


def chosen_task(bank: Bank, task: str | None) -> str:
    """The task asked for, or the newest of a method whose inference needs none; UserError for none or an unknown one."""
    if not bank.tasks:
        raise UserError(f"{bank.path} holds no trained task yet; train first")
    if task is None and _needs_task(bank):
        raise UserError(f"--task is missing; {bank.path} has {', '.join(bank.tasks)}")
    if task is not None and not _needs_task(bank):
        raise UserError(
            f"--task {task}: with method {bank.config['method']} one state serves all tasks, the newest; leave --task out"
        )
    if task is not None and task not in bank.tasks:
        raise UserError(f"task {task!r} is unknown; {bank.path} has {', '.join(bank.tasks)}")
    return task or bank.tasks[-1]


def _needs_task(bank: Bank) -> bool:
    return kind_of(bank.config).needs_task(METHODS[bank.config["method"]])


def write_bank_card(bank: Bank) -> None:
    """README.md of the bank's own folder, so that the folder can be uploaded as it is."""
    task = f" --task {bank.tasks[-1]}" if _needs_task(bank) and bank.tasks else ""
    command = f'generate FOLDER-OR-REPOSITORY{task} --image FILE --prompt "..."'
    if not kind_of(bank.config).answers:
        command = "eval FOLDER-OR-REPOSITORY --tasks MANIFEST.yaml"
    use = f'```bash\npip install ".[hf]"  # in a checkout of lilora-kernels\nlilora {command} --model {bank.base_model.id}\n```'
    about = (
        f"A bank of {len(bank.tasks)} task(s) that `{bank.base_model.id}` has learned one after another with "
        f"`{bank.config['method']}`. The base model is not part of it."
    )
    path = bank.path.absolute()
    title = path.parent.name if path.name == "bank" else path.name  # a run's bank lies in the run's folder
    card(bank.path, bank, title, about, use, library="lilora-kernels", tags=[])


def card(
    folder: Path,
    bank: Bank,
    title: str,
    about: str,
    use: str,
    *,
    library: str,
    tags: list[str],
    relation: str = "adapter",
) -> None:
    rows = [f"| {t['name']} | {t['parameters']:,} | {t['shared']} |" for t in bank.describe()["tasks"]]
    if image_aspect_of(bank.config) == "pad":
        about += " Images are to be padded to squares with the mean colour of the base model's image processor."
    told = {key: bank.config[key] for key in ("method", "settings", "train") if key in bank.config}
    sections = {
        "About": about,
        "Use": use,
        "Tasks": "\n".join(["| task | parameters of its own | shared factors |", "|---|--:|---|", *rows]),
    }
    matrix = ScoreMatrix.from_dict(bank.scores["matrix"]) if bank.scores else None
    if matrix is not None and matrix.columns:
        sections["Scores"] = f"{matrix.markdown()}\n\nPoints from 0 to 100."
        if bank.config.get("scored_on") == "validation":
            sections["Scores"] += f" They are {VALIDATION}."
    sections["Settings"] = f"```json\n{json.dumps(told, indent=2)}\n```"
    write_card(
        folder,
        title,
        base_model=bank.base_model.id,
        library=library,
        tags=sorted({bank.config["method"], "continual-learning", "lilora", *tags}),
        sections=sections,
        relation=relation,
        pipeline=kind_of(bank.config).pipeline,
    )
