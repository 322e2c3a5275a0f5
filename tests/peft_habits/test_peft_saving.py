"""Adapter folders of LiLoRA tasks as PEFT and transformers save and load them."""

import copy
import json

import pytest
import torch
import transformers
from peft import PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file
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
)
from torch import nn

from lilora.errors import UserError
from lilora.peft.tuner import shared_fingerprint

pytestmark = QUIET


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


@pytest.mark.parametrize("name", ["0", "layers", "model"])
def test_a_task_may_be_called_as_a_module_is(base_folder, tmp_path, name):
    model, x, mixed = adapted(("a", name), load_base(base_folder)), ids(), ["a", name, None]
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load_base(base_folder), tmp_path / "a", adapter_name="a").eval()
    again.load_adapter(tmp_path / name, name)
    assert torch.equal(logits(again, x, task_ids=mixed), logits(model, x, task_ids=mixed))


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


def test_a_task_that_does_not_train_is_not_loaded_over_with_foreign_shared_factors(base_folder, saved, foreign):
    """Also where another one is active that trains A and B0."""
    model = PeftModel.from_pretrained(load_base(base_folder), saved[0] / "a", adapter_name="a", is_trainable=True)
    model.load_adapter(saved[0] / "b", "b")
    model.set_adapter("a")
    assert model.get_base_model().model.layers[0].mlp.up_proj.lilora_A["a"].requires_grad
    before = state_of(model)
    with pytest.raises(UserError, match="differs from the model's, which its other tasks share") as e:
        model.load_adapter(foreign[0], "b")
    one_sentence(e)
    assert_unchanged(model, before)


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
