"""LiLoRAExperts: routed experts of transformers with an adapter for each expert and task."""

import copy
import pickle

import pytest
import torch
import transformers
from support.counting import Operations
from support.experts import plain, randomise
from torch import nn
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from lilora_kernels import LiLoRAExperts, attach, explain, freeze, route, set_task, warmup
from lilora_kernels.layers.experts import expert_parameters
from lilora_kernels.routing.context import TEXT

E, H, INNER, K = 5, 8, 6, 2
KINDS = {
    "gate_up": lambda: Qwen3MoeExperts(
        transformers.Qwen3MoeConfig(num_experts=E, hidden_size=H, moe_intermediate_size=INNER)
    ),
    "transposed": lambda: AriaExperts(
        transformers.AriaTextConfig(moe_num_experts=E, hidden_size=H, intermediate_size=INNER, num_attention_heads=2)
    ),
    "interleaved, transposed, biases": lambda: GptOssExperts(
        transformers.GptOssConfig(num_local_experts=E, hidden_size=H, intermediate_size=INNER)
    ),
    "no gate": lambda: NemotronHExperts(
        transformers.NemotronHConfig(
            n_routed_experts=E, hidden_size=H, moe_intermediate_size=INNER, moe_latent_size=None
        )
    ),
    "norm behind": lambda: MuseSparkExperts(
        transformers.MuseSparkTextConfig(num_local_experts=E, moe_hidden_size=H, moe_intermediate_size=INNER)
    ),
}


@torch.no_grad()
def experts(kind="gate_up", dtype=torch.float64):
    torch.manual_seed(0)
    module = plain(KINDS[kind]().to(dtype))
    for parameter in module.parameters():
        parameter.normal_(std=H**-0.5)
    return module


def adapted(kind="gate_up", tasks=("a", "b"), dtype=torch.float64, **settings):
    layer = LiLoRAExperts(experts(kind, dtype), **{"r": 4, "sub_rank": 2, "alpha": 3.0, "dropout": 0.0, **settings})
    model = nn.Sequential(layer)
    for task in tasks:
        for one in layer.layers:
            one.add_task(task)
    attach(model)
    for one in layer.layers:
        one.place = TEXT  # as below a decoder
    randomise(model)
    return model.eval(), layer


def routed(tokens=9, dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, H, generator=g).to(dtype)
    chosen = torch.stack([torch.randperm(E - 1, generator=g)[:K] for _ in range(tokens)])  # one expert has no row
    return x, chosen, torch.rand(tokens, K, generator=g).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_new_tasks_are_the_base_and_merged_ones_the_same_weights(kind):
    layer = LiLoRAExperts(experts(kind), r=4, sub_rank=2, alpha=3.0, dropout=0.0)
    for one in layer.layers:
        one.add_task("a")
    x, chosen, weights = routed()
    wanted = layer.base_layer(x, chosen, weights)
    torch.testing.assert_close(layer(x, chosen, weights), wanted, rtol=0, atol=1e-12)
    before = [one.base_layer.weight.clone() for one in layer.layers]
    randomise(layer)
    y = layer(x, chosen, weights)
    assert (y - wanted).abs().max() > 0.1
    for one in layer.layers:
        one.merge("a")
    torch.testing.assert_close(layer(x, chosen, weights), y, rtol=0, atol=1e-12)
    assert not any(parameter.requires_grad for parameter in layer.base_layer.parameters())
    for one, weight in zip(layer.layers, before, strict=True):
        one.unmerge()
        torch.testing.assert_close(one.base_layer.weight, weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_mixed_batch_are_those_of_single_tasks(kind):
    model, layer = adapted(kind)
    x, chosen, weights = routed()
    names = ["a", "b", None, "b", "a", "a", None, "b", "b"]
    with torch.no_grad(), route(model, names):
        mixed = layer(x, chosen, weights)
    for i, name in enumerate(names):
        own = x[i : i + 1], chosen[i : i + 1], weights[i : i + 1]
        if name is None:
            alone = layer.base_layer(*own)
        else:
            set_task(model, name)
            alone = layer(*own)
        torch.testing.assert_close(mixed[i : i + 1], alone, rtol=0, atol=1e-12)
    task = torch.tensor([-1 if name is None else "ab".index(name) for name in names], dtype=torch.int32)
    assert torch.equal(layer(x, chosen, weights, task=task), mixed)


def test_gradients_of_a_mixed_batch_are_the_sums_of_those_of_single_tasks():
    model, layer = adapted(train_a="always", train_b0="always")
    x, chosen, weights = routed()
    names = ["a", "b", "a", "b", "b", "a", "a", "b", None]
    set_task(model, "a", "b")
    own = [x.clone().requires_grad_(), chosen, weights.clone().requires_grad_()]
    with route(model.train(), names):
        layer(*own).square().sum().backward()
    mixed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    wanted_x, wanted_weights = (torch.zeros_like(own[i]) for i in (0, 2))
    model.zero_grad()
    for task in ("a", "b", None):
        rows = [i for i, name in enumerate(names) if name == task]
        part = [x[rows].requires_grad_(), chosen[rows], weights[rows].requires_grad_()]
        set_task(model, task or "a")
        y = layer(*part) if task else layer.base_layer(*part)
        y.square().sum().backward()
        wanted_x[rows], wanted_weights[rows] = part[0].grad, part[2].grad
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == mixed.keys()
    assert len(found) == 2 * (2 + 2 * 3)
    for name, gradient in found.items():
        torch.testing.assert_close(mixed[name], gradient, rtol=0, atol=1e-12)
    torch.testing.assert_close(own[0].grad, wanted_x, rtol=0, atol=1e-12)
    torch.testing.assert_close(own[2].grad, wanted_weights, rtol=0, atol=1e-12)


def test_a_task_set_before_the_backward_raises():
    model, layer = adapted()
    set_task(model, "a")
    y = layer(*routed())
    set_task(model, "b")
    with pytest.raises(RuntimeError, match="the active task was set between a forward and its backward"):
        y.sum().backward()


def test_factors_of_each_expert_are_drawn_as_those_of_a_linear_layer():
    layer = LiLoRAExperts(experts(), r=4, sub_rank=2)
    for one in layer.layers:
        one.add_task("a")
        for drawn in (one.lilora_A["a"], one.lilora_V["a"]):
            bound = drawn.shape[-1] ** -0.5
            assert drawn.abs().max() > 0.8 * bound
            assert drawn.abs().max() <= bound
        assert not one.lilora_B["a"].any()
        assert not one.lilora_U["a"].any()


def test_a_layer_sorts_its_rows_once_and_runs_one_operation_for_each_linear():
    model, layer = adapted(dtype=torch.float32)
    inputs = routed(dtype=torch.float32)
    set_task(model, "a", "b")
    with route(model.train(), ["a", "b", None] * 3):
        layer(*inputs)
        with Operations() as seen:
            y = layer(*inputs)
    assert seen.ours == {"expert_linear": 2}
    assert seen.seen["sort"] == 1
    # beside the products: 6 stacks; 12 for ids and order; the gate, and 8 to gather and combine rows; 17 in each operation
    assert seen.seen.total() - seen.seen["mm"] - seen.seen["addmm_"] <= 62, seen.seen
    with Operations() as seen:
        y.sum().backward()
    assert seen.ours == {"expert_linear_backward": 2}


def test_a_frozen_layer_stacks_nothing_and_room_for_tasks_changes_nothing():
    model, layer = adapted()
    inputs, names = routed(), ["a", "b", None] * 3
    with torch.no_grad(), route(model, names):
        wanted = layer(*inputs)
    freeze(model, capacity=4)
    with torch.no_grad(), route(model, names):
        torch.testing.assert_close(layer(*inputs), wanted, rtol=0, atol=1e-13)
        with Operations() as seen:
            layer(*inputs)
    assert seen.seen["stack"] == 0
    up = layer.layers[0]
    up.overwrite_task("a", *(getattr(up, kind)["b"].clone() for kind in ("lilora_U", "lilora_V", "lilora_fusion")))
    with torch.no_grad(), route(model, names):
        assert (layer(*inputs) - wanted)[::3].abs().max() > 0.01
    with pytest.raises(RuntimeError, match="batch_invariant: 2 modules would take kernels"):
        freeze(model, capacity=4, batch_invariant=True)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_compute_with_their_own_weights(copied):
    model, layer = adapted()
    x = routed()
    other = copied(model)
    with torch.no_grad():
        for parameter in layer.base_layer.parameters():
            parameter.zero_()
    assert other[0](*x).abs().max() > 0.1
    assert other[0].layers[0].base_layer.weight is other[0].base_layer.gate_up_proj


def test_fullgraph_compile():
    torch._dynamo.reset()
    model, layer = adapted(dtype=torch.float32)
    inputs, task = routed(dtype=torch.float32), torch.tensor([0, 1, -1] * 3, dtype=torch.int32)
    wanted = layer(*inputs, task=task)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs, task=task), wanted)
    set_task(model.train(), "a")  # the graph cannot raise for rows of a task that does not train
    assert compiled(*inputs, task=task).isnan().all(1).tolist() == [False, True, False] * 3


def test_explain_and_warmup_know_them():
    model, _ = adapted(dtype=torch.float32)
    assert "0.gate_up_proj, 0.down_proj: eager (composed for all rows), base and adapter in one operation" in explain(
        model
    )
    assert warmup(model) == 0


def test_what_is_refused():
    with pytest.raises(TypeError, match="base_layer is a Linear; it must be a module of routed experts"):
        LiLoRAExperts(nn.Linear(2, 2))
    assert expert_parameters(nn.Linear(2, 2)) == ()
    assert expert_parameters(experts().to(torch.float8_e4m3fn)) == ()
    model, layer = adapted()
    layer.layers[0].merge("a")
    with pytest.raises(RuntimeError, match="differ in what is merged or active"):
        layer(*routed())
    with pytest.raises(
        RuntimeError, match=r"0\.base_layer\.gate_up_proj cannot be loaded over while task 'a' is merged"
    ):
        model.load_state_dict(
            {name: tensor + 1 for name, tensor in model.state_dict().items() if "base_layer" in name}, strict=False
        )
    layer.layers[0].unmerge()
    layer.base_layer.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="are split over devices, or have hooks"):
        layer(*routed())
