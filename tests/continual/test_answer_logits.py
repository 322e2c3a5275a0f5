"""Training computes logits where they predict tokens of answers alone, with the loss and gradients of all logits."""

import pytest
import torch
from support.families import base, batch
from support.family_configs import FAMILIES
from support.formula import Formula
from torch.nn import functional as F
from transformers import TrainingArguments

from lilora.bank.bank import Bank
from lilora.continual import trainer
from lilora.continual.trainer import StageData, TaskTrainer, with_answer_logits

IGNORED = -100
LABELS = torch.tensor([[IGNORED, IGNORED, 7, 8, IGNORED, IGNORED], [5, IGNORED, IGNORED, IGNORED, 9, 3]])


def test_the_positions_kept_are_those_ahead_of_an_answer():
    inputs = with_answer_logits({"input_ids": LABELS.clamp(min=0), "labels": LABELS})
    assert inputs["logits_to_keep"].tolist() == [1, 2, 3, 4]  # nothing predicts the first token, and the last nothing
    assert inputs["shift_labels"].tolist() == [[7, 8, IGNORED, IGNORED], [IGNORED, IGNORED, 9, 3]]


def trainer_of(name, tmp_path):
    """(a trainer of a family's tiny model, a batch of it that is collated for that trainer)"""
    model, samples = base(name), batch(name, FAMILIES[name].batches[0])
    labels = samples.labels().clone()
    labels[:, : labels.shape[1] // 2] = IGNORED
    labels[0, -2:] = IGNORED
    inputs = samples.inputs() | {"labels": labels}
    method = Formula(model)
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, remove_unused_columns=False)
    made = TaskTrainer(method, arguments, StageData([0], lambda samples: inputs, 1))
    made.current_gradient_accumulation_steps = 2
    return made, made.data_collator([0])


# A loss that counts the labels of a step, one that is a mean over the batch, a soft cap of the logits, and a text model.
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "llama"])
def test_loss_and_gradients_are_those_of_all_logits(name, tmp_path, monkeypatch):
    narrow = torch.Tensor.float  # transformers computes the loss in fp32
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor if tensor.is_floating_point() else narrow(tensor))
    made, inputs = trainer_of(name, tmp_path)
    model = made.model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    in_step = 4 * (inputs["labels"][:, 1:] != IGNORED).sum()  # those of three more batches
    loss, outputs = made.compute_loss(model, inputs, return_outputs=True, num_items_in_batch=in_step)
    assert outputs.logits.shape[1] == len(inputs["logits_to_keep"]) < inputs["labels"].shape[1]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)

    plain = {key: value for key, value in inputs.items() if key not in ("labels", "logits_to_keep", "shift_labels")}
    logits = model(**plain).logits
    following = inputs["labels"][:, 1:]
    wanted = F.cross_entropy(logits[:, :-1].transpose(1, 2), following, reduction="sum") / in_step
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    for got, want in zip(found, torch.autograd.grad(wanted, parameters, allow_unused=True), strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", ["video_llama_3", "gpt2"])
def test_a_model_that_does_not_take_it_computes_all(name, tmp_path):
    made, inputs = trainer_of(name, tmp_path)
    assert "logits_to_keep" not in inputs
    _, outputs = made.compute_loss(made.model, inputs, return_outputs=True)
    assert outputs.logits.shape[1] == inputs["labels"].shape[1]


@pytest.mark.parametrize("method", ["lilora", "lwf"])
def test_a_run_ends_as_with_all_logits(method, suite, tmp_path, lilora, train_options, monkeypatch):
    """With accumulation and checkpointing."""
    more = ["--method", method, "--order", "colour,count", "--max-steps", 3, "--gradient-accumulation", 2]
    command = ["train", suite / "tasks.yaml", *train_options, *more, "--gradient-checkpointing", "--lr", "1e-3"]
    assert lilora(*command, "--out", tmp_path / "kept")[0] == 0
    calls = []
    monkeypatch.setattr(trainer, "with_answer_logits", lambda inputs: calls.append(1) or inputs)
    assert lilora(*command, "--out", tmp_path / "all")[0] == 0
    assert calls
    kept, every = (Bank.open(tmp_path / folder / "bank") for folder in ("kept", "all"))
    for task in ("colour", "count"):
        for some, others in zip(kept.load_task(task), every.load_task(task), strict=True):
            assert some.keys() == others.keys()
            for name, tensor in some.items():
                torch.testing.assert_close(tensor, others[name], rtol=1e-4, atol=1e-5)
