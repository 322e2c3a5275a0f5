"""LiLoRA behaves as PEFT's and transformers' users expect an adapter method to behave."""

import copy
import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import transformers
from peft import get_peft_model
from support.habits import (
    MLP,
    QUIET,
    VOCAB,
    adapted,
    assert_close,
    expected_learning,
    ids,
    learning,
    llama,
    llava,
    llava_batch,
    logits,
    of_task,
    one_sentence,
    randomise,
    settings,
    train,
)
from torch.utils.data import Dataset

from lilora import LiLoRAConfig
from lilora.errors import UserError
from lilora.families import target_modules
from lilora.peft.best_task import LoadBestTasks
from lilora.peft.layer import adapted_layers
from lilora_kernels import freeze, set_task

pytestmark = QUIET


# --- adapters are tasks -----------------------------------------------------------------------------------------------


def test_never_freezes_the_shared_factors_from_the_start():
    model = get_peft_model(llama(), settings(train_a="never", train_b0="never"), adapter_name="a")
    assert learning(model) == expected_learning(model, "a")


@pytest.mark.parametrize("preset", ["paper", "released", "frozen"])
def test_what_training_a_second_task_does_to_the_first(preset):
    model, x = get_peft_model(llama(), settings(preset), adapter_name="a"), ids()
    train(model, x)
    before = of_task(model, "a", x)
    layer = next(iter(adapted_layers(model).values()))
    a, b0 = layer.lilora_A["a"].detach().clone(), layer.lilora_B["a"].detach().clone()
    model.add_adapter("b", settings(preset))
    model.set_adapter("b")
    train(model, ids())
    assert layer.lilora_U["b"].abs().max() > 0, "the second task has learnt"
    assert torch.equal(layer.lilora_A["a"], a) == (preset == "frozen")
    assert torch.equal(layer.lilora_B["a"], b0) == (preset != "paper")
    assert torch.equal(of_task(model, "a", x), before) == (preset == "frozen")
    assert torch.equal(of_task(model, "b", x), before) is False


# --- merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["unload", "merge_and_unload"])
def test_unloading_leaves_a_plain_model_that_can_be_adapted_again(how):
    base, x = llama(), ids()
    attributes, expected = set(base.__dict__), logits(base, x)
    model = adapted(base=base)
    model.gradient_checkpointing_enable()
    if how == "merge_and_unload":
        expected = of_task(model, "a", x)
    plain = getattr(model, how)()
    assert plain is base
    assert set(plain.__dict__) - attributes <= {"_require_grads_hook", "_require_grads_hooks"}  # of checkpointing
    assert not adapted_layers(plain)
    assert_close(logits(plain, x), expected)
    plain.requires_grad_(True)
    plain.train()(input_ids=x, labels=x).loss.backward()  # checkpointing is that of transformers again
    again = get_peft_model(plain, settings(), adapter_name="z")
    assert learning(again) == expected_learning(again, "A", "B0", "z"), "z is the first task of a new chain"
    assert_close(logits(again.eval(), x, task_ids=torch.tensor([0, 0, -1])), expected)


# --- task ids ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_follows_the_task_of_each_sample(beams):
    model, x = adapted(), ids()
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    single = {}
    for task in "ab":
        model.set_adapter(task)
        single[task] = model.generate(input_ids=x, **options)
    with model.disable_adapter():
        single[None] = model.generate(input_ids=x, **options)
    assert len({tuple(rows.flatten().tolist()) for rows in single.values()}) == 3, "the tasks say different things"
    for order in (["a", "b", None], ["b", None, "a"]):
        expected = torch.stack([single[task][i] for i, task in enumerate(order)])
        assert torch.equal(model.generate(input_ids=x, task_ids=order, **options), expected)
        names = ["__base__" if task is None else task for task in order]
        assert torch.equal(model.generate(input_ids=x, adapter_names=names, **options), expected)
    if beams > 1:
        several = model.generate(input_ids=x, task_ids=["a", "b", None], num_return_sequences=2, **options)
        expected = [
            model.generate(input_ids=x[i : i + 1], task_ids=[t], num_return_sequences=2, **options)
            for i, t in enumerate(["a", "b", None])
        ]
        assert torch.equal(several, torch.cat(expected))


@pytest.mark.parametrize(
    "task_ids, error, words",
    [
        (["a", "b"], ValueError, r"task_ids has the shape \[2\]; it must be \[3\]"),
        (torch.zeros(3, 1, dtype=torch.int32), ValueError, r"task_ids has the shape \[3, 1\]"),
        ([0, 1, 2], ValueError, r"task_ids holds 2; known ids are \{0: 'a', 1: 'b'\}"),
        ([0, 1, -2], ValueError, "task_ids holds -2"),
        (["a", "b", "x"], ValueError, r"task 'x' is unknown; this model knows \['a', 'b'\]"),
        (torch.zeros(3), TypeError, "task_ids is torch.float32; it must be torch.int32"),
        (torch.ones(3, dtype=torch.bool), TypeError, "task_ids is torch.bool"),
        ([0.0, 1.0, 0.0], TypeError, "it must hold task names or integer ids"),
        ([True, False, True], TypeError, "it must hold task names or integer ids"),
        ("abb", TypeError, "task_ids is 'abb'; pass one name or id per sample, in a list"),
        (1, TypeError, "task_ids is 1; pass one name or id per sample, in a list"),
        (np.int64(1), TypeError, r"task_ids is np.int64\(1\); pass one name or id per sample, in a list"),
        (np.zeros(3), TypeError, "it must hold task names or integer ids"),
        (np.array([True, False, True]), TypeError, "it must hold task names or integer ids"),
    ],
)
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_wrong_task_ids_are_one_sentence(task_ids, error, words, call):
    model, x = adapted(), ids()
    before = logits(model, x)
    options = {"forward": {}, "generate": {"max_new_tokens": 2}}[call]
    with pytest.raises(error, match=words) as caught:
        getattr(model, call)(input_ids=x, task_ids=task_ids, **options)
    one_sentence(caught)
    assert torch.equal(logits(model, x), before), "no route is left behind"


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize("kind", ["CAUSAL_LM", None])
def test_two_ways_to_say_the_tasks_are_refused(call, kind):
    model, x = get_peft_model(llama(), LiLoRAConfig(r=4, target_modules=["down_proj"], task_type=kind), "a"), ids()
    with pytest.raises(
        UserError, match="task_ids and adapter_names both say which task each sample has; pass one"
    ) as caught:
        getattr(model, call)(input_ids=x, task_ids=["a"] * 3, adapter_names=["a"] * 3)
    one_sentence(caught)


def test_peft_hears_of_tasks_that_are_set():
    """Its merge, its files and its reports are of those that it believes active."""
    model, x = adapted(), ids()
    wanted = of_task(model, "b", x)
    model.train().set_adapter("a")
    set_task(model, "a", "b")
    assert model.active_adapters == model.base_model.active_adapter == ["a", "b"]
    model(input_ids=x, task_ids=["a", "b", "a"]).logits.sum().backward()
    set_task(model.eval(), "b")
    assert (model.active_adapter, model.active_adapters) == ("b", ["b"])
    assert_close(logits(model, x), wanted)
    assert_close(logits(model.merge_and_unload(), x), wanted)


def test_several_tasks_are_made_active_as_one_is():
    model, x = adapted(), ids()
    model.set_adapter(["b", "a"])
    assert (model.active_adapter, model.active_adapters) == ("b", ["b", "a"])
    model.train()(input_ids=x, task_ids=["a", "b", "a"]).logits.sum().backward()
    with pytest.raises(UserError, match=r"task 'c' is unknown; this model knows \['a', 'b'\]"):
        model.set_adapter(["a", "c"])
    assert model.active_adapters == ["b", "a"]
    model.set_adapter(["a"])
    assert (model.active_adapter, model.active_adapters) == ("a", ["a"])


def test_transformers_hears_of_tasks_that_are_set():
    model = llama()
    for task in "ab":
        model.add_adapter(settings(), task)
    randomise(model)
    set_task(model, "b", train=False)
    assert model.active_adapters() == ["b"]
    assert all(layer.merged_weight(None, False)[0] == "b" for layer in adapted_layers(model).values())


def test_a_server_adds_and_deletes_any_number_of_tasks_in_the_room_of_a_few():
    model, x = adapted(), ids()
    freeze(model, capacity=3)
    config = model.peft_config["a"]
    for step in range(5):
        model.add_adapter(f"t{step}", config)
        randomise(model)
        wanted = [of_task(copy.deepcopy(model), task, x) for task in (f"t{step}", "b")]
        got = logits(model, x, task_ids=[f"t{step}", "b", None])
        for i, want in enumerate(wanted):
            assert_close(got[i], want[i])
        model.delete_adapter(f"t{step}")


@pytest.mark.parametrize("given", [np.array([0, 1, 0]), list(np.array([0, 1, 0])), np.array(["a", "b", "a"])])
def test_numpy_ids_and_names(given):
    model, x = adapted(), ids()
    assert torch.equal(logits(model, x, task_ids=given), logits(model, x, task_ids=["a", "b", "a"]))


def gradients(model, x, **kwargs):
    """Gradients of a loss that sums over samples, by name."""
    model.zero_grad(set_to_none=True)
    weights = torch.linspace(-1, 1, VOCAB, dtype=torch.float64)
    (model(input_ids=x, **kwargs).logits.tanh() @ weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
def test_training_on_a_mixed_batch_is_training_on_each_task_alone(checkpointing):
    model, x = adapted(preset="paper"), ids(4)
    model.base_model.set_adapter(["a", "b"])
    model.train()
    parts = {"a": x[[0, 2]], "b": x[[1, 3]]}
    expected = {}
    for task, rows in parts.items():
        for name, gradient in gradients(model, rows, task_ids=[task] * 2).items():
            expected[name] = expected.get(name, 0) + gradient
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(expected)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    got = gradients(model, x, task_ids=["a", "b", "a", "b"])
    assert set(got) == set(expected)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0
        assert_close(got[name], gradient)
    with pytest.raises(ValueError, match=r"\['a', 'b'\] are active together; pass task ids"):
        model(input_ids=x)


class Samples(Dataset):
    def __init__(self, task, x):
        self.task, self.x = task, x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"input_ids": self.x[i], "labels": self.x[i], "task_ids": self.task}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_carries_task_ids(tmp_path, checkpointing):
    x, changed, losses = ids(4), {}, {}
    for task, number in (("a", 0), ("b", 1)):
        torch.manual_seed(7)
        model = adapted()
        model.base_model.set_adapter(["a", "b"])
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            max_steps=2,
            learning_rate=0.1,
            weight_decay=0.0,
            gradient_checkpointing=checkpointing,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=Samples(number, x))
        trainer.train()
        losses[task] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        changed[task] = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    own = {
        task: {n for n in before if n.endswith(f".{task}") and "lilora_A" not in n and "lilora_B" not in n}
        for task in "ab"
    }
    shared = {name for name in before if "lilora_A" in name or "lilora_B" in name}
    assert changed == {task: own[task] | shared for task in "ab"}
    assert losses["a"] != losses["b"]


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_trainer_goes_on_with_several_tasks(tmp_path, order):
    """Tasks a and b train together, c is there; transformers makes the first of them the only one."""
    x, models = ids(4), []
    for resume in (None, str(tmp_path / "checkpoint-1")):
        torch.manual_seed(7)
        model = adapted("abc", modules_to_save=["lm_head"])
        model.base_model.set_adapter(list(order))
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, learning_rate=0.1, save_steps=1, report_to=[], use_cpu=True
        )
        data = torch.utils.data.ConcatDataset([Samples("abc".index(task), x) for task in "ab"])
        transformers.Trainer(model, arguments, train_dataset=data).train(resume_from_checkpoint=resume)
        models.append(model)
    assert models[1].active_adapters == list(order)
    assert learning(models[1]) == learning(models[0])
    assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True))
    models[1].set_adapter(order[0])
    assert models[1].active_adapters == [order[0]]


@pytest.mark.parametrize("task, preset", [("a", "frozen"), ("b", "frozen"), ("ab", "frozen"), ("b", "paper")])
def test_trainer_ends_with_the_best_tasks(tmp_path, task, preset):
    """A learning rate that spoils the model: the first checkpoint is the best."""
    model, x = adapted(preset=preset), ids(4)
    model.base_model.set_adapter(list(task))
    data, scores, states = Samples(0 if task == "a" else 1, x), iter([0.0, 1.0]), []
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        learning_rate=1.0,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=False,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )

    def score(_):
        states.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return {"score": next(scores)}

    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=score,
        callbacks=[LoadBestTasks()],
    )
    trainer.train()
    assert len(states) == 2
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert all(torch.equal(p, states[0][name]) for name, p in model.named_parameters())


# --- LLaVA ------------------------------------------------------------------------------------------------------------


def llava_single(model, batch, images, i, **kwargs):
    start = sum(images[:i])
    part = {"input_ids": batch["input_ids"][i : i + 1], **kwargs}
    if images[i]:
        part["pixel_values"] = batch["pixel_values"][start : start + images[i]]
    return part


def test_without_targets_the_language_model_of_llava_is_adapted():
    model = adapted(base=llava(), target_modules=None)
    assert set(adapted_layers(model)) == {
        f"model.language_model.layers.{i}.mlp.{part}" for i in range(2) for part in MLP
    }
    model = get_peft_model(llama(), settings(target_modules=None))
    model.add_adapter("b", settings(target_modules=None))
    assert set(adapted_layers(model)) == {f"model.layers.{i}.mlp.{part}" for i in range(2) for part in MLP}


@pytest.mark.parametrize("images", [(1, 1, 1), (2, 0, 1)])
def test_llava_with_its_projector_in_mixed_batches(images):
    """Two images of one sample, none of another: the projector's rows follow the images, not the batch."""
    model = adapted(base=llava(), target_modules=target_modules("llava", projector=True))
    assert "model.multi_modal_projector.linear_1" in adapted_layers(model)
    batch, tasks = llava_batch(images), ["a", "b", None]
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    mixed = model(**batch, task_ids=tasks).logits
    generated = model.generate(**batch, task_ids=tasks, **options)
    for i, task in enumerate(tasks):
        model.set_adapter(task or "a")
        single = llava_single(model, batch, images, i)
        with model.disable_adapter() if task is None else nullcontext():
            assert_close(mixed[i], model(**single).logits[0])
            assert torch.equal(generated[i], model.generate(**single, **options)[0])


def test_llava_trains_on_mixed_batches_under_checkpointing():
    images = (2, 0, 1)
    model = adapted(base=llava(), target_modules=target_modules("llava", projector=True), preset="paper")
    model.base_model.set_adapter(["a", "b"])
    model.train()
    batch, tasks = llava_batch(images), ["a", "b", "a"]
    weights = torch.linspace(-1, 1, VOCAB, dtype=torch.float64)

    def backward(**inputs):
        (model(**inputs).logits.tanh() @ weights).sum().backward()

    for i, task in enumerate(tasks):
        backward(**llava_single(model, batch, images, i), task_ids=[task])
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    model.gradient_checkpointing_enable()
    backward(**batch, task_ids=tasks)
    for name, gradient in expected.items():
        assert_close(dict(model.named_parameters())[name].grad, gradient)


def test_a_reference_forward_without_adapters_may_come_between_forward_and_backward():
    """As preference training does: the policy's forward, then the base model's under disable_adapter, then backward."""
    model = adapted()
    model.set_adapter("b")
    x = ids()
    gradients = []
    for with_reference in (False, True):
        model.zero_grad()
        loss = model(input_ids=x).logits.square().mean()
        if with_reference:
            with torch.no_grad(), model.disable_adapter():
                model(input_ids=x)
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() != set()
    for name, grad in gradients[0].items():
        assert torch.equal(gradients[1][name], grad)


@pytest.mark.parametrize("r, sub_rank", [(1, 1), (8, 4), (9, 4), (128, 64)])
def test_sizes_that_are_not_given_follow_r(r, sub_rank, tmp_path):
    """And are saved as the numbers that they were."""
    config = LiLoRAConfig(r=r, target_modules=["x"])
    assert (config.sub_rank, config.alpha) == (sub_rank, 2.0 * r)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["sub_rank"], saved["alpha"]) == (sub_rank, 2.0 * r)
    assert LiLoRAConfig(r=r, sub_rank=1, alpha=5.0).alpha == 5.0
