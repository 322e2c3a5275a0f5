"""The HuggingFace Trainer for one stage of a method, and the batches that it takes."""

import inspect
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset, Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import integration_utils
from transformers.integrations.integration_utils import TensorBoardCallback

from lilora.errors import Diverged, UserError, lost_process
from lilora.methods import Method
from lilora.module_names import unwrapped
from lilora.peft.tuner import full_tensor
from lilora_kernels.layers.base import is_sharded

from . import processes
from .checkpoints import PROGRESS, STATE, TENSORS, seal, sync
from .kinds import Collate
from .mixing import ReplaySampler, TaskSamples


def trackers_of(text: str) -> list[str]:
    """The trackers of `--report-to`: comma-separated names as transformers has them, or none.

    Raises UserError for one that transformers does not know or that is not installed.
    """
    known, installed = (
        integration_utils.INTEGRATION_TO_CALLBACK,
        integration_utils.get_available_reporting_integrations(),
    )
    names = [] if text == "none" else text.split(",")
    for name in names:
        if name not in known:
            raise UserError(f"--report-to {name} is unknown; choose of {', '.join(known)}, or none")
        if name not in installed:
            raise UserError(f"--report-to {name}: its package is not installed; install it, or leave the option out")
    return names


class StageData(Dataset):
    """The training samples of a stage, and the batches that a model takes. order: of an epoch, None for any.

    tasks: whether a batch says each sample's task, as `Method.sees_tasks` wants.
    """

    def __init__(
        self,
        samples: TaskSamples,
        collator: Collate,
        batch_size: int,
        order: ReplaySampler | None = None,
        tasks: bool = False,
    ) -> None:
        self.samples, self.collator, self.batch_size, self.order = samples, collator, batch_size, order
        self.tasks = tasks

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]

    def collate(self, batch: list, dtype: torch.dtype, answers_only: bool = False) -> dict[str, torch.Tensor]:
        """answers_only: let the model compute logits where they predict answers alone (`with_answer_logits`)."""
        inputs = self.collator(batch)
        if answers_only:
            inputs = with_answer_logits(inputs)
        if self.tasks:
            inputs["task_ids"] = torch.tensor([number for number, _ in batch])
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


def with_answer_logits(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch for a model that computes logits [B, K, V] at the K positions alone that predict a token of some answer.

    Adds `logits_to_keep` [K] and `shift_labels` [B, K], the labels [B, L] of the tokens that follow there, -100 where that is no
    answer, as transformers' models and its causal loss take them: the loss and its gradient are those of all logits.
    """
    following = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    kept = (following != -100).any(0).nonzero()[:, 0]
    return inputs | {"logits_to_keep": kept, "shift_labels": following[:, kept]}


class TaskTrainer(Trainer):
    """The HuggingFace Trainer for one stage: takes the method's loss, and checkpoints what is being trained only.

    A model whose forward takes `logits_to_keep`, and whose loss is transformers' causal one, computes the logits that the loss
    needs and no others.

    Raises UserError within ten steps, and before a checkpoint, when a loss is not finite; `advice` says what to do then.
    """

    def __init__(
        self, method: Method, arguments: TrainingArguments, data: StageData, advice: str = "lower the learning rate"
    ) -> None:
        self.method = method
        collate = partial(data.collate, dtype=method.model.dtype)
        super().__init__(model=method.model, args=arguments, train_dataset=data, data_collator=collate)
        # A model that takes no num_items_in_batch returns the mean over its own batch. The step's labels are counted for it
        # too, and nothing is divided by the number of batches: see compute_loss.
        self.returns_mean, self.model_accepts_loss_kwargs = not self.model_accepts_loss_kwargs, True
        takes = inspect.signature(type(method.base).forward).parameters
        if "logits_to_keep" in takes and self._loss_shifts_labels:
            self.data_collator = partial(collate, answers_only=True)
        self.remove_callback(PrinterCallback)  # it would print among the command's own output
        self.add_callback(_Losses(self, advice))
        if type(method).after_step is not Method.after_step:
            self.add_callback(_AfterStep(method))
        self.diverged: torch.Tensor | None = (
            None  # whether a loss was not finite: on the device, where it costs no wait
        )
        if self.is_fsdp_enabled:  # a model's list has layers of parts that this one may lack, which accelerate refuses
            present = {type(module).__name__ for module in self.model.modules()} & set(self.model._no_split_modules)
            self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(present)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if num_training_steps == 1:  # the first step of a warm-up has the rate 0
            self.args.warmup_steps = 0
        return super().create_scheduler(num_training_steps, optimizer)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        return self.train_dataset.order or super()._get_train_sampler(train_dataset)

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
        wrong = ~torch.isfinite(loss.detach())
        self.diverged = wrong if self.diverged is None else self.diverged | wrong
        return (loss, outputs) if return_outputs else loss

    def _share_of_labels(self, labels: torch.Tensor, in_step: torch.Tensor) -> torch.Tensor:
        """Of those in a step, of all processes whose gradients are averaged: labels [B, L], -100 where there is none."""
        labels = labels[..., 1:] if self._loss_shifts_labels else labels
        averaged = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return labels.ne(-100).sum() / in_step * averaged

    def trainable(self) -> dict[str, torch.Tensor]:
        """The tensors that a checkpoint holds, themselves."""
        parameters = {unwrapped(name): p for name, p in self.model.named_parameters() if p.requires_grad}
        return parameters | {f"{PROGRESS}{name}": tensor for name, tensor in self.method.progress().items()}

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            self._save_tensors(Path(output_dir or self.args.output_dir), self.trainable())

    def _save_tensors(self, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: t.detach().clone().contiguous() for name, t in tensors.items()}, folder / TENSORS)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # What accelerate would write is read with pickle, which runs the code of whoever wrote there.
        tensors = {name: full_tensor(tensor.detach()) for name, tensor in self.trainable().items()}
        optimizer = self.optimizer.state_dict()
        optimizer["state"] = {
            index: {key: full_tensor(value) for key, value in entry.items()}
            for index, entry in optimizer["state"].items()
        }
        if self.args.should_save:
            self._save_tensors(Path(output_dir), tensors)
            torch.save(optimizer, Path(output_dir) / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # what comes next, the Trainer's state, says that the checkpoint is complete
        if self.args.should_save:
            sync(Path(output_dir))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                seal(folder)
        except (OSError, SafetensorError, RuntimeError) as error:  # the last is torch.save's
            if isinstance(error, torch.OutOfMemoryError) or lost_process(error):
                raise
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
            raise UserError(
                f"{folder} could not be written ({reason}); free space and run the same command again, which goes on from the "
                "checkpoint before"
            ) from error

    @torch.no_grad()
    def load(self, checkpoint: str) -> None:
        """The tensors and the Trainer's state of a checkpoint."""
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / STATE))
        self.args.logging_steps = (
            self.state.logging_steps
        )  # given as a share of all steps, of which the Trainer would warn
        with safe_open(Path(checkpoint) / TENSORS, framework="pt") as stored:
            for name, tensor in self.trainable().items():
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

    def put_tensorboard(self, folder: Path) -> None:
        """Let tensorboard's files, if it is one of the trackers, go to `folder`, which outlives the checkpoints."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback):
                callback.logging_dir = str(folder)

    def losses(self) -> list[list[float]]:
        """[step, mean training loss since the entry before] at each logged step, those before a resumption included."""
        logged = (entry for entry in self.state.log_history if "loss" in entry)
        return [[entry["step"], float(f"{entry['loss']:.5g}")] for entry in logged]

    @staticmethod
    def finished(checkpoint: str) -> bool:
        """Whether the checkpoint was made by the last step of its stage."""
        state = TrainerState.load_from_json(str(Path(checkpoint) / STATE))
        return state.global_step >= state.max_steps


class _Losses(TrainerCallback):
    """Logs the last step, too, and ends a training whose loss is not finite."""

    def __init__(self, trainer: TaskTrainer, advice: str) -> None:
        self.trainer, self.advice = trainer, advice

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= state.global_step >= state.max_steps
        looks = control.should_log or control.should_save or state.global_step % 10 == 0
        if looks and any(processes.all_gather(bool(self.trainer.diverged))):
            raise Diverged(
                f"training {args.run_name} diverged: its loss is not finite at step {state.global_step} of "
                f"{state.max_steps}; {self.advice}"
            )

    def on_train_end(self, args, state, control, **kwargs):
        wandb = sys.modules.get("wandb")
        if "wandb" in args.report_to and wandb is not None and wandb.run is not None:
            wandb.finish()  # transformers would log the next stage into the same run


class _AfterStep(TrainerCallback):
    """Lets the method act after each step of the optimizer, before the gradients go."""

    def __init__(self, method: Method) -> None:
        self.method = method

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, optimizer, **kwargs):
        self.method.after_step(state.global_step + 1, state.max_steps, optimizer)


def sharded_like(own: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`value`, which every process has in full, divided among them as `own` is."""
    if not is_sharded(own):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
