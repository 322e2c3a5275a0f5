"""LiLoRA behaves as PEFT's and transformers' users expect an adapter method to behave."""

import copy
import json
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file
from support.habits import (
    MLP,
    VOCAB,
    adapted,
    assert_close,
    assert_tied,
    assert_unchanged,
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
    state_of,
    train,
)
from torch import nn
from torch.utils.data import Dataset

from lilora import LiLoRAConfig
from lilora.errors import UserError
from lilora.families import target_modules
from lilora.peft.best_task import LoadBestTasks
from lilora.peft.layer import adapted_layers
from lilora.peft.tuner import shared_fingerprint

pytestmark = [
    pytest.mark.filterwarnings("ignore:Adapter name:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
    pytest.mark.filterwarnings("ignore:. was active:UserWarning"),
]

# --- adapters are tasks -------------------------------------------------------------------------------------------------


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


# --- saving and loading -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(3)
    llama().save_pretrained(folder)
    return folder


def load_base(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def saved(base_folder, tmp_path_factory):
    """(folder with a task per subfolder, inputs, the outputs of a mixed batch, fingerprint of the shared factors)."""
    torch.manual_seed(4)
    folder, x = tmp_path_factory.mktemp("tasks"), ids()
    model = adapted(base=load_base(base_folder))
    model.save_pretrained(folder)
    return folder, x, logits(model, x, task_ids=["a", "b", None]), shared_fingerprint(model)


@pytest.fixture(scope="module")
def foreign(base_folder, tmp_path_factory):
    """A task of another chain: its shared factors differ."""
    torch.manual_seed(5)
    folder, x = tmp_path_factory.mktemp("foreign"), ids()
    model = adapted(base=load_base(base_folder))
    model.save_pretrained(folder)
    return folder / "b", x, of_task(model, "b", x), shared_fingerprint(model)


def test_a_folder_holds_one_task_and_the_shared_factors(saved):
    folder, _, _, fingerprint = saved
    config = json.loads((folder / "a" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LILORA"
    assert config["shared_fingerprint"] == fingerprint
    names = set(load_file(folder / "a" / "adapter_model.safetensors"))
    layers = [f"base_model.model.model.layers.{i}.mlp.{part}" for i in range(2) for part in MLP]
    assert names == {f"{layer}.lilora_{key}" for layer in layers for key in ("A", "B", "U", "V", "fusion")}


@pytest.mark.parametrize(
    "order, first", [("a", "a"), ("b", None), ("ab", "a"), ("ba", "a"), ("x", "x")], ids=lambda value: str(value)
)
def test_a_folder_remembers_its_place_in_the_chain(base_folder, saved, order, first):
    """Whichever tasks are loaded, and under whatever names: A and B0 train with the one that they were made with."""
    folder, _, _, _ = saved
    base, (start, *rest) = load_base(base_folder), order
    model = PeftModel.from_pretrained(base, folder / start.replace("x", "a"), adapter_name=start, is_trainable=True)
    for task in rest:
        model.load_adapter(folder / task, task, is_trainable=True)
    for task in order:
        model.set_adapter(task)
        trained = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
        own = {"lilora_U", "lilora_V", "lilora_fusion"}
        assert trained == (own | {"lilora_A", "lilora_B"} if task == first else own)
    model.add_adapter("c", model.peft_config[start])  # a config that was loaded makes a new task as any other
    model.set_adapter("c")
    assert not any(p.requires_grad for name, p in model.named_parameters() if "lilora_A" in name)


def test_a_config_serves_again_after_its_task_was_saved_and_learned_on(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    randomise(model)
    model.add_adapter("c", copy.deepcopy(model.peft_config["b"]))
    assert_tied(model, "abc")


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_foreign_shared_factors_are_refused(base_folder, saved, foreign, low_cpu_mem_usage):
    folder, x, *_ = saved
    model = PeftModel.from_pretrained(load_base(base_folder), folder / "a", adapter_name="a").eval()
    before, output = state_of(model), logits(model, x)
    with pytest.raises(
        UserError, match=rf"made with the shared factors {foreign[3]}, but this model has {saved[3]}"
    ) as e:
        model.load_adapter(foreign[0], "c", low_cpu_mem_usage=low_cpu_mem_usage)
    one_sentence(e)
    assert_unchanged(model, before)
    assert torch.equal(logits(model, x), output)
    model.load_adapter(folder / "b", "b")
    assert_close(logits(model, x, task_ids=["a", "b", None]), saved[2])


def test_foreign_shared_factors_replace_on_demand(base_folder, saved, foreign, tmp_path):
    for file in foreign[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"on_shared_mismatch": "replace"}))
    model = PeftModel.from_pretrained(load_base(base_folder), saved[0] / "a", adapter_name="a")
    model.load_adapter(tmp_path, "b")
    assert_tied(model, "ab")
    assert shared_fingerprint(model) == foreign[3]
    assert_close(logits(model, foreign[1], task_ids=["b"] * 3), foreign[2])
    plain = load_base(base_folder)
    plain.load_adapter(str(saved[0] / "a"), adapter_name="a")
    plain.load_adapter(str(tmp_path), adapter_name="b")
    assert_close(logits(plain, foreign[1], task_ids=["b"] * 3), foreign[2])
    assert_tied(plain, "ab")


def test_foreign_shared_factors_do_not_replace_those_of_a_merged_task(base_folder, saved, foreign):
    model = PeftModel.from_pretrained(load_base(base_folder), saved[0] / "a", adapter_name="a")
    model.load_adapter(saved[0] / "b", "b")
    model.peft_config["b"].on_shared_mismatch = "replace"
    base = {name: p.clone() for name, p in model.named_parameters() if "base_layer" in name}
    model.merge_adapter(["a"])
    before = state_of(model)
    with pytest.raises(UserError, match="differs from the model's, and task 'a' is merged; unmerge it first") as e:
        set_peft_model_state_dict(model, load_file(foreign[0] / "adapter_model.safetensors"), "b")
    one_sentence(e)
    assert_unchanged(model, before)
    set_peft_model_state_dict(model, load_file(saved[0] / "b" / "adapter_model.safetensors"), "b")  # of the same chain
    model.unmerge_adapter()
    for name, parameter in model.named_parameters():
        if name in base:
            torch.testing.assert_close(parameter, base[name])
    assert_close(logits(model, saved[1], task_ids=["a", "b", None]), saved[2])


def test_transformers_loads_adapter_folders(base_folder, saved, foreign):
    folder, x, expected, fingerprint = saved
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "a", dtype=torch.float64).eval()
    assert_close(logits(model, x)[0], expected[0])
    assert learning(model) == set()
    model = load_base(base_folder)
    model.load_adapter(str(folder / "a"), adapter_name="a")
    model.load_adapter(str(folder / "b"), adapter_name="b")
    assert_close(logits(model, x, task_ids=["a", "b", None]), expected)
    assert_tied(model, "ab")
    assert shared_fingerprint(model) == fingerprint
    model.set_adapter("b")
    assert_close(logits(model, x)[1], expected[1])
    before = state_of(model)
    with pytest.raises(UserError, match="shared factors"):
        model.load_adapter(str(foreign[0]), adapter_name="c")
    assert_unchanged(model, before)


def test_injection_into_any_module():
    base = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    x, config = torch.randn(3, 7, dtype=torch.float64), settings(target_modules=["0", "2"])
    expected = base(x)
    model = inject_adapter_in_model(config, base, "a")
    model = inject_adapter_in_model(copy.deepcopy(config), model, "b")
    assert torch.equal(model(x), expected)
    randomise(model)
    mixed = model.eval()(x, task_ids=["a", "b", None])
    assert_close(mixed[2], expected[2])
    assert not torch.allclose(mixed[:2], expected[:2])


# --- merging ------------------------------------------------------------------------------------------------------------


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


# --- task ids -----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("task", ["a", "b", "ab"])
def test_trainer_ends_with_the_best_tasks(tmp_path, task):
    """A learning rate that spoils the model: the first checkpoint is the best."""
    model, x = adapted(), ids(4)
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


# --- other settings of PEFT ---------------------------------------------------------------------------------------------


def test_bias_of_the_adapted_layers():
    model = get_peft_model(llama(mlp_bias=True, attention_bias=True), settings(bias="lilora_only"), adapter_name="a")
    names = {name for name in learning(model) if isinstance(name, str)}
    mlp = {f"base_model.model.model.layers.{i}.mlp.{part}.base_layer.bias" for i in range(2) for part in MLP}
    assert names == mlp
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, ids())
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in changed if "lilora_" not in name} == mlp
    everything = get_peft_model(llama(mlp_bias=True, attention_bias=True), settings(bias="all"), adapter_name="a")
    assert len([name for name in learning(everything) if str(name).endswith("bias")]) == 2 * (3 + 4)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"exclude_modules": ["up_proj"]}, [(i, part) for i in range(2) for part in ("gate_proj", "down_proj")]),
        ({"layers_to_transform": [1]}, [(1, part) for part in MLP]),
        ({"layers_to_transform": 0, "layers_pattern": "layers"}, [(0, part) for part in MLP]),
        ({"target_modules": r".*\.1\.mlp\.up_proj"}, [(1, "up_proj")]),
        ({"target_modules": "all-linear"}, [(i, part) for i in range(2) for part in (*"qkvo", *MLP)]),
    ],
)
def test_which_layers_are_adapted(changes, expected):
    model = adapted(**changes)
    names = {
        f"model.layers.{i}.{'self_attn' if len(part) == 1 else 'mlp'}.{part + '_proj' if len(part) == 1 else part}"
        for i, part in expected
    }
    assert set(adapted_layers(model)) == names
    x = ids()
    assert_close(logits(model, x, task_ids=["b"] * 3), of_task(model, "b", x))


def test_settings_survive_the_file(tmp_path):
    config = settings(
        "paper", exclude_modules=["up_proj"], layers_to_transform=[1], modules_to_save=["lm_head"], fusion=False
    )
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert type(again) is LiLoRAConfig
    assert again.to_dict() == config.to_dict()
    assert (again.train_a, again.train_b0, again.stability) == ("always", "always", 1.0)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"r": 0}, "r is 0; it must be an integer of at least 1"),
        ({"r": True}, "r is True"),
        ({"sub_rank": 2.5}, "sub_rank is 2.5"),
        ({"sub_rank": 1000, "r": 8}, "sub_rank is 1000 and r is 8"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"alpha": "x"}, "alpha is 'x'; it must be a number"),
        ({"alpha": True}, "alpha is True; it must be a number"),
        ({"dropout": "0.1"}, "dropout is '0.1'; it must be a number"),
        ({"stability": None}, "stability is None; it must be a number"),
        ({"fusion": "no"}, "fusion is 'no'; it must be true or false"),
        ({"target_modules": 5}, "target_modules is 5; it must be a string or a list of strings"),
        ({"modules_to_save": [1]}, "modules_to_save is"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform is"),
        ({"dropout": 1.0}, "dropout is 1.0; it must be in"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"dropout": float("nan")}, "dropout is nan"),
        ({"stability": -1.0}, "stability is -1.0"),
        ({"train_a": "sometimes"}, "train_a is 'sometimes'; it must be one of"),
        ({"train_b0": None}, "train_b0 is None"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"on_shared_mismatch": "keep"}, "on_shared_mismatch is 'keep'"),
        ({"layers_pattern": "layers"}, "layers_pattern is given without layers_to_transform"),
        ({"target_modules": "x", "layers_to_transform": [0]}, "cannot be used with a regular expression"),
    ],
)
def test_wrong_settings_are_one_sentence(changes, words):
    with pytest.raises(UserError, match=words) as caught:
        settings(**changes)
    one_sentence(caught)


@pytest.mark.parametrize(
    "name, words",
    [
        ("lora_alpha", "it is alpha here, and scales by alpha / r as there"),
        ("lora_dropout", "it is dropout here"),
        ("use_rslora", r"to scale by alpha / sqrt\(r\), give alpha times sqrt\(r\)"),
        ("init_lora_weights", "B0 and U start at zero"),
        ("target_parameters", "of Parameters LiLoRA adapts those of routed experts"),
        ("rank_pattern", "r is that of all layers"),
        ("use_dora", "the settings are r, sub_rank, alpha"),
    ],
)
def test_settings_of_lora_say_what_to_do_instead(name, words):
    with pytest.raises(UserError, match=f"{name} is no setting of LiLoRAConfig; {words}") as caught:
        settings(**{name: None})
    one_sentence(caught)


def test_a_setting_of_a_newer_version_is_dropped_with_a_warning(tmp_path):
    settings().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"newer": 1}))
    with pytest.warns(UserWarning, match="newer"):
        assert PeftConfig.from_pretrained(tmp_path).r == settings().r


def test_unknown_preset():
    with pytest.raises(UserError, match=r"preset is 'best'; it must be one of \['frozen', 'paper', 'released'\]"):
        LiLoRAConfig.preset("best")


@pytest.mark.parametrize(
    "target, words",
    [
        (["gate_proj", "norm"], "model.norm is a LlamaRMSNorm; LiLoRA adapts linear layers"),
        (["embed_tokens"], "model.embed_tokens is a Embedding"),
        (["nothing"], "nothing"),
    ],
)
def test_a_target_that_is_no_linear_layer_leaves_the_model_alone(target, words):
    model, x = llama(), ids()
    before, output = state_of(model), logits(model, x)
    with pytest.raises(ValueError, match=words):
        get_peft_model(model, settings(target_modules=target), adapter_name="a")
    assert_unchanged(model, before)
    assert torch.equal(logits(get_peft_model(model, settings(), adapter_name="a"), x), output)


def test_a_first_task_that_is_refused_leaves_a_forward_of_others_in_place():
    """As accelerate's hooks put one on the instance."""
    model, x = llama(), ids()
    own = model.forward = partial(type(model).forward, model)
    with pytest.raises(UserError, match="LiLoRA adapts linear layers"):
        get_peft_model(model, settings(target_modules=["gate_proj", "norm"]), adapter_name="a")
    assert model.forward is own
    adapted(base=model).unload()
    assert model.forward is own
    assert logits(model, x).isfinite().all()


def test_a_convolution_is_refused():
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Flatten(), nn.Linear(3, 2))
    before = state_of(model)
    with pytest.raises(UserError, match="0 is a Conv2d; LiLoRA adapts linear layers: leave it out of target_modules"):
        inject_adapter_in_model(settings(target_modules=["2", "0"]), model, "a")
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["keys", "weight", "lora_A", "lilora_U", "a.b", "a b", "", "-x", "ä", "training"])
def test_forbidden_names_are_refused_before_anything_is_added(name):
    model = llama()
    before = state_of(model)
    with pytest.raises(ValueError, match=r"task name .* (reserved|not allowed)") as caught:
        get_peft_model(model, settings(), adapter_name=name)
    one_sentence(caught)
    assert_unchanged(model, before)
    model = adapted()
    before = state_of(model)
    with pytest.raises(ValueError, match=r"task name .* (reserved|not allowed)"):
        model.add_adapter(name, settings())
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"r": 4}, "r is 4, but the model's other tasks have 6; all tasks share it"),
        ({"alpha": 1.0}, "alpha is 1.0"),
        ({"train_a": "never"}, "train_a is 'never'"),
        ({"target_modules": ["up_proj"]}, "all tasks adapt the same layers: give c the target_modules"),
        ({"target_modules": [*MLP, "q_proj"]}, "all tasks adapt the same layers"),
        ({"target_modules": [*MLP, "norm"]}, "norm is a LlamaRMSNorm"),
        ({"exclude_modules": ["up_proj"]}, "all tasks adapt the same layers"),
    ],
)
@pytest.mark.parametrize("inference", [False, True])
def test_a_task_that_does_not_fit_the_others_leaves_nothing_behind(changes, words, inference):
    model, x = adapted(), ids()
    model.set_adapter("b", inference_mode=inference)
    before, output = state_of(model), logits(model, x)
    with pytest.raises(UserError, match=words) as caught:
        model.add_adapter("c", settings(**changes))
    one_sentence(caught)
    assert_unchanged(model, before)
    assert torch.equal(logits(model, x), output)
    model.add_adapter("c", settings())
    assert_tied(model, "abc")


def test_a_name_is_taken_once():
    model = llama()
    inject_adapter_in_model(settings(), model, "a")
    randomise(model)
    before = state_of(model)
    with pytest.raises(UserError, match="task 'a' exists already; delete it first or choose another name"):
        inject_adapter_in_model(settings(), model, "a")
    assert_unchanged(model, before)


def test_many_listed_targets_are_the_same_for_the_next_task():
    """PEFT shortens a long list in the first task's config; the next task still gives the whole list."""
    base = llama(num_hidden_layers=8)
    names = [f"model.layers.{i}.mlp.{part}" for i in range(8) for part in MLP]
    model = adapted(base=base, target_modules=names)
    assert set(adapted_layers(model)) == set(names)
    assert_tied(model, "ab")


# --- LLaVA --------------------------------------------------------------------------------------------------------------


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
