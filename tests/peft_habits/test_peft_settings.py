"""The settings of a LiLoRAConfig, those of PEFT among them, and what is said of wrong ones."""

import json
from functools import partial

import pytest
import torch
from peft import PeftConfig, get_peft_model, inject_adapter_in_model
from support.habits import (
    MLP,
    QUIET,
    adapted,
    assert_close,
    assert_tied,
    assert_unchanged,
    ids,
    learning,
    llama,
    logits,
    of_task,
    one_sentence,
    randomise,
    settings,
    state_of,
    train,
)
from torch import nn

from lilora import LiLoRAConfig
from lilora.errors import UserError
from lilora.peft.layer import adapted_layers

pytestmark = QUIET


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


@pytest.mark.parametrize(
    "name", ["keys", "weight", "lora_A", "lilora_U", "base_layer", "modules_to_save", "a.b", "a b", "", "-x", "ä"]
)
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
