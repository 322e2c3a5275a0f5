"""Trains all tasks of a manifest, evaluates after each, and goes on where it was interrupted."""

import gc
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from transformers import TrainingArguments, set_seed

from lilora.bank.bank import Bank
from lilora.bank.lock import locked
from lilora.bank.records import BaseModelId
from lilora.continual import processes
from lilora.errors import UserError, print_note
from lilora.methods import METHODS, Method, Stage, make_method
from lilora.methods.base import digest
from lilora.peft.tuner import full_tensor
from lilora.reports.runs import Run
from lilora.reports.scores import ScoreMatrix

from .base_model import load_base, pick_device, restore
from .checkpoints import latest_checkpoint
from .evaluate import write_answers
from .instructions import instruction_data
from .kinds import Kind, kind_name, kind_of
from .memory import ran_out
from .recorded import TrainSettings, check_label, train_settings
from .run_folder import check_folder, label_of, run_of, take_settings
from .task_identification import SAMPLES, TASK_IDENTIFIERS, NearestCentroid, identifier_of
from .task_sequence import Manifest
from .trainer import StageData, TaskTrainer
from .vision import train_head


class ContinualRun:
    """A run folder: the bank, checkpoints of the task being trained, predictions.

    `bank/` is described in bank/bank.py; `checkpoints/<task>/` are the Trainer's; `predictions/<after>-<task>.jsonl` hold
    every answer of every evaluation. Of several processes the first one writes; all must see the folder. From `open` to
    `close` no other run writes there, and no other process to the bank.
    """

    def __init__(self, folder: Path, manifest: Manifest, method: Method, processor, bank: Bank) -> None:
        self.folder, self.manifest, self.method, self.processor, self.bank = folder, manifest, method, processor, bank
        self.kind = kind_of(bank.config)
        self.settings = train_settings(bank)
        tasks = manifest.tasks
        unscored = [task.name for task in tasks if task.test is None]
        self.matrix = ScoreMatrix([task.name for task in tasks], self.kind.unseen, unscored)
        self.state: dict[str, Any] = {"functions": {}, "seconds": {}}
        if bank.scores:
            self.state = {key: bank.scores[key] for key in ("functions", "seconds")}
            self._take_cells(ScoreMatrix.from_dict(bank.scores["matrix"]))
        for task in bank.describe()["tasks"]:  # trained by a run that ended before its scores were written
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
        task_identifier: str = NearestCentroid.name,
    ) -> "ContinualRun":
        """Start a run, or go on with the one in `folder`, with the settings that may have changed (`check_folder`).

        Raises UserError when the folder holds something else, another process writes there, or the base model cannot be
        loaded.
        """
        config = {
            "method": method,
            "settings": method_settings,
            "train": train.model_dump(),
            "manifest": manifest.name,
            "kind": kind_name(manifest.kind, model),
            "model": model,
        } | ({"label": label} if label else {})
        if task_identifier != NearestCentroid.name:
            TASK_IDENTIFIERS.find(task_identifier, "--task-identifier")
            config["task_identifier"] = task_identifier
        check_label(label)
        kind = kind_of(config)
        method_type = METHODS.find(method)
        kind.check_method(method_type)
        method_type.read_settings(method_settings)
        check_processes(method_type, kind, train.batch_size)
        splits = splits_freely(method_type, kind)
        if processes.sharded():
            require_images_alike(manifest)
        processes.init(pick_device(device))
        names = [task.name for task in manifest.tasks]
        with ExitStack() as held:

            def lock_and_check() -> Bank | None:
                if not folder.exists() or folder.is_dir():
                    held.enter_context(locked(folder / "bank"))
                return check_folder(folder, config, names, splits)

            existing = processes.on_rank0(lock_and_check)
            if pick_device(device).index:
                raise UserError(f"--device {device}: training takes the first device; choose with CUDA_VISIBLE_DEVICES")
            base, processor = load_base(model, train.dtype, device, kind)
            for task in manifest.tasks:
                kind.check(task, processor)
            identity = BaseModelId.of(base, model)
            processes.check_same("the base model", lambda: identity.fingerprint)
            learner = make_method(method, base, method_settings)

            def with_settings() -> Bank:
                if existing is None:
                    return Bank.create(folder / "bank", config=config, base_model=identity)
                return take_settings(folder, existing, config, identity, splits)

            existing = processes.on_rank0(with_settings)
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
        evaluation_batch: int | None = None,
        save_steps: int = 200,
        workers: int = 0,
        bars: bool = True,
        say: Callable[[str], None] = print,
        report_to: Sequence[str] = (),
    ) -> ScoreMatrix:
        """Train and evaluate what is left to do; returns the score matrix.

        evaluation_batch: samples per batch of an evaluation, by default 8 times as many as in training; fewer from where memory
        runs out. say: gets a line after each task. report_to: trackers as transformers names them; each stage of a task is one
        of their runs, `<run folder>/<task>/<stage>`; tensorboard's files go to `tensorboard/<task>/<stage>` in the run's folder.
        """
        for index, spec in enumerate(self.manifest.tasks):
            if spec.name not in self.bank.tasks:
                self._train_task(index, spec, save_steps, workers, bars, report_to)
                if processes.sharded():
                    self._reload()
            if self.kind.needs_task(self.method) and spec.name not in self.bank.routed:
                self._fit_router(spec, say)
            if processes.rank() == 0:
                shutil.rmtree(self.folder / "checkpoints" / spec.name, ignore_errors=True)
            with Progress(disable=not bars) as progress:
                if self._evaluate(index, evaluation_batch or 8 * self.settings.batch_size, progress):
                    say(self._summary(index))
        return self.matrix

    def _summary(self, index: int) -> str:
        """A line on the task of this number, just trained and evaluated."""
        names = [task.name for task in self.manifest.tasks]
        name, scored = names[index], [task for task in self.matrix.columns if task in names[: index + 1]]
        line = (
            f"{label_of(self.bank)}: task {index + 1} of {len(names)}, {name}, trained in "
            f"{self.state['seconds'][name]:.0f} s: "
        )
        line += f"{self.matrix.get(name, name):.1f} points" if name in scored else "not scored, it has no test split"
        if scored:
            mean = sum(self.matrix.get(name, task) for task in scored) / len(scored)
            line += f"; mean over the tasks so far {mean:.1f}"
        return line

    def result(self) -> Run:
        """The run as the report wants it."""
        return run_of(self.bank)

    # --- training ---------------------------------------------------------------------------------------------------

    def _train_task(
        self, index: int, spec: Any, save_steps: int, workers: int, bars: bool, report_to: Sequence[str]
    ) -> None:
        started, losses = time.monotonic(), {}
        for number, stage in enumerate(self.method.stages(spec.name)):
            seed = 1000 * self.settings.seed + index + 500 * number  # of this stage alone: a resumed run draws the same
            set_seed(seed)
            trainer = self._train_stage(spec, stage, seed, save_steps, workers, bars, report_to)
            losses[stage.name] = trainer.losses()
        own, shared = ({k: full_tensor(t) for k, t in tensors.items()} for tensors in self.method.tensors(spec.name))
        own |= self.method.base.classifier.stored(spec.name) if self.kind.heads else {}
        if not all(torch.isfinite(tensor).all() for tensor in (*own.values(), *shared.values())):
            raise UserError(f"task {spec.name!r} diverged: its parameters are not finite; {self._after_divergence()}")
        seconds = self.state["seconds"][spec.name] = round(time.monotonic() - started, 1)
        steps, curve = zip(*losses[stage.name], strict=True)
        loss = float(np.average(curve, weights=np.diff((0, *steps))))
        info = {"steps": trainer.state.global_step, "loss": loss, "losses": losses, "seconds": seconds}
        if self.kind.answers:
            info["max_new_tokens"] = spec.max_new_tokens
        info |= {"parameters": self.method.parameters(), "ranks": self.method.ranks()}
        if self.kind.heads:
            info["classes"] = self.method.base.classifier.classes[spec.name]
            info["parameters"] += sum(p.numel() for p in self.method.base.classifier.parameters())
        processes.check_same(f"task {spec.name!r} as trained", lambda: digest(own | shared))
        self._write(lambda bank: bank.add_task(spec.name, own, shared, info=info, replaces=self.method.one_state))

    def _after_divergence(self) -> str:
        """What to do then: see `run_folder.check_folder`."""
        if not self.bank.tasks:
            return "run the same command with a lower --lr"
        return "give another folder (--out) and a lower --lr, which all tasks of a run have in common"

    def _write(self, change: Callable[[Bank], None]) -> None:
        """Change the bank, in the first process; all have it afterwards."""

        def changed() -> Bank:
            change(self.bank)
            return self.bank

        self.bank = processes.on_rank0(changed)

    def _reload(self) -> None:
        """The method anew, from the base model and the bank: a sharded model takes no further tasks."""
        device, config = str(self.method.base.device), self.bank.config
        self.method = None
        gc.collect()  # there may not be room for both
        base, _ = load_base(config["model"], self.settings.dtype, device, self.kind)
        self.method = make_method(config["method"], base, config["settings"])
        restore(self.method, self.bank)

    def _fit_router(self, spec: Any, say: Callable[[str], None]) -> None:
        data = StageData(*self.kind.training_data(spec, self.processor), self.settings.batch_size)
        try:
            router = identifier_of(self.bank.config)(self.method.base)
            statistics = router.fit(spec.name, data.batches(SAMPLES, self.method.base))
        except ValueError as error:  # of this model or these samples; all else goes without
            say(f"{spec.name}: the bank cannot find this task by itself ({error})")
            return
        self._write(lambda bank: bank.set_router(spec.name, statistics))

    def _train_stage(
        self,
        trained: Any,
        stage: Stage,
        seed: int,
        save_steps: int,
        workers: int,
        bars: bool,
        report_to: Sequence[str],
    ) -> TaskTrainer:
        spec = next(task for task in self.manifest.tasks if task.name == stage.task)
        folder = self.folder / "checkpoints" / trained.name / stage.name
        data = StageData(*self.kind.training_data(spec, self.processor), self.settings.batch_size)

        def batches(samples: int, size: int | None = None) -> Iterator[dict[str, torch.Tensor]]:
            return data.batches(samples, self.method.base, size)

        self.method.begin(stage, batches)
        if self.kind.heads:
            train_head(self.method.base, stage.task, data.samples.classes, next(batches(1)))
        processes.check_same(
            f"task {stage.task!r} at its start", lambda: self.method.fingerprints([stage.task])[stage.task]
        )
        arguments = self._arguments(stage, folder, seed, save_steps, workers, bars)
        arguments.report_to, arguments.run_name = list(report_to), f"{self.folder.name}/{trained.name}/{stage.name}"
        trainer = TaskTrainer(self.method, arguments, data, self._after_divergence())
        trainer.put_tensorboard(self.folder / "tensorboard" / trained.name / stage.name)
        if processes.rank():
            torch.manual_seed(seed + processes.rank() * 2**32)  # of the dropout; the order of the data has its own
        checkpoint = processes.on_rank0(
            lambda: latest_checkpoint(
                folder, trainer.trainable(), processes.world_size(), trainer.is_deepspeed_enabled, print_note
            )
        )
        if checkpoint is not None and trainer.finished(checkpoint):
            trainer.load(checkpoint)
        else:
            self._run(trainer, trained.name, checkpoint)
        trainer.accelerator.free_memory()
        self.method.end(stage, batches)
        return trainer

    def _run(self, trainer: TaskTrainer, task: str, checkpoint: str | None) -> None:
        """Train; UserError where memory does not hold it, with what may be changed: see `run_folder.check_folder`."""
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except Exception as error:
            if not ran_out(error):
                raise
            s, ways = self.settings, []
            if s.batch_size > processes.world_size() and splits_freely(METHODS[self.method.name], self.kind):
                half = (s.batch_size // processes.world_size() // 2) * processes.world_size()
                ways.append(
                    f"--batch-size {half} --gradient-accumulation {s.batch_size * s.gradient_accumulation // half}"
                )
            ways += [] if s.gradient_checkpointing else ["--gradient-checkpointing"]
            advice = (
                f"with {' or '.join(ways)}, which goes on from the last checkpoint" if ways else "on a larger device"
            )
            raise UserError(
                f"task {task!r}: memory does not hold a training batch of {s.batch_size} samples (step "
                f"{trainer.state.global_step + 1}); run the same command {advice}"
            ) from error

    def _arguments(
        self, stage: Stage, folder: Path, seed: int, save_steps: int, workers: int, bars: bool
    ) -> TrainingArguments:
        s = self.settings
        arguments = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=s.batch_size // processes.world_size(),
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
            logging_steps=0.01,  # of all steps
            logging_nan_inf_filter=False,
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
        if not missing and after in self.state["functions"]:
            return False
        if missing and self.bank.tasks[-1] != after:
            raise UserError(
                f"{self.folder}: the scores after task {after!r} are missing, but later tasks are trained already; "
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
                write_answers(self.folder / "predictions" / f"{after}-{result.task}.jsonl", result.answers)
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


def splits_freely(method: type[Method], kind: Kind) -> bool:
    """Whether it changes nothing but rounding and dropout how the samples of a step are divided into batches."""
    return method.one_process_reason is None and kind.one_process_reason is None


def check_processes(method: type[Method], kind: Kind, batch_size: int) -> None:
    """UserError unless as many processes as were started can train together."""
    for what, reason in (
        (f"--method {method.name}", method.one_process_reason),
        ("these tasks", kind.one_process_reason),
    ):
        if reason is not None and processes.world_size() > 1:
            raise UserError(
                f"{what}: one process alone can train, because {reason}; start the command without a launcher"
            )
    if processes.sharded() and kind.heads:
        raise UserError("FSDP2 would shard the tasks' classifiers too; use examples/accelerate/ddp.yaml")
    if processes.sharded() and not method.sharded_parameters:
        raise UserError(
            f"--method {method.name} reads its parameters outside the forward, where FSDP2 has sharded them; use "
            "examples/accelerate/ddp.yaml"
        )
    if batch_size % processes.world_size():
        raise UserError(
            f"--batch-size {batch_size} cannot be divided among {processes.world_size()} processes; give a multiple of it"
        )


def require_images_alike(manifest: Manifest) -> None:
    """UserError for a task with images in some samples only: one process would gather a vision tower's shards alone."""
    for spec in manifest.tasks:
        if len({with_images for with_images, *_ in instruction_data(spec, "train").first}) > 1:
            raise UserError(
                f"task {spec.name!r} has samples with images and without, which FSDP2 cannot train together; use "
                "examples/accelerate/ddp.yaml"
            )
