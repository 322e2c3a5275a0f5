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
from torch import nn
from transformers import TrainingArguments, set_seed

from lilora.bank.bank import Bank
from lilora.bank.index import BaseModelId
from lilora.bank.lock import locked
from lilora.continual import processes
from lilora.errors import Diverged, UserError, print_note
from lilora.methods import METHODS, Method, Stage, make_method
from lilora.methods.base import digest
from lilora.peft.tuner import full_tensor
from lilora.reports.runs import Run
from lilora.reports.scores import ScoreMatrix

from .base_model import load_base, pick_device, restore
from .checkpoints import latest_checkpoint
from .evaluate import TaskScore, write_answers
from .images import ImageAspect
from .kinds import kind_name, kind_of
from .memory import ran_out
from .mixing import ReplaySampler, memory_of
from .probes import Untrained, score_probes
from .process_checks import check_processes, require_images_alike, splits_freely
from .run_folder import check_folder, label_of, run_of, take_settings
from .run_record import TrainSettings, check_label, image_aspect_of, train_settings
from .task_identification import SAMPLES, TASK_IDENTIFIERS, NearestCentroid, identifier_of
from .task_sequence import Manifest
from .trainer import StageData, TaskTrainer
from .vision import train_head


class ContinualRun:
    """A run folder: the bank, checkpoints of the task being trained, predictions.

    `bank/` is described in bank/bank.py; `checkpoints/<task>/` are the Trainer's; `predictions/<after>-<task>.jsonl` hold
    every answer of every evaluation, those of the base model under `before`. Of several processes the first one writes; all
    must see the folder. From `open` to `close` no other run writes there, and no other process to the bank.
    """

    def __init__(self, folder: Path, manifest: Manifest, method: Method, processor, bank: Bank) -> None:
        self.folder, self.manifest, self.method, self.processor, self.bank = folder, manifest, method, processor, bank
        self.kind = kind_of(bank.config)
        self.settings = train_settings(bank)
        self.method.seed = self.settings.seed
        tasks = manifest.tasks
        unscored = [task.name for task in tasks if task.test is None]
        self.matrix = ScoreMatrix([task.name for task in tasks], self.kind.unseen(manifest), unscored)
        self.state: dict[str, Any] = {"functions": {}, "seconds": {}, "zero_shot": {}, "probes": {}, "scoring": {}}
        scoring = {task.name: task.scoring() for task in (*tasks, *manifest.probes) if task.test is not None}
        if bank.scores:
            self.state = {key: bank.scores.get(key, {}) for key in self.state}  # earlier versions knew no probes
            for name in self.state["scoring"].keys() & scoring.keys():
                if self.state["scoring"][name] != scoring[name]:
                    raise UserError(
                        f"{folder} has scores of task {name!r} by other test samples, another scorer, instruction, format, limit "
                        "of tokens, classes or templates than the manifest has now; restore those, or train into another folder"
                    )
            self._take_cells(ScoreMatrix.from_dict(bank.scores["matrix"]))
        self._scoring = scoring
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
        image_aspect: ImageAspect | None = None,
    ) -> "ContinualRun":
        """Start a run, or go on with the one in `folder`, with the settings that may have changed (`check_folder`).

        image_aspect: the manifest's unless given.

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
        if getattr(manifest, "label_space", "task") != "task":
            config["label_space"] = manifest.label_space
        if config.get("label_space") == "all":
            config["classes_of"] = sorted(task.name for task in manifest.tasks[0].rivals([]))
        if manifest.scored_on != "test":
            config["scored_on"] = manifest.scored_on
        if task_identifier != NearestCentroid.name:
            TASK_IDENTIFIERS.find(task_identifier, "--task-identifier")
            config["task_identifier"] = task_identifier
        if (image_aspect or manifest.image_aspect) != "processor":
            config["image_aspect"] = image_aspect or manifest.image_aspect
        check_label(label)
        kind = kind_of(config)
        method_type = METHODS.find(method)
        names = [task.name for task in manifest.tasks]
        if method_type.trains_on == "all":
            config["tasks"] = names
        kind.check_method(method_type)
        kind.check_manifest(manifest)
        method_type.read_settings(method_settings)
        check_processes(method_type, kind, train.batch_size)
        splits = splits_freely(method_type, kind)
        if processes.sharded():
            require_images_alike(manifest, mixed=method_type.trains_on in ("earlier", "all"))
        processes.init(pick_device(device))
        with ExitStack() as held:

            def lock_and_check() -> Bank | None:
                if not folder.exists() or folder.is_dir():
                    held.enter_context(locked(folder / "bank"))
                return check_folder(folder, config, names, splits)

            existing = processes.on_rank0(lock_and_check)
            if pick_device(device).index:
                raise UserError(f"--device {device}: training takes the first device; choose with CUDA_VISIBLE_DEVICES")
            base, processor = load_base(model, train.dtype, device, kind, image_aspect_of(config))
            for task in (*manifest.tasks, *manifest.probes):
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
        zero_shot: bool = False,
        nll: bool = False,
    ) -> ScoreMatrix:
        """Train and evaluate what is left to do; returns the score matrix.

        zero_shot: score all tasks with the base model too, as the probes always are.

        evaluation_batch: samples per batch of an evaluation, by default 8 times as many as in training; fewer from where memory
        runs out. say: gets a line after each task. report_to: trackers as transformers names them; each stage of a task is one
        of their runs, `<run folder>/<task>/<stage>`; tensorboard's files go to `tensorboard/<task>/<stage>` in the run's folder.
        nll: evaluations measure the references' likelihood, too.
        """
        evaluation_batch = evaluation_batch or 8 * self.settings.batch_size
        measures = self.kind.measures(nll)
        if zero_shot and self.kind.heads:
            raise UserError(
                "--zero-shot: the base model has no classifier for a task before its training; leave it out"
            )
        self._evaluate_base(zero_shot, evaluation_batch, bars, say)
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
                if self._evaluate(index, evaluation_batch, progress, measures):
                    say(self._summary(index))
                self._evaluate_probes(spec.name, evaluation_batch, progress, say)
        return self.matrix

    def _summary(self, index: int) -> str:
        """A line on the task of this number, just trained and evaluated."""
        names = [task.name for task in self.manifest.tasks]
        name, scored = names[index], [task for task in self.matrix.columns if task in names[: index + 1]]
        (info,) = (task["info"] for task in self.bank.describe()["tasks"] if task["name"] == name)
        trained = f"trained in {self.state['seconds'][name]:.0f} s" if "steps" in info else "nothing trained for it"
        line = f"{label_of(self.bank)}: task {index + 1} of {len(names)}, {name}, {trained}: "
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
        started, losses, info = time.monotonic(), {}, {}
        stages = self.method.stages(spec.name)
        for number, stage in enumerate(stages):
            seed = 1000 * self.settings.seed + index + 500 * number  # of this stage alone: a resumed run draws the same
            set_seed(seed)
            trainer = self._train_stage(spec, stage, seed, save_steps, workers, bars, report_to)
            losses[stage.name] = trainer.losses()
            steps, curve = zip(*losses[stage.name], strict=True)
            loss = float(np.average(curve, weights=np.diff((0, *steps))))
            info = {"steps": trainer.state.global_step, "loss": loss}
        if not stages:
            self.method.add(spec.name)
        own, shared = ({k: full_tensor(t) for k, t in tensors.items()} for tensors in self.method.tensors(spec.name))
        own |= self.method.base.classifier.stored(spec.name) if self.kind.heads else {}
        if not all(torch.isfinite(tensor).all() for tensor in (*own.values(), *shared.values())):
            raise Diverged(f"task {spec.name!r} diverged: its parameters are not finite; {self._after_divergence()}")
        seconds = self.state["seconds"][spec.name] = round(time.monotonic() - started, 1)
        info |= {"losses": losses, "seconds": seconds}
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
        s = self.settings
        rates = self.manifest.learning_rates(self.method.name, s.learning_rate)
        if self.manifest.rates and rates == (s.learning_rate, s.learning_rates):
            return "give this task a lower learning_rate in the manifest and run the same command"
        return "give another folder (--out) and a lower --lr, which all tasks of a run have in common"

    def _write(self, change: Callable[[Bank], None]) -> None:
        """Change the bank, in the first process; all have it afterwards."""

        def changed() -> Bank:
            change(self.bank)
            return self.bank

        self.bank = processes.on_rank0(changed)

    def _reload(self, ask_base: Callable[[nn.Module], None] = lambda base: None) -> None:
        """The method anew, from the base model and the bank: a sharded model takes no further tasks.

        ask_base: gets the base model before the method changes it.
        """
        device, config = str(self.method.base.device), self.bank.config
        self.method = None
        gc.collect()  # there may not be room for both
        base, _ = load_base(config["model"], self.settings.dtype, device, self.kind)
        ask_base(base)
        self.method = make_method(config["method"], base, config["settings"])
        self.method.seed = self.settings.seed
        restore(self.method, self.bank)

    def _fit_router(self, spec: Any, say: Callable[[str], None]) -> None:
        data = StageData(*self.kind.training_data([spec], self.processor), self.settings.batch_size)
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
        own = StageData(*self.kind.training_data([spec], self.processor), self.settings.batch_size)
        data = self._with_other_tasks(spec, stage, seed) or own

        def batches(samples: int, size: int | None = None) -> Iterator[dict[str, torch.Tensor]]:
            return own.batches(samples, self.method.base, size)

        self.method.begin(stage, batches)
        if self.kind.heads:
            train_head(self.method.base, stage.task, data.samples.parts[0].classes, next(batches(1)))
        processes.check_same(
            f"task {stage.task!r} at its start", lambda: self.method.fingerprints([stage.task])[stage.task]
        )
        arguments = self._arguments(trained.name, stage, folder, seed, save_steps, workers, bars)
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

    def _with_other_tasks(self, spec: Any, stage: Stage, seed: int) -> StageData | None:
        """The samples of a stage that trains on other tasks too; None where it does not."""
        earlier = self.manifest.tasks[: self.manifest.tasks.index(spec)]
        if self.method.trains_on == "all":
            data = self.kind.training_data(self.manifest.tasks, self.processor)
            return StageData(*data, self.settings.batch_size, tasks=self.method.sees_tasks)
        if not (stage.replayed and earlier):
            return None
        samples, collator = self.kind.training_data([spec, *earlier], self.processor)
        memory = []
        for number, task in enumerate(earlier, 1):
            memory += memory_of(samples, number, task.name, stage.memory, self.settings.seed)
        step = self.settings.batch_size * self.settings.gradient_accumulation
        order = ReplaySampler(samples.starts[1], memory, step, stage.replayed, seed)
        return StageData(samples, collator, self.settings.batch_size, order)

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
        self, task: str, stage: Stage, folder: Path, seed: int, save_steps: int, workers: int, bars: bool
    ) -> TrainingArguments:
        s = self.settings
        max_steps = s.max_steps * (len(self.manifest.tasks) if self.method.trains_on == "all" else 1)
        arguments = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=s.batch_size // processes.world_size(),
            gradient_accumulation_steps=s.gradient_accumulation,
            learning_rate=stage.learning_rate * s.rate_of(task),
            weight_decay=s.weight_decay,
            num_train_epochs=stage.epochs * s.epochs,
            max_steps=max(1, round(stage.epochs * max_steps)) if s.max_steps > 0 else -1,
            lr_scheduler_type="cosine",
            warmup_steps=s.warmup,
            max_grad_norm=s.max_grad_norm,
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

    def _evaluate(self, index: int, batch_size: int, progress: Progress, measures: dict[str, bool]) -> bool:
        """Fill the row of the stage after task `index`, if it is not; run a task again only if its function has changed."""
        after, names = self.manifest.tasks[index].name, self.matrix.scored(index)
        missing = {task for stage, task in self.matrix.missing() if stage == after}
        if not missing and after in self.state["functions"]:
            return False
        if self.state["functions"].get(after) == {} and self.bank.tasks[-1] != after:
            return False  # `remove_task` took its scores out, and the model of that stage is gone
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
        found = to_run and self.kind.evaluate(self.method, self.processor, to_run, batch_size, progress, **measures)
        for result in found:
            self.matrix.set(after, result.task, result.score, result.format_share, result.nll)
            self._keep_answers(after, result)
        self.state["functions"][after] = functions
        self._write_scores()
        return True

    def _evaluate_base(self, zero_shot: bool, batch_size: int, bars: bool, say: Callable[[str], None]) -> None:
        """Score the probes, and with `zero_shot` the tasks, before any training, unless they are scored."""
        wanted = (*(self.manifest.tasks if zero_shot else ()), *self.manifest.probes)
        missing = [spec for spec in wanted if spec.test is not None and spec.name not in self.state["zero_shot"]]
        if not missing:
            return

        def ask(base: nn.Module) -> None:
            with Progress(disable=not bars) as progress:
                results = self.kind.evaluate(Untrained(base), self.processor, missing, batch_size, progress)
            for result in results:
                self.state["zero_shot"][result.task] = result.score
                self._keep_answers("before", result)
            self._write_scores()
            say(f"{label_of(self.bank)}: before any training: {_points(results)}")

        self._reload(ask)

    def _evaluate_probes(self, after: str, batch_size: int, progress: Progress, say: Callable[[str], None]) -> None:
        """Score the probes after a task, unless they are scored or the model of that stage is gone."""
        scores = self.state["probes"].get(after, {})
        missing = [spec for spec in self.manifest.probes if spec.name not in scores]
        if not missing or self.bank.tasks[-1] != after:
            return
        results = score_probes(self.kind, self.method, self.processor, missing, after, batch_size, progress)
        for result in results:
            self.state["probes"].setdefault(after, {})[result.task] = result.score
            self._keep_answers(after, result)
        self._write_scores()
        say(f"{label_of(self.bank)}: probes after {after}: {_points(results)}")

    def _keep_answers(self, stage: str, result: TaskScore) -> None:
        self.state["scoring"][result.task] = self._scoring[result.task]
        if processes.rank() == 0:
            write_answers(self.folder / "predictions" / f"{stage}-{result.task}.jsonl", result.answers)

    def _write_scores(self) -> None:
        self._write(lambda bank: bank.set_scores({"matrix": self.matrix.to_dict(), **self.state}))

    def _functions(self, tasks: list[str]) -> dict[str, str]:
        """What tells each task's function; without the task that a method needs it is that of the base model."""
        known = [task for task in tasks if task in self.method.tasks or not self.method.needs_task]
        functions = dict.fromkeys(tasks, "base") | self.method.fingerprints(known)
        if self.bank.config.get("label_space") != "seen":
            return functions
        among = ", ".join(self.method.tasks)  # whose classes an image may be taken for
        return {task: f"{function} among {among}" for task, function in functions.items()}

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
                    share, nll = stored.format_share(after, task), stored.nll(after, task)
                    self.matrix.set(after, task, stored.get(after, task), share, nll)
                else:
                    self.matrix.copy(after, task, source)


def _points(results: Sequence[TaskScore]) -> str:
    return ", ".join(f"{result.task} {result.score:.1f}" for result in results)
