"""LiLoRALinear alone: the formula, tasks, who trains, merging, copies and files."""

import itertools
import re

import pytest
import torch
from support.layers import TASKS, K, N, Quantised, R, S, close, expected, layer
from torch import nn

import lilora_kernels
from lilora_kernels import LiLoRALinear, RankPoolLinear

# --- the formula ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (5,), (3, 7), (2, 3, 4), (0, 7)], ids=str)
@pytest.mark.parametrize("fusion", [True, False], ids=["fusion", "plain"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_every_task_is_the_formula_on_any_leading_dimensions(lead, fusion, bias):
    made, x = layer(fusion=fusion, bias=bias), torch.randn(*lead, K)
    for name in TASKS:
        made.set_task(name)
        if x.numel():
            close(made(x), expected(made, x, name))
        else:
            assert made(x).shape == (*lead, N)


def test_bf16_in_bf16_out():
    made, x = layer(dtype=torch.bfloat16), torch.randn(3, 7, K, dtype=torch.bfloat16)
    made.set_task("dogs")
    assert made(x).dtype == torch.bfloat16
    close(made(x), expected(made, x, "dogs"), tolerance=2e-2)


def test_fp32_adapters_on_a_bf16_base():
    made, x = layer(dtype=torch.bfloat16), torch.randn(3, 7, K, dtype=torch.bfloat16)
    for name, parameter in made.named_parameters():
        if name.startswith("lilora_"):
            parameter.data = parameter.data.float()
    made(x).float().square().mean().backward()
    close(made(x), expected(made, x, "cats"), tolerance=2e-2)
    assert made.lilora_U["cats"].grad.dtype == torch.float32


def test_task_ids_mix_tasks_row_by_row():
    made, x = layer().eval(), torch.randn(5, 3, K)
    names = ["birds", None, "cats", "dogs", "cats"]
    ids = torch.tensor([-1 if n is None else made.model_tasks.id_of(n) for n in names], dtype=torch.int32)
    y = made(x, task=ids)
    close(y, torch.stack([expected(made, row, name) for row, name in zip(x, names, strict=True)]))
    close(made(x[:, 0], task=ids), y[:, 0])
    close(made(x[0, 0], task=ids[:1]), y[0, 0])


def test_a_fresh_task_changes_nothing_and_tasks_without_any_are_the_base():
    made, x = LiLoRALinear(nn.Linear(K, N), r=R, sub_rank=S), torch.randn(4, K)
    assert torch.equal(made(x), made.base_layer(x))
    made.add_task("cats")
    close(made.eval()(x), made.base_layer(x))


def test_dropout_acts_in_training_only_and_follows_the_generator():
    made, x = layer(dropout=0.5), torch.randn(64, K)
    torch.manual_seed(3)
    first, second = made(x), made(x)
    torch.manual_seed(3)
    assert torch.equal(made(x), first)
    assert not torch.equal(first, second)
    close(made.eval()(x), expected(made, x, "cats"))


# --- the front door ---------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """A model that takes any keyword without a word, as transformers' models do."""

    def __init__(self):
        super().__init__()
        self.head = LiLoRALinear(nn.Linear(K, N), r=R, sub_rank=S, dropout=0.0)

    def forward(self, x, **kwargs):
        return self.head(x)


def test_two_tasks_trained_one_after_the_other_move_their_own_factors_and_never_the_base():
    model, x = Classifier(), torch.randn(16, K)
    for task in ("a", "b"):
        model.head.add_task(task)
    lilora_kernels.attach(model)
    states = [{name: p.detach().clone() for name, p in model.named_parameters()}]
    for task in ("a", "b"):
        lilora_kernels.set_task(model, task)
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1)
        for _ in range(2):
            model(x, task_ids=[task] * 16).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        states.append({name: p.detach().clone() for name, p in model.named_parameters()})
    moved = [{n for n in old if not torch.equal(old[n], new[n])} for old, new in itertools.pairwise(states)]
    shared, own = ("A.a", "B.a"), ("U.{}", "V.{}", "fusion.{}")
    assert moved[0] == {f"head.lilora_{name}" for name in (*shared, *(n.format("a") for n in own))}
    assert moved[1] == {f"head.lilora_{name.format('b')}" for name in own}


@pytest.mark.parametrize("kind", [LiLoRALinear, RankPoolLinear])
def test_the_base_is_frozen_unless_asked_otherwise(kind):
    given = [lambda layer, x: (None, None)] if kind is RankPoolLinear else []
    assert not any(p.requires_grad for p in kind(nn.Linear(K, N), *given).base_layer.parameters())
    assert all(p.requires_grad for p in kind(nn.Linear(K, N), *given, freeze_base=False).base_layer.parameters())


def test_a_base_that_is_asked_for_trains_with_the_adapter():
    base, x = nn.Linear(K, N), torch.randn(5, K)
    made = layer(base=base, freeze_base=False)
    made(x).square().sum().backward()
    expected_grad = torch.autograd.grad(expected(made, x, "cats").square().sum(), base.weight)[0]
    close(base.weight.grad, expected_grad)


def test_task_ids_before_attach_say_what_to_do():
    model, x = Classifier(), torch.randn(2, K)
    model.head.add_task("a")
    with pytest.raises(TypeError, match=r"after attach\(model\); a layer alone takes task, ids \[B\] int32"):
        model.head(x, task_ids=["a", "a"])
    for _ in range(2):
        lilora_kernels.set_task(model, "a")
    with pytest.raises(TypeError, match=r"of this Classifier yet; call attach\(model\) once"):
        model(x, task_ids=["a", None])
    assert len(model._forward_pre_hooks) == 1
    lilora_kernels.attach(model)
    assert model(x, task_ids=["a", None]).shape == (2, N)
    lilora_kernels.set_task(model, "a")
    assert not model._forward_pre_hooks


# --- other bases ------------------------------------------------------------------------------------------------------


def test_a_quantised_base_keeps_its_own_product():
    made, x = layer(base=Quantised()), torch.randn(3, 5, K)
    assert made.unfused_reason() == "the base is a Quantised"
    assert made.lilora_A["cats"].dtype == torch.float32
    for name in TASKS:
        made.set_task(name)
        close(made(x), expected(made, x, name))
    with pytest.raises(TypeError, match="merge needs a plain"):
        made.merge("cats")


def test_hooks_of_the_base_run():
    made, x = layer(), torch.randn(3, K)
    made.base_layer.register_forward_hook(lambda module, inputs, y: 2 * y)
    assert made.unfused_reason() == "the base has hooks"
    close(made(x), expected(made, x, "cats"))


def test_a_base_that_trains_gets_its_gradients():
    made, x = layer(), torch.randn(3, K)
    fused = made(x)
    made.base_layer.requires_grad_(True)
    assert made.unfused_reason() == "the base is being trained"
    y = made(x)
    close(y, fused)
    y.sum().backward()
    close(made.base_layer.weight.grad, x.sum(0).expand(N, K))
    close(made.base_layer.bias.grad, torch.full((N,), 3.0))


def test_explain_names_the_plan_of_every_layer(no_cpu_kernels):
    hooked = layer()
    hooked.base_layer.register_forward_pre_hook(lambda module, inputs: None)
    text = lilora_kernels.explain(
        nn.ModuleDict({"plain": layer(), "quantised": layer(base=Quantised()), "hooked": hooked})
    )
    plain, quantised, hooks, *table = text.splitlines()
    runs = "eager (composed for all rows)"
    assert plain.startswith(f"plain: {runs}, base and adapter in one operation")
    assert quantised.startswith(f"quantised: {runs}, base_layer(x) + delta, because the base is a Quantised")
    assert "because the base has hooks" in hooks
    both = "linear, delta"
    assert [re.split(r"  +", line) for line in table] == [
        ["plans", "composed", "one_launch", "by_phase", "decode", "fused"],
        ["cuda", both, both, both, "linear", "linear"],
        ["triton", both, both, both, "-", "-"],
        ["cpu", both, both, "-", both, "-"],
        ["eager", both, "-", "-", "-", "-"],
    ]
    with lilora_kernels.plan("composed"):
        assert "eager (composed as forced), base" in lilora_kernels.explain(layer())
    with lilora_kernels.plan("decode"):
        assert "NO BACKEND (decode as forced) CANNOT RUN" in lilora_kernels.explain(layer())
    alike = nn.ModuleDict(
        {"blocks": nn.ModuleList([nn.ModuleDict({"up": layer(), "down": layer()}) for _ in range(3)])}
    )
    alike["blocks"][1]["up"] = hooked
    one, other, *_ = lilora_kernels.explain(alike).splitlines()
    assert one.startswith("blocks.0,2.up, blocks.0-2.down: ")
    assert other.startswith("blocks.1.up: ")
    assert lilora_kernels.explain(nn.Linear(2, 2)) == "no adapted layer in this model"


# --- layers of a model ------------------------------------------------------------------------------------------------


def two_layers(tasks=("cats", "dogs")):
    model = nn.Sequential(layer(tasks, nn.Linear(K, K)), layer(tasks, nn.Linear(K, K))).eval()
    lilora_kernels.attach(model)
    return model


def test_a_task_set_on_one_layer_is_that_layers_alone():
    model, x = two_layers(), torch.randn(3, K)
    model[0].set_task("dogs")
    close(model(x), expected(model[1], expected(model[0], x, "dogs").float(), "cats"))
    assert model[1].lilora_U["cats"].requires_grad
    assert not model[0].lilora_U["cats"].requires_grad
    for each in model:
        each.add_task("birds")
        each.set_task("birds")
    assert [each.active for each in model] == [("birds",)] * 2


def test_a_task_of_one_layer_alone_is_named():
    model = two_layers()
    model[0].add_task("fish")
    with pytest.raises(ValueError, match=r"a layer does not have the tasks \['fish'\] of this batch"), torch.no_grad():
        model(torch.randn(2, K), task_ids=["fish", "cats"])


def test_what_changes_inside_a_route_counts():
    model, x = two_layers(), torch.randn(2, K)
    with lilora_kernels.route(model, ["cats", "dogs"]), torch.no_grad():
        model(x)
        for each in model:
            each.delete_task("dogs")
        with pytest.raises(ValueError, match="the task with the id 1 was deleted"):
            model(x)
    with lilora_kernels.route(model, ["cats", "cats"]):
        model.train()(x)
        for each in model:
            each.add_task("birds")
            each.set_task("birds")
        with pytest.raises(ValueError, match="samples of task 'cats'"):
            model(x)


def test_a_layer_without_tasks_is_cast():
    made = layer(()).to(torch.float64)
    made.add_task("cats")
    assert made.lilora_A["cats"].dtype == torch.float64
    made.delete_task("cats")
    made.to(torch.float32)


def test_a_factor_replaced_for_one_call_is_seen():
    made, x = layer(), torch.randn(3, K)
    for name in ("lilora_A", "lilora_B", "lilora_U", "lilora_V", "lilora_fusion"):
        before = made(x)
        values = {f"{name}.cats": torch.randn_like(getattr(made, name)["cats"])}
        assert not torch.equal(torch.func.functional_call(made, values, (x,)), before)
        assert torch.equal(made(x), before)
