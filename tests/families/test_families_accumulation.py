"""A step over several batches is the step over all their samples at once, however long each answer is."""

import copy

import pytest
import torch
from support.families import adapted, batch
from support.family_configs import CLASSIFIERS, FAMILIES, NO_IMAGES
from support.formula import Formula
from transformers import TrainingArguments

from lilora.continual.trainer import TaskTrainer

ANSWERS = [1, 4]


class Data(torch.utils.data.Dataset):
    order = None

    def __init__(self, name):
        self.samples = batch(name, [[], []] if FAMILIES[name].batches == (NO_IMAGES,) else [[0], [2]])

    def __len__(self):
        return len(ANSWERS)

    def __getitem__(self, index):
        return index

    def collate(self, indices, dtype):
        """One sample, or both."""
        inputs = self.samples.inputs(*(indices if len(indices) == 1 else ()))
        answers = inputs.get("decoder_input_ids", inputs["input_ids"])
        labels = torch.full_like(answers, -100)
        for row, answer, index in zip(labels, answers, sorted(indices), strict=True):
            row[-ANSWERS[index] :] = answer[-ANSWERS[index] :]
        return inputs | {"labels": labels}


def learned(name, data, folder, size):
    """What one step of gradient descent changes."""
    model = copy.deepcopy(adapted(name))
    model.set_adapter("read")
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=len(ANSWERS) // size,
        max_steps=1,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    method = Formula(model)
    result = TaskTrainer(method, arguments, data).train()
    return {n: p.detach() - before[n] for n, p in model.named_parameters() if n in before}, result.training_loss


@pytest.mark.parametrize("name", [n for n, family in FAMILIES.items() if family.auto not in CLASSIFIERS])
def test_accumulation_of_unequal_answers_is_the_full_batch(name, tmp_path):
    data, precision = Data(name), max(1e-6, 10 * FAMILIES[name].precision)
    accumulated, loss = learned(name, data, tmp_path, 1)
    at_once, wanted = learned(name, data, tmp_path, 2)
    assert loss == pytest.approx(wanted, rel=1e-6)
    for key, change in at_once.items():
        assert (accumulated[key] - change).abs().max() <= precision * change.abs().max(), key
    assert sum(change.abs().sum() for change in at_once.values()) > 0
