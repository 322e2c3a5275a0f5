"""Another task's tensors in the place of a live one: no tensor moves, no graph is compiled anew, or nothing is written."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from support.habits import (
    adapted,
    assert_close,
    assert_unchanged,
    ids,
    llama,
    logits,
    of_task,
    one_sentence,
    state_of,
)
from torch._dynamo.testing import CompileCounterWithBackend

from lilora import hotswap, route
from lilora.errors import UserError
from lilora_kernels import freeze

pytestmark = pytest.mark.filterwarnings("ignore:Adapter name:UserWarning")


@pytest.fixture
def chain(tmp_path):
    """(live model with the tasks a and b, inputs, folder of four tasks of its chain, the output of each)."""
    whole, x = adapted("abcd", llama(num_hidden_layers=1)), ids()
    whole.save_pretrained(tmp_path)
    outputs = {task: of_task(whole, task, x) for task in "abcd"}
    model = copy.deepcopy(whole)
    model.set_adapter("a", inference_mode=True)
    for task in "cd":
        model.delete_adapter(task)
    return model, x, tmp_path, outputs


def pointers(model):
    """Where everything lies that a captured graph may read; of a frozen model parameters are windows of the stacks."""
    return {name: p.data_ptr() for name, p in model.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize("source", ["folder", "tensors"])
def test_a_swapped_task_is_the_other_task(chain, source):
    model, x, folder, outputs = chain
    logits(model, x, task_ids=["a", "b", None])
    before, configs = pointers(model), dict(model.peft_config)
    learning = [p.requires_grad for p in model.parameters()]
    for task in "cd":
        other = folder / task
        if source == "tensors":
            donor = copy.deepcopy(model)
            donor.load_adapter(other, task)
            other = get_peft_model_state_dict(donor, adapter_name=task)
        hotswap(model, other, "b")
        mixed = logits(model, x, task_ids=["b", "a", "b"])
        for i, expected in enumerate((outputs[task], outputs["a"], outputs[task])):
            assert_close(mixed[i], expected[i])
    assert pointers(model) == before
    assert model.peft_config == configs
    assert [p.requires_grad for p in model.parameters()] == learning
    assert torch.equal(of_task(model, "b", x), outputs["d"])
    assert torch.equal(of_task(model, "a", x), outputs["a"])


@pytest.mark.parametrize("routed", [False, True])
def test_a_compiled_forward_sees_the_swap_without_another_graph(chain, routed):
    model, x, folder, outputs = chain
    model.set_adapter("b", inference_mode=True)
    torch.compiler.reset()
    graphs = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    ids = {"task_ids": torch.tensor([1, 0, -1], dtype=torch.int32)} if routed else {}
    assert_close(logits(compiled, x, **ids, use_cache=False)[0], outputs["b"][0])
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    for task in "cdc":
        hotswap(compiled, folder / task, "b")
        got = logits(compiled, x, **ids, use_cache=False)
        assert_close(got[0], outputs[task][0])
        assert_close(got[1], outputs["a" if routed else task][1])
    assert graphs.frame_count == 1
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before


def test_a_graph_of_a_frozen_model_sees_the_swap(chain):
    model, x, folder, outputs = chain
    inner = model.get_base_model()
    freeze(model)
    torch.compiler.reset()
    graphs = CompileCounterWithBackend("eager")
    compiled = torch.compile(inner, backend=graphs, fullgraph=True)
    with route(inner, ["b", "a", None]):
        logits(compiled, x, use_cache=False)
        before = pointers(model)
        for task in "cd":
            hotswap(model, folder / task, "b")  # in the middle of a route, as a server would
            got = logits(compiled, x, use_cache=False)
            assert_close(got[0], outputs[task][0])
            assert_close(got[1], outputs["a"][1])
    assert graphs.frame_count == 1
    assert pointers(model) == before


def test_generate_follows_the_swap(chain):
    model, x, folder, _ = chain
    options = {"max_new_tokens": 6, "do_sample": False}
    inner = model.get_base_model()
    for task in "cd":
        hotswap(model, folder / task, "b")
        with route(inner, ["b"] * 3):
            routed = inner.generate(x, **options)
        whole = copy.deepcopy(model)
        whole.load_adapter(folder / task, task)
        assert torch.equal(routed, whole.generate(x, task_ids=[task] * 3, **options))
        assert not torch.equal(routed, whole.generate(x, task_ids=["a"] * 3, **options))


def test_a_transformers_model_swaps_too(chain):
    model, x, folder, outputs = chain
    plain = copy.deepcopy(model.get_base_model())
    plain.peft_config = model.peft_config
    hotswap(plain, folder / "c", "a")
    assert_close(logits(plain, x, task_ids=["a"] * 3), outputs["c"])


def test_what_cannot_be_swapped_in_changes_nothing(chain, tmp_path):
    model, x, folder, outputs = chain
    logits(model, x, task_ids=["a", "b", None])
    good = get_peft_model_state_dict(model, adapter_name="b")
    first, last = next(iter(good)), [name for name in good if name.endswith("lilora_U")][-1]
    folders = {}
    for name, changes in {"alpha": {"alpha": 1.0}, "plain": {"fusion": False}, "deep": {"r": 7}}.items():
        folders[name] = tmp_path / "other" / name
        adapted("z", llama(num_hidden_layers=1), **changes).save_pretrained(folders[name])
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    foreign = get_peft_model_state_dict(adapted("z", llama(num_hidden_layers=1)), adapter_name="z")
    wrong = {
        "task 'x' is unknown; this model knows": (folder / "c", "x"),
        "no/c is no folder; give that of one task": ("no/c", "b"),
        "has no adapter_config.json; give the folder of one task, as save_pretrained writes it: it holds a, b, c, d": (
            folder,
            "b",
        ),
        "alpha is 1.0, but the model's other tasks have 9.0": (folders["alpha"] / "z", "b"),
        "fusion is False": (folders["plain"] / "z", "b"),
        "r is 7": (folders["deep"] / "z", "b"),
        "holds an adapter of type LORA, not a LiLoRA task": (tmp_path / "lora", "b"),
        "lilora_A differs from the model's": (foreign, "b"),
        "is missing in the tensors of task 'b'": ({k: v for k, v in good.items() if k != last}, "b"),
        r"lilora_U of task 'b' is \[1, 3\], but this model needs": (good | {last: good[last][:1]}, "b"),
        "lilora_U is torch.float32, but the model's is torch.float64": (good | {last: good[last].float()}, "b"),
        "lm_head.weight is unknown to the model": (good | {"base_model.model.lm_head.weight": good[first]}, "b"),
    }
    before, at = state_of(model), pointers(model)
    for words, (source, task) in wrong.items():
        with pytest.raises(UserError, match=words) as caught:
            hotswap(model, source, task)
        one_sentence(caught)
        assert_unchanged(model, dict(before))
    assert pointers(model) == at
    assert torch.equal(of_task(model, "b", x), outputs["b"])
    with pytest.raises(UserError, match="this model has no task that could be swapped"):
        hotswap(llama(), folder / "c", "b")
