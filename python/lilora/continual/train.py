"""Learns all tasks of a manifest, evaluates after each, and goes on where it was interrupted."""

import gc
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerState, TrainingArguments, set_seed

from lilora_kernels.adapted import is_sharded

from ..errors import UserError, note
from ..io.atomic import write_atomically
from ..io.bank import Bank, BaseModelId
from ..io.checkpoint import flat
from ..io.lock import locked
from ..layer import unwrapped
from ..methods import METHODS, Method, Stage, make_method
from ..methods.base import digest
from ..model import whole
from . import processes
from .checkpoints import PROGRESS, STATE, TENSORS, latest_checkpoint, sync
from .kinds import KINDS, Collate, Kind
from .recorded import TrainSettings, check_label, train_settings
from .report import Run
from .router import SAMPLES, NearestCentroid
from .scores import ScoreMatrix
from .tasks import InstructionDataset, Manifest

DTYPES = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_base(model: str, dtype: str, device: str, kind: Kind) -> tuple[torch.nn.Module, Any]:
    """Base model and processor from a folder or a hub id; UserError in one sentence when that fails."""
    place = pick_device(device)
    try:
        base, processor = kind.load(model, DTYPES[dtype])
    except UserError:
        raise
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--model {model}: cannot be loaded ({reason}); give a model folder or a hub id") from error
    return base.to(place).requires_grad_(False), processor


def restore(method: Method, bank: Bank) -> None:
    """Put the tasks of a bank into a new method; UserError if its tensors are not those that its settings make."""
    tasks = bank.load_tasks()
    try:
        method.restore(tasks)
    except (UserError, torch.OutOfMemoryError):
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{bank.path} holds other tensors than its settings make ({type(error).__name__}: {error}); restore it from a copy"
        ) from error


def pick_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"--device {device} is unknown; use auto, cpu, cuda or cuda:N") from error
    if chosen.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device} is not supported; use auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {device}: this torch sees no CUDA device; use --device cpu or a CUDA build of torch")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {device}: this machine has {torch.cuda.device_count()} CUDA device(s), from cuda:0 on"
        )
    return chosen


class ContinualRun:
    """A run folder: the bank, checkpoints of the task being learned, predictions.

    `bank/` is described in io/bank.py; `checkpoints/<task>/` are the Trainer's; `predictions/<after>-<task>.jsonl` hold
    every answer of every evaluation. Of several processes the first one writes; all must see the folder. From `open` to
    `close` no other run writes there, and no other process to the bank.
    """

    def __init__(self, folder: Path, manifest: Manifest, method: Method, processor, bank: Bank) -> None:
        self.folder, self.manifest, self.method, self.processor, self.bank = folder, manifest, method, processor, bank
        self.kind = KINDS[manifest.kind]
        self.settings = train_settings(bank)
        self.matrix = ScoreMatrix([task.name for task in manifest.tasks], self.kind.unseen)
        self.state: dict[str, Any] = {"functions": {}, "seconds": {}}
        if bank.scores:
            self.state = {key: bank.scores[key] for key in ("functions", "seconds")}
            self._take_cells(ScoreMatrix.from_dict(bank.scores["matrix"]))
        for task in bank.describe()["tasks"]:  # learned by a run that ended before its scores were written
            self.state["seconds"].setdefault(task["name"], task["info"].get("seconds") or 0.0)

    @classmethod
    def open(
        cls,
        folder: Path,
        manifest: Manifest,
        model: str,
        method: str,
        method_settings: dict[str, Any],
        train: TrainSettings,
        device: str = "auto",
        label: str | None = None,
    ) -> "ContinualRun":
        """Start a run, or go on with the one in `folder` if it was started in the same way.

        Raises UserError when the folder holds something else, another process writes there, or the base model cannot be
        loaded.
        """
        config = {
            "method": method,
            "settings": method_settings,
            "train": train.model_dump(),
            "manifest": manifest.name,
            "kind": manifest.kind,
            "model": model,
        } | ({"label": label} if label else {})
        check_label(label)
        kind = KINDS[manifest.kind]
        kind.check_method(method)
        METHODS[method].read_settings(method_settings)
        check_processes(METHODS[method], kind, train.batch_size)
        if processes.sharded():
            require_images_alike(manifest)
        processes.join(pick_device(device))
        names = [task.name for task in manifest.tasks]
        with ExitStack() as held:

            def lock_and_check() -> Bank | None:
                if not folder.exists() or folder.is_dir():
                    held.enter_context(locked(folder / "bank"))
                return check_folder(folder, config, names)

            existing = processes.by_first(lock_and_check)
            if pick_device(device).index:
                raise UserError(f"--device {device}: training takes the first device; choose with CUDA_VISIBLE_DEVICES")
            base, processor = load_base(model, train.dtype, device, kind)
            for task in manifest.tasks:
                kind.check(task, processor)
            identity = BaseModelId.of(base, model)
            processes.check_same("the base model", lambda: identity.fingerprint)
            learner = make_method(method, base, method_settings)
            if existing is None:
                existing = processes.by_first(lambda: Bank.create(folder / "bank", config=config, base_model=identity))
            existing.check_base_model(identity)
            restore(learner, existing)
            run = cls(folder, manifest, learner, processor, existing)
            run._held = held.pop_all()
        return run

    _held = ExitStack()  # the lock of the run's bank, in the first process

    def close(self) -> None:
        """Let other processes write into the run's folder."""
        self._held.close()

    def train(
        self,
        evaluation_batch: int = 64,
        save_steps: int = 200,
        workers: int = 0,
        bars: bool = True,
        say: Callable[[str], None] = print,
    ) -> ScoreMatrix:
        """Learn and evaluate what is left to do; returns the score matrix. `say` gets a line after each task."""
        for index, spec in enumerate(self.manifest.tasks):
            if spec.name not in self.bank.tasks:
                self._learn(index, spec, save_steps, workers, bars)
                if processes.sharded():
                    self._reload()
            if self.method.needs_task and spec.name not in self.bank.routed:
                self._learn_route(spec, say)
            if processes.rank() == 0:
                shutil.rmtree(self.folder / "checkpoints" / spec.name, ignore_errors=True)
            with Progress(disable=not bars) as progress:
                if self._evaluate(index, evaluation_batch, progress):
                    seen = [task.name for task in self.manifest.tasks[: index + 1]]
                    mean = sum(self.matrix.get(spec.name, task) for task in seen) / len(seen)
                    say(
                        f"{label_of(self.bank)}: task {index + 1} of {len(self.manifest.tasks)}, {spec.name}, learned in "
                        f"{self.state['seconds'][spec.name]:.0f} s: {self.matrix.get(spec.name, spec.name):.1f} points; "
                        f"mean over the tasks so far {mean:.1f}"
                    )
        return self.matrix

    def result(self) -> Run:
        """The run as the report wants it."""
        return run_of(self.bank)

    # --- learning ---------------------------------------------------------------------------------------------------

    def _learn(self, index: int, spec: Any, save_steps: int, workers: int, bars: bool) -> None:
        started = time.monotonic()
        for number, stage in enumerate(self.method.stages(spec.name)):
            seed = 1000 * self.settings.seed + index + 500 * number  # of this stage alone: a resumed run draws the same
            set_seed(seed)
            trainer = self._train_stage(spec, stage, seed, save_steps, workers, bars)
        own, shared = ({k: whole(t) for k, t in tensors.items()} for tensors in self.method.tensors(spec.name))
        if not all(torch.isfinite(tensor).all() for tensor in (*own.values(), *shared.values())):
            raise UserError(
                f"task {spec.name!r} diverged: its parameters are not finite; start again with a lower --lr"
            )
        seconds = self.state["seconds"][spec.name] = round(time.monotonic() - started, 1)
        loss = next((log["train_loss"] for log in reversed(trainer.state.log_history) if "train_loss" in log), None)
        if loss is not None:  # the Trainer reduces but the losses that it has logged
            loss = sum(processes.gathered(loss)) / processes.count()
        info = {"steps": trainer.state.global_step, "loss": loss, "seconds": seconds}
        info |= {"parameters": self.method.parameters(), "ranks": self.method.ranks()}
        processes.check_same(f"task {spec.name!r} as learned", lambda: digest(own | shared))
        self._write(lambda bank: bank.add_task(spec.name, own, shared, info=info, replaces=self.method.one_state))

    def _write(self, change: Callable[[Bank], None]) -> None:
        """Change the bank, in the first process; all have it afterwards."""

        def changed() -> Bank:
            change(self.bank)
            return self.bank

        self.bank = processes.by_first(changed)

    def _reload(self) -> None:
        """The method anew, from the base model and the bank: a sharded model takes no further tasks."""
        device, config = str(self.method.base.device), self.bank.config
        self.method = None
        gc.collect()  # there may not be room for both
        base, _ = load_base(config["model"], self.settings.dtype, device, self.kind)
        self.method = make_method(config["method"], base, config["settings"])
        restore(self.method, self.bank)

    def _learn_route(self, spec: Any, say: Callable[[str], None]) -> None:
        data = StageData(*self.kind.training_data(spec, self.processor), self.settings.batch_size)
        try:
            learned = NearestCentroid(self.method.base).learn(spec.name, data.batches(SAMPLES, self.method.base))
        except ValueError as error:  # of this model or these samples; all else goes without
            say(f"{spec.name}: the bank cannot find this task by itself ({error})")
            return
        self._write(lambda bank: bank.set_router(spec.name, learned))

    def _train_stage(
        self, learned: Any, stage: Stage, seed: int, save_steps: int, workers: int, bars: bool
    ) -> "TaskTrainer":
        spec = next(task for task in self.manifest.tasks if task.name == stage.task)
        folder = self.folder / "checkpoints" / learned.name / stage.name
        data = StageData(*self.kind.training_data(spec, self.processor), self.settings.batch_size)

        def batches(samples: int, size: int | None = None) -> Iterator[dict[str, torch.Tensor]]:
            return data.batches(samples, self.method.base, size)

        self.method.begin(stage, batches)
        processes.check_same(
            f"task {stage.task!r} at its start", lambda: self.method.fingerprints([stage.task])[stage.task]
        )
        trainer = TaskTrainer(self.method, self._arguments(stage, folder, seed, save_steps, workers, bars), data)
        if processes.rank():
            torch.manual_seed(seed + processes.rank() * 2**32)  # of the dropout; the order of the data has its own
        checkpoint = processes.by_first(
            lambda: latest_checkpoint(folder, trainer.learned(), processes.count(), trainer.is_deepspeed_enabled, note)
        )
        if checkpoint is not None and trainer.finished(checkpoint):
            trainer.load(checkpoint)
        else:
            trainer.train(resume_from_checkpoint=checkpoint)
        trainer.accelerator.free_memory()
        self.method.end(stage, batches)
        return trainer

    def _arguments(
        self, stage: Stage, folder: Path, seed: int, save_steps: int, workers: int, bars: bool
    ) -> TrainingArguments:
        s = self.settings
        arguments = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=s.batch_size // processes.count(),
            gradient_accumulation_steps=s.gradient_accumulation,
            learning_rate=stage.learning_rate * s.learning_rate,
            weight_decay=s.weight_decay,
            num_train_epochs=stage.epochs * s.epochs,
            max_steps=max(1, round(stage.epochs * s.max_steps)) if s.max_steps > 0 else -1,
            lr_scheduler_type="cosine",
            warmup_steps=s.warmup,
            **({"gradient_checkpointing": True} if s.gradient_checkpointing else {}),
            save_strategy="steps",
            save_steps=save_steps,
            save_total_limit=2,
            logging_steps=50,
            seed=seed,
            data_seed=seed,
            remove_unused_columns=False,
            dataloader_num_workers=workers,
            report_to="none",
            disable_tqdm=not bars,
            use_cpu=self.method.model.device.type == "cpu",
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # routes live in one process on one device: no nn.DataParallel
        return arguments

    # --- evaluation -------------------------------------------------------------------------------------------------

    def _evaluate(self, index: int, batch_size: int, progress: Progress) -> bool:
        """Fill the row of the stage after task `index`, if it is not; run a task again only if its function has changed."""
        after, names = self.manifest.tasks[index].name, self.matrix.scored(index)
        missing = {task for stage, task in self.matrix.missing() if stage == after}
        if not missing:
            return False
        if self.bank.tasks[-1] != after:
            raise UserError(
                f"{self.folder}: the scores after task {after!r} are missing, but later tasks are learned already; "
                "the model of that stage is gone: start a new run"
            )
        functions = self._functions(names)
        to_run = []
        for spec in self.manifest.tasks:
            if spec.name not in missing:
                continue
            source = self._unchanged_since(spec.name, functions[spec.name])
            if source is None:
                to_run.append(spec)
            else:
                self.matrix.copy(after, spec.name, source)
        for result in self.kind.evaluate(self.method, self.processor, to_run, batch_size, progress) if to_run else ():
            self.matrix.set(after, result.task, result.score, result.format_share)
            if processes.rank() == 0:
                lines = "\n".join(json.dumps(answer, ensure_ascii=False) for answer in result.answers)
                write_atomically(self.folder / "predictions" / f"{after}-{result.task}.jsonl", (lines + "\n").encode())
        self.state["functions"][after] = functions
        self._write(lambda bank: bank.set_scores({"matrix": self.matrix.to_dict(), **self.state}))
        return True

    def _functions(self, tasks: list[str]) -> dict[str, str]:
        """What tells each task's function; without the task that a method needs it is that of the base model."""
        known = [task for task in tasks if task in self.method.tasks or not self.method.needs_task]
        return dict.fromkeys(tasks, "base") | self.method.fingerprints(known)

    def _unchanged_since(self, task: str, function: str) -> str | None:
        """The stage whose model computed the very same function for the task, if its score is known."""
        for after, functions in self.state["functions"].items():
            if functions.get(task) == function:
                return after
        return None

    def _take_cells(self, stored: ScoreMatrix) -> None:
        """Cells of an earlier part of this run; the sequence of tasks may have grown since."""
        missing = set(stored.missing())
        for j, after in enumerate(stored.tasks):
            for task in stored.scored(j):
                if (after, task) in missing:
                    continue
                source = stored.carried_from(after, task)
                if source is None:
                    self.matrix.set(after, task, stored.get(after, task), stored.format_share(after, task))
                else:
                    self.matrix.copy(after, task, source)


class StageData(Dataset):
    """The training samples of a task, and the batches that a model takes."""

    def __init__(self, samples: Dataset, collator: Collate, batch_size: int) -> None:
        self.samples, self.collator, self.batch_size = samples, collator, batch_size

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]

    def collate(self, batch: list, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        inputs = self.collator(batch)
        return {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}

    def batches(
        self, samples: int, model: torch.nn.Module, size: int | None = None
    ) -> Iterator[dict[str, torch.Tensor]]:
        """At most `samples` of them, spread over the whole set, `size` to a batch, on the model's device."""
        size = size or self.batch_size
        chosen = torch.linspace(0, len(self) - 1, min(samples, len(self))).long().tolist()
        for start in range(0, len(chosen), size):
            batch = [self[index] for index in chosen[start : start + size]]
            inputs = self.collate(batch, model.dtype)
            yield {key: value.to(model.device) for key, value in inputs.items()}


class TaskTrainer(Trainer):
    """The HuggingFace Trainer for one stage: takes the method's loss, and checkpoints what is being trained only."""

    def __init__(self, method: Method, arguments: TrainingArguments, data: StageData) -> None:
        self.method = method
        collate = partial(data.collate, dtype=method.model.dtype)
        super().__init__(model=method.model, args=arguments, train_dataset=data, data_collator=collate)
        # A model that takes no num_items_in_batch returns the mean over its own batch. The step's labels are counted for it
        # too, and nothing is divided by the number of batches: see compute_loss.
        self.returns_mean, self.model_accepts_loss_kwargs = not self.model_accepts_loss_kwargs, True
        self.remove_callback(PrinterCallback)  # it would print among the command's own output
        if self.is_fsdp_enabled:  # a model's list has layers of parts that this one may lack, which accelerate refuses
            present = {type(module).__name__ for module in self.model.modules()} & set(self.model._no_split_modules)
            self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(present)

    def compute_loss(self, model, inputs, return_outputs: bool = False, **kwargs):
        outputs = None

        def cross_entropy():
            nonlocal outputs
            given = kwargs | ({"num_items_in_batch": None} if self.returns_mean else {})
            loss, outputs = super(TaskTrainer, self).compute_loss(model, inputs, return_outputs=True, **given)
            if self.returns_mean and kwargs.get("num_items_in_batch") is not None:
                loss = loss * self._share_of_labels(inputs["labels"], kwargs["num_items_in_batch"])
            return loss, outputs

        loss = self.method.loss(inputs, cross_entropy, 1 / self.current_gradient_accumulation_steps)
        return (loss, outputs) if return_outputs else loss

    def _share_of_labels(self, labels: torch.Tensor, in_step: torch.Tensor) -> torch.Tensor:
        """Of those in a step, of all processes whose gradients are averaged: labels [B, L], -100 where there is none."""
        labels = labels[..., 1:] if self._loss_shifts_labels else labels
        averaged = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return labels.ne(-100).sum() / in_step * averaged

    def learned(self) -> dict[str, torch.Tensor]:
        """The tensors that a checkpoint holds, themselves."""
        parameters = {unwrapped(name): p for name, p in self.model.named_parameters() if p.requires_grad}
        return parameters | {f"{PROGRESS}{name}": tensor for name, tensor in self.method.progress().items()}

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            self._save_tensors(Path(output_dir or self.args.output_dir), self.learned())

    def _save_tensors(self, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: t.detach().clone().contiguous() for name, t in tensors.items()}, folder / TENSORS)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # What accelerate would write is read with pickle, which runs the code of whoever wrote there.
        learned = {name: whole(tensor.detach()) for name, tensor in self.learned().items()}
        optimizer = self.optimizer.state_dict()
        optimizer["state"] = {
            index: {key: whole(value) for key, value in entry.items()} for index, entry in optimizer["state"].items()
        }
        if self.args.should_save:
            self._save_tensors(Path(output_dir), learned)
            torch.save(optimizer, Path(output_dir) / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # what comes next, the Trainer's state, says that the checkpoint is complete
        if self.args.should_save:
            sync(Path(output_dir))

    @torch.no_grad()
    def load(self, checkpoint: str) -> None:
        """The tensors and the Trainer's state of a checkpoint."""
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / STATE))
        with safe_open(Path(checkpoint) / TENSORS, framework="pt") as stored:
            for name, tensor in self.learned().items():
                tensor.copy_(sharded_like(tensor, stored.get_tensor(name)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        self.load(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer, scheduler = (
            torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True)
            for name in ("optimizer.pt", "scheduler.pt")
        )
        own = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for index, entry in optimizer["state"].items():
            for key, value in entry.items():
                if value.shape == own[index].shape:
                    entry[key] = sharded_like(own[index], value)
        self.optimizer.load_state_dict(optimizer)
        self.lr_scheduler.load_state_dict(scheduler)

    @staticmethod
    def finished(checkpoint: str) -> bool:
        """Whether the checkpoint was made by the last step of its stage."""
        state = TrainerState.load_from_json(str(Path(checkpoint) / STATE))
        return state.global_step >= state.max_steps


def sharded_like(own: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`value`, which every process has in full, divided among them as `own` is."""
    if not is_sharded(own):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def check_processes(method: type[Method], kind: Kind, batch_size: int) -> None:
    """UserError unless as many processes as were started can train together."""
    for what, reason in (
        (f"--method {method.name}", method.one_process_reason),
        ("these tasks", kind.one_process_reason),
    ):
        if reason is not None and processes.count() > 1:
            raise UserError(
                f"{what}: one process alone can train, because {reason}; start the command without a launcher"
            )
    if processes.sharded() and not method.sharded_parameters:
        raise UserError(
            f"--method {method.name} reads its parameters outside the forward, where FSDP2 has sharded them; use "
            "examples/accelerate/ddp.yaml"
        )
    if batch_size % processes.count():
        raise UserError(
            f"--batch-size {batch_size} cannot be divided among {processes.count()} processes; give a multiple of their number"
        )


def require_images_alike(manifest: Manifest) -> None:
    """UserError for a task with images in some samples only: one process would gather a vision tower's shards alone."""
    for spec in manifest.tasks:
        if len({bool(sample.images) for sample in InstructionDataset(spec, "train").samples}) > 1:
            raise UserError(
                f"task {spec.name!r} has samples with images and without, which FSDP2 cannot train together; use "
                "examples/accelerate/ddp.yaml"
            )


def check_folder(folder: Path, config: dict[str, Any], tasks: Sequence[str]) -> Bank | None:
    """The bank of the run in `folder` if it was started with the same config; None if the folder is new."""
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
    old = flat({"kind": "instruction"} | bank.config)  # banks of earlier versions do not say so
    new = flat(json.loads(json.dumps(config)))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            raise UserError(
                f"--out {folder} holds another run: its {key} is {old.get(key)!r} and this one's is {new.get(key)!r}; "
                "give another folder, or the same settings to go on with it"
            )
    if bank.tasks != list(tasks[: len(bank.tasks)]):
        raise UserError(
            f"--out {folder} holds another run: it has learned {', '.join(bank.tasks)}, which is no beginning of "
            f"{', '.join(tasks)}; give another folder or the same order"
        )
    return bank


def run_of(bank: Bank) -> Run:
    """What a bank says of its run, without a model; UserError before there are scores."""
    settings = train_settings(bank)
    if not bank.scores:
        raise UserError(f"{bank.path} holds no scores yet; run lilora train to its end")
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
        {"settings": bank.config["settings"], "train": bank.config["train"], "sizes": sizes},
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
            f"{method.name} has learned {bank.tasks[-1]!r} on top of {name!r}; remove the newest task first"
        )
    if bank.scores:  # first: a task without scores is evaluated again, scores without their task would stay
        matrix = ScoreMatrix.from_dict(bank.scores["matrix"]).without(name)
        state = {key: {k: v for k, v in bank.scores[key].items() if k != name} for key in ("functions", "seconds")}
        bank.set_scores({"matrix": matrix.to_dict(), **state} if matrix else {})
    bank.remove_task(name)


def label_of(bank: Bank) -> str:
    return bank.config.get("label") or method_label(bank.config["method"], bank.config["settings"])


SIZES = {"r", "sub_rank", "alpha", "lora_alpha", "dropout", "lora_dropout", "target_modules"}


def method_label(method: str, settings: dict[str, Any]) -> str:
    """What the report calls a run by default: its method, and the preset whose settings it has beside the sizes."""
    presets = METHODS[method].presets
    if not presets:
        return method
    chosen = {name: value for name, value in settings.items() if name not in SIZES}
    named = (
        name
        for name, values in presets.items()
        if json.dumps(values, sort_keys=True) == json.dumps(chosen, sort_keys=True)
    )
    return f"{method}-{next(named, 'custom')}"
