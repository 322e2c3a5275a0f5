"""What a run's folder holds: whether a run may go on there, what its report wants, a task taken out."""

import json
from collections.abc import Sequence
from itertools import count
from math import prod
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from lilora.bank.bank import Bank
from lilora.bank.index import BaseModelId
from lilora.errors import UserError, print_note
from lilora.families import same_layers
from lilora.importers.checkpoint import flat
from lilora.methods import METHODS
from lilora.reports.runs import Run
from lilora.reports.scores import ScoreMatrix

from .run_record import train_settings
from .task_identification import NearestCentroid

FREE = ("label", "train.gradient_checkpointing")  # settings that change nothing of what is trained
_INSTEAD = {"train.learning_rate": ", where a task to come may have a learning_rate of its own in the manifest"}
_SPLIT = ("train.batch_size", "train.gradient_accumulation")
_RATES = "train.learning_rates."  # the task follows
_BEFORE = {
    "kind": "instruction",
    "image_aspect": "processor",
    "label_space": "task",
    "scored_on": "test",
    "task_identifier": NearestCentroid.name,
    "train.max_grad_norm": 1.0,
}  # what banks do not say, of earlier versions or at all


def check_folder(folder: Path, config: dict[str, Any], tasks: Sequence[str], splits: bool) -> Bank | None:
    """The bank of the run in `folder` if one with this config may go on there; None if the folder is new.

    FREE settings may have changed, and where nothing depends on how the samples of a step are divided into batches
    (`splits`) that division too; a task's learning rate until it is trained; others until the first task is.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file; give a new or empty folder")
    if not folder.exists() or not any(folder.iterdir()):
        return None
    if not (folder / "bank" / "bank.json").exists() and not (
        {entry.name for entry in folder.iterdir()} <= {"bank"} and not any((folder / "bank").glob("*.safetensors"))
    ):
        raise UserError(f"--out {folder} holds other files and no run; give a new or empty folder")
    if not (folder / "bank" / "bank.json").exists():
        return None
    bank = Bank.open(folder / "bank")
    train_settings(bank)
    for key, (old, new) in _changes(bank.config, config, splits).items() if bank.tasks else ():
        if key.startswith(_RATES) and key.removeprefix(_RATES) not in bank.tasks:
            continue
        raise UserError(
            f"--out {folder} holds another run: its {key} is {old!r} and this one's is {new!r}; "
            f"give another folder, or the same settings to go on with it{_INSTEAD.get(key, '')}"
        )
    if bank.tasks != list(tasks[: len(bank.tasks)]):
        raise UserError(
            f"--out {folder} holds another run: it has trained {', '.join(bank.tasks)}, which is no beginning of "
            f"{', '.join(tasks)}; give another folder or the same order"
        )
    return bank


def take_settings(folder: Path, bank: Bank, config: dict[str, Any], base_model: BaseModelId, splits: bool) -> Bank:
    """The bank of the run in `folder`, which `check_folder` has passed, with this config.

    Checkpoints of a task that was not trained to its end, with other settings, are put aside.
    """
    changes = _changes(bank.config, config, splits)
    what = f"{folder} starts anew, as its first task is not trained yet"
    if bank.tasks:  # and rates of tasks to come alone may differ
        changes = {
            key: pair for key, pair in changes.items() if (folder / "checkpoints" / key.removeprefix(_RATES)).exists()
        }
        what = f"{folder}: {', '.join(key.removeprefix(_RATES) for key in changes)} starts anew"
    if changes:
        said = ", ".join(f"{key} is {new!r} and was {old!r}" for key, (old, new) in changes.items())
        aside = ""
        if any((folder / "checkpoints").glob("*/*/checkpoint-*")):
            free = next(path for number in count(1) if not (path := folder / f"checkpoints-{number}").exists())
            (folder / "checkpoints").rename(free)
            aside = f"; the checkpoints made before are in {free}"
        print_note(f"{what}: {said}{aside}")
        if not bank.tasks:
            bank.set_config(config, base_model)
            if bank.scores:  # of the base model
                bank.set_scores({})
    bank.check_base_model(base_model)
    free = {key: value for key, value in bank.config.items() if key != "label"}
    free |= {key: config[key] for key in ("train", "label") if key in config}
    if free != bank.config:
        bank.set_config(free)
    return bank


def _changes(old: dict[str, Any], new: dict[str, Any], splits: bool) -> dict[str, tuple[Any, Any]]:
    """Setting -> (what it was, what it is), of those that matter to what is trained."""
    old, new = (_BEFORE | flat(config) for config in (old, json.loads(json.dumps(new))))

    def value(config: dict[str, Any], key: str) -> Any:
        return config.get(key, config.get("train.learning_rate") if key.startswith(_RATES) else None)

    changed = {key: (value(old, key), value(new, key)) for key in sorted(old.keys() | new.keys()) if key not in FREE}
    changed = {key: pair for key, pair in changed.items() if pair[0] != pair[1]}
    if old.get("label_space") == "all" and "classes_of" not in old:  # of an earlier version
        changed.pop("classes_of", None)
    if splits and prod(old.get(key, 0) for key in _SPLIT) == prod(new.get(key, 0) for key in _SPLIT):
        changed = {key: pair for key, pair in changed.items() if key not in _SPLIT}
    targets = changed.get("settings.target_modules")
    if targets is not None and old.get("model") == new.get("model") and _same_targets(new["model"], *targets):
        del changed["settings.target_modules"]
    return changed


def _same_targets(model: str, one: Any, other: Any) -> bool:
    """Whether two settings name the same layers; earlier versions wrote other patterns."""
    if one == other or not (isinstance(one, str) and isinstance(other, str)):
        return one == other
    return same_layers(AutoConfig.from_pretrained(model), one, other)


def run_of(bank: Bank) -> Run:
    """What a bank says of its run, without a model; UserError before there are scores."""
    settings = train_settings(bank)
    if not (bank.scores and bank.tasks):  # scores of the base model may be there before any task
        raise UserError(f"{bank.path} holds no scores of a trained task yet; run lilora train to its end")
    infos = [task["info"] for task in bank.describe()["tasks"]]
    per_task = sizes = None
    told = [(info.get("parameters"), info.get("ranks")) for info in infos]
    if all(None not in pair for pair in told):  # banks of earlier versions do not say
        sizes = {name: [info[name] for info in infos] for name in ("parameters", "ranks")}
        first, last = sizes["parameters"][0], sizes["parameters"][-1]
        per_task = round((last - first) / (len(infos) - 1)) if len(infos) > 1 else first
    return Run(
        label_of(bank),
        settings.seed,
        ScoreMatrix.from_dict(bank.scores["matrix"]),
        per_task,
        sum(bank.scores["seconds"].values()),
        {
            key: bank.config[key]
            for key in ("model", "manifest", "label_space", "scored_on", "settings", "train")
            if key in bank.config
        }
        | {"sizes": sizes},
        {task["name"]: task["info"].get("losses", {}) for task in bank.describe()["tasks"]},
        bank.scores.get("zero_shot", {}),
        bank.scores.get("probes", {}),
    )


def remove_task(bank: Bank, name: str) -> None:
    """Take a task out of a bank, and out of its scores.

    Raises:
        UserError: an unknown task, or one that others are built upon.
    """
    with bank.writing():
        train_settings(bank)
        _remove_task(bank, name)


def _remove_task(bank: Bank, name: str) -> None:
    method, others = METHODS[bank.config["method"]], [task for task in bank.tasks if task != name]
    bank.task_fingerprint(name)  # refuses an unknown task
    if method.one_state and others:
        raise UserError(
            f"{method.name} keeps all tasks in one state, and {name!r} cannot be taken out; remove the bank"
        )
    if not method.needs_task and name != bank.tasks[-1]:
        raise UserError(
            f"{method.name} has trained {bank.tasks[-1]!r} on top of {name!r}; remove the newest task first"
        )
    if bank.scores:  # first: a task without scores is evaluated again, scores without their task would stay
        later = bank.tasks[bank.tasks.index(name) + 1 :] if bank.config.get("label_space") == "seen" else []
        if later:
            print_note(
                f"{bank.path}: the scores after {', '.join(later)} are taken out too: images were placed among the classes of "
                f"{name!r} there"
            )
        matrix = ScoreMatrix.from_dict(bank.scores["matrix"]).without(name, later)
        state = {key: {k: v for k, v in values.items() if k != name} for key, values in bank.scores.items()}
        state["functions"] = state.get("functions", {}) | {stage: {} for stage in later}
        bank.set_scores(state | {"matrix": matrix.to_dict()} if matrix else {})
    bank.remove_task(name)


def label_of(bank: Bank) -> str:
    return bank.config.get("label") or method_label(bank.config["method"], bank.config["settings"])


def method_label(method: str, settings: dict[str, Any]) -> str:
    """What the report calls a run by default: its method, and the preset whose settings it has beside the sizes."""
    presets, sizes = METHODS[method].presets, {"target_modules", *METHODS[method].settings_type.options().values()}
    if not presets:
        return method
    chosen = {name: value for name, value in settings.items() if name not in sizes}
    named = (
        name
        for name, values in presets.items()
        if json.dumps(values, sort_keys=True) == json.dumps(chosen, sort_keys=True)
    )
    return f"{method}-{next(named, 'custom')}"
