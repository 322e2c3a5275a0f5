"""The best weights of a Trainer's run, which transformers keeps of an adapter named `default` alone."""

from pathlib import Path
from typing import Any

from accelerate.utils import extract_model_from_parallel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class LoadBestTasks(TrainerCallback):
    """With `load_best_model_at_end=True`, load the tasks of the best checkpoint when the training ends.

    `Trainer(..., callbacks=[LoadBestTasks()])`. transformers looks for weights in the checkpoint itself; PEFT writes those of an
    adapter with a name of its own into a folder of that name.
    """

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if not args.load_best_model_at_end or state.best_model_checkpoint is None:
            return
        model = extract_model_from_parallel(model, keep_torch_compile=False)
        for task in model.peft_config:
            if (folder := Path(state.best_model_checkpoint, task)).is_dir():
                model.load_adapter(folder, task, is_trainable=True)
