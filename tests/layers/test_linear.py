"""LiLoRALinear alone: the formula, tasks, who trains, merging, copies and files."""

import copy
import io
import itertools
import re
import weakref

import pytest
import torch
from support.layers import TASKS, K, N, Quantised, R, S, close, expected, layer
from support.tiny_llava import randomise
from torch import nn

import lilora_kernels
from lilora_kernels import LiLoRALinear, RankPoolLinear
from lilora_kernels.ops.delta import reference

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


# --- tasks ------------------------------------------------------------------------------------------------------------


def test_ids_stay_when_another_task_is_deleted():
    made, x = layer().eval(), torch.randn(3, K)
    birds = expected(made, x[:1], "birds")
    made.delete_task("dogs")
    made.add_task("fish")
    assert [made.model_tasks.id_of(name) for name in made.tasks] == [0, 2, 3]
    close(
        made(x, task=torch.tensor([2, -1, 3])),
        torch.cat([birds, made.base_layer(x[1:2]), expected(made, x[2:], "fish")]),
    )
    with pytest.raises(ValueError, match=r"holds 1; known ids are"):
        made(x, task=torch.tensor([2, 1, 0]))


def test_ids_on_an_accelerator_that_belong_to_no_task_mean_no_adapter():
    made = layer()
    made.delete_task("dogs")
    # Values of ids on an accelerator are never read, so the table itself has to be safe.
    ids = torch.tensor([0, 1, 2, 3, 99, -1, -7], dtype=torch.int32)
    assert made.model_tasks.positions(ids, training=False).tolist() == [0, -1, 1, -1, -1, -1, -1]
    # In training a task that is not active gets a position that does not exist: its rows become NaN.
    assert made.model_tasks.positions(ids, training=True).tolist() == [0, -1, 1, -1, -1, -1, -1]


def test_samples_of_a_task_that_does_not_train_are_refused_in_training_alone():
    made, x, ids = layer(), torch.randn(3, K), torch.tensor([0, 2, -1])
    with pytest.raises(
        ValueError, match=r"samples of task 'birds', and \['cats'\] train; make all tasks of a training batch"
    ):
        made(x, task=ids)
    wanted = torch.stack([expected(made, row, name) for row, name in zip(x, ("cats", "birds", None), strict=True)])
    with torch.no_grad():
        close(made(x, task=ids), wanted)
    close(made.eval()(x, task=ids), wanted)
    made.train().set_task("cats", train=False)
    close(made(x, task=ids), wanted)
    made.set_task("cats", "birds")
    close(made(x, task=ids), wanted)


def test_mixed_training_saves_the_factors_of_the_tasks_that_train():
    def saved(tasks):
        made, found = layer(tasks), {}

        def pack(tensor):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        made.set_task("a", "b")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            made(torch.randn(4, K), task=torch.tensor([0, 1, -1, 1]))
        return sum(found.values())

    assert saved(("a", "b")) == saved(("a", "b", *(f"t{i}" for i in range(62))))


def test_deleting_the_active_task_leaves_the_base_and_deleting_another_leaves_grads_alone():
    made, x = layer(), torch.randn(3, K)
    made.set_task("dogs", train=False)
    made.delete_task("cats")
    assert made.active == ("dogs",)
    assert not any(p.requires_grad for p in made.parameters())
    close(made(x), expected(made, x, "dogs"))
    made.delete_task("dogs")
    assert made.active == ()
    assert torch.equal(made(x), made.base_layer(x))


def test_a_name_can_be_used_again_under_a_new_id():
    made = layer()
    made.delete_task("dogs")
    made.add_task("dogs")
    assert made.model_tasks.id_of("dogs") == 3
    assert made.tasks == ["cats", "birds", "dogs"]


@pytest.mark.parametrize("name", ["", "a.b", "a b", "../x", "-x", "é", "a\n", 3, None], ids=repr)
def test_names_outside_the_pattern_add_nothing(name):
    refused(name, "not allowed")


@pytest.mark.parametrize("name", ["keys", "items", "weight", "bias", "training", "lora_A", "lilora_U", "forward"])
def test_names_that_torch_or_peft_use_add_nothing(name):
    refused(name, "reserved")


def test_a_name_that_is_taken_adds_nothing():
    refused("cats", "exists already")


def refused(name, why):
    made = layer()
    before = {key: value.clone() for key, value in made.state_dict().items()}
    with pytest.raises(ValueError, match=why):
        made.add_task(name)
    after = made.state_dict()
    assert made.tasks == list(TASKS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    "options, why",
    [
        ({"r": 0}, "r is 0"),
        ({"sub_rank": -1}, "sub_rank is -1"),
        ({"r": 2.0}, "r is 2.0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"train_a": "second"}, "train_a is 'second'"),
        ({"train_b0": None}, "train_b0 is None"),
    ],
    ids=str,
)
def test_bad_arguments(options, why):
    with pytest.raises(ValueError, match=why):
        LiLoRALinear(nn.Linear(K, N), **options)


def test_a_base_that_is_no_linear_is_refused():
    with pytest.raises(TypeError, match="base_layer is a Conv1d"):
        LiLoRALinear(nn.Conv1d(2, 3, 1))


def test_unknown_tasks_are_named_and_change_nothing():
    made = layer()
    for call in (made.set_task, made.delete_task, made.delta_weight, made.merge):
        with pytest.raises(ValueError, match=r"'fish' is unknown; this layer knows \['cats', 'dogs', 'birds'\]"):
            call("fish")
    assert made.active == ("cats",)
    assert made.merged_task is None


@pytest.mark.parametrize(
    "task, error, why",
    [
        (torch.tensor([0.0, 1.0]), TypeError, "float32"),
        (torch.tensor([True, False]), TypeError, "bool"),
        (torch.tensor([0, 1, 2]), ValueError, r"shape \[3\].*\[2\]"),
        (torch.tensor(1), ValueError, r"shape \[\]"),
        (torch.tensor([0, 3]), ValueError, "holds 3"),
        (torch.tensor([0, -2]), ValueError, "holds -2"),
    ],
    ids=str,
)
def test_bad_task_ids(task, error, why):
    with pytest.raises(error, match=why):
        layer()(torch.randn(2, 3, K), task=task)


# --- who trains -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy, trains", [("always", [True, True]), ("first", [True, False]), ("never", [False, False])]
)
def test_policies_of_the_shared_factors(policy, trains):
    made = layer(train_a=policy, train_b0="never"), layer(train_a="never", train_b0=policy)
    for shared, other, one in (
        (made[0].lilora_A, made[0].lilora_B, made[0]),
        (made[1].lilora_B, made[1].lilora_A, made[1]),
    ):
        for name, wanted in zip(("cats", "dogs"), trains, strict=True):
            one.zero_grad(set_to_none=True)
            one.set_task(name)
            one(torch.randn(4, K)).square().sum().backward()
            assert all((p.grad is not None) is wanted for p in shared.values())
            assert all(p.grad is None for p in other.values())


def test_the_shared_factors_learn_with_the_first_task_after_all_others_are_gone():
    made = layer()
    made.delete_task("cats")
    assert not made.lilora_A["dogs"].requires_grad
    made.add_task("cats")
    made.set_task("cats")
    assert not made.lilora_A["cats"].requires_grad
    for task in list(made.tasks):
        made.delete_task(task)
    made.add_task("fish")
    assert made.lilora_A["fish"].requires_grad
    assert made.lilora_B["fish"].requires_grad


def test_inactive_tasks_get_no_gradient():
    made = layer(train_a="always")
    made.set_task("dogs")
    made(torch.randn(4, K)).square().sum().backward()
    for factors in (made.lilora_U, made.lilora_V, made.lilora_fusion):
        assert {name for name in TASKS if factors[name].grad is not None} == {"dogs"}
        assert factors["dogs"].grad.abs().sum() > 0


def test_tasks_that_train_together_but_are_absent_get_zeros():
    made = layer()
    made.set_task("cats", "birds")
    made(torch.randn(4, K), task=torch.tensor([0, -1, 0, 0])).square().sum().backward()
    for factors in (made.lilora_U, made.lilora_V, made.lilora_fusion):
        assert factors["cats"].grad.abs().sum() > 0
        assert torch.count_nonzero(factors["birds"].grad) == 0
        assert factors["dogs"].grad is None


def test_several_active_tasks_need_ids():
    made = layer()
    made.set_task("cats", "dogs")
    with pytest.raises(ValueError, match="active together; pass task ids"):
        made(torch.randn(2, K))


def test_gradients_of_a_mixed_batch_are_those_of_the_formula():
    made, x = layer(dtype=torch.float64, train_a="always", train_b0="always"), torch.randn(6, K, dtype=torch.float64)
    made.set_task(*TASKS)
    ids, dy = torch.tensor([2, 0, -1, 1, 2, 0], dtype=torch.int32), torch.randn(6, N, dtype=torch.float64)
    made(x, task=ids).backward(dy)
    factors = (made.lilora_A, made.lilora_B, made.lilora_U, made.lilora_V, made.lilora_fusion)
    got = [p[name].grad.clone() for p in factors for name in TASKS]
    made.zero_grad()
    a, b0, *_ = made._parameters_of("cats")
    u, v, fusion = (torch.stack([p[name] for name in TASKS]) for p in factors[2:])
    reference.delta(x, a, b0, u, v, fusion.squeeze(1), ids, scaling=made.lilora_scaling).backward(dy)
    for gradient, wanted in zip(got, (p[name].grad for p in factors for name in TASKS), strict=True):
        close(gradient, wanted, tolerance=1e-12)


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
    runs = "eager (composed for all rows, recorded for fp32 gradients of one task up to 1 MiB)"
    assert plain.startswith(f"plain: {runs}, base and adapter in one operation")
    assert quantised.startswith(f"quantised: {runs}, base_layer(x) + delta, because the base is a Quantised")
    assert "because the base has hooks" in hooks
    both = "linear, delta"
    assert [re.split(r"  +", line) for line in table] == [
        ["plans", "composed", "recorded", "one_launch", "by_phase", "decode", "fused"],
        ["cuda", both, "-", both, both, "linear", "linear"],
        ["triton", both, "-", both, both, "-", "-"],
        ["cpu", both, both, "-", "-", both, "-"],
        ["eager", both, both, "-", "-", "-", "-"],
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


# --- merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", [True, False], ids=["fusion", "plain"])
def test_merged_is_the_task_and_unmerged_is_the_base(fusion):
    made, x = layer(fusion=fusion), torch.randn(4, K)
    before = made.base_layer.weight.clone()
    wanted = expected(made, x, "dogs")
    close(made.base_layer(x).double() + x.double() @ made.delta_weight("dogs").double().T, wanted)
    made.merge("dogs")
    close(made(x), wanted)
    made.unmerge()
    close(made.base_layer.weight, before)
    made.unmerge()


def test_a_merged_layer_refuses_routes_and_a_second_merge():
    made, x = layer(), torch.randn(2, K)
    made.merge("cats")
    with pytest.raises(RuntimeError, match=r"'cats' is merged into the base weight; unmerge\(\)"):
        made(x, task=torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match="'cats' is merged already"):
        made.merge("dogs")


def test_deleting_a_merged_task_takes_it_out():
    made, x = layer(), torch.randn(2, K)
    base = made.base_layer(x)
    made.merge("dogs")
    made.delete_task("dogs")
    close(made.base_layer(x), base)


def test_a_merged_task_is_not_overwritten_and_the_base_comes_back(monkeypatch):
    made = layer()
    base, other = made.base_layer.weight.clone(), [torch.randn_like(p) for p in made._own("cats")]
    made.merge("cats")
    weight = made.base_layer.weight.clone()
    with pytest.raises(ValueError, match="is merged; unmerge"):
        made.overwrite_task("cats", *other)
    made.overwrite_task("dogs", *other)
    assert torch.equal(made.base_layer.weight, weight)
    made.unmerge()
    close(made.base_layer.weight, base)
    made.overwrite_task("cats", *other)
    assert all(torch.equal(own, value) for own, value in zip(made._own("cats"), other, strict=True))


@pytest.mark.parametrize(
    "changed", ["lilora_U.cats", "lilora_fusion.cats", "lilora_A.cats", "lilora_B.dogs", "base_layer.weight"]
)
def test_a_state_dict_is_not_loaded_over_a_merged_task(changed):
    model = nn.Sequential(nn.Linear(K, K), layer())
    lilora_kernels.attach(model)
    base = model[1].base_layer.weight.clone()
    model[1].merge("cats")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)  # what is there already
    for name in state:
        if (
            name.startswith("0.")
            or name.endswith(changed)
            or (changed[:8] in ("lilora_A", "lilora_B") and changed[:8] in name)
        ):
            state[name] = state[name] + 1
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="cannot be loaded over while task 'cats' is merged; unmerge"):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match="cannot be loaded over while task 'cats' is merged"):
        model[1].load_state_dict({name[2:]: tensor for name, tensor in state.items() if name.startswith("1.")})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model[1].unmerge()
    close(model[1].base_layer.weight, base)
    model.load_state_dict(state)


def test_a_task_on_the_meta_device_is_not_overwritten_with_nothing():
    made = layer().to("meta")
    with pytest.raises(ValueError, match="on the meta device, without values"):
        made.overwrite_task("cats", *(torch.zeros(p.shape) for p in made._own("cats")))


# --- copies, files, casts ---------------------------------------------------------------------------------------------


def saved(made):
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved], ids=["deepcopy", "pickle"])
def test_a_copy_computes_the_same_and_shares_nothing(copied):
    made, x, ids = layer(), torch.randn(3, K), torch.tensor([2, 0, -1])
    made.set_task("dogs")
    with torch.no_grad():
        mixed = made(x, task=ids)
        twin = copied(made)
        randomise(made)
        close(twin(x), expected(twin, x, "dogs"))
        close(twin(x, task=ids), mixed)
    assert len({id(p) for p in twin.lilora_A.values()}) == len({id(p) for p in twin.lilora_B.values()}) == 1
    twin.add_task("fish")
    assert made.tasks == list(TASKS)


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_a_loaded_state_is_seen_by_every_way_to_call(assign):
    source, made, x, ids = layer(), layer(), torch.randn(3, K), torch.tensor([2, 1, -1])
    with torch.no_grad():
        made(x, task=ids)
        made.load_state_dict({key: value.clone() for key, value in source.state_dict().items()}, assign=assign)
        close(made(x), expected(source, x, "cats"))
        close(made(x, task=ids), source(x, task=ids))
    assert len({id(p) for p in (*made.lilora_A.values(),)}) == 1
    assert len(made.state_dict()) == len(source.state_dict())
    made(x).sum().backward()
    assert made.lilora_A["birds"].grad is not None


def test_one_task_loaded_by_assignment_brings_the_shared_factors_to_all():
    made = layer()
    a = torch.randn(R, K)
    made.load_state_dict({"lilora_A.cats": a.clone()}, strict=False, assign=True)
    assert all(torch.equal(made.lilora_A[name], a) for name in TASKS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_casts_reach_slot_and_bank(dtype):
    made, x, ids = layer(), torch.randn(3, K), torch.tensor([2, 1, -1])
    with torch.no_grad():
        made(x, task=ids)
        made.to(dtype)
        x = x.to(dtype)
        assert made(x).dtype == made(x, task=ids).dtype == dtype
        close(made(x), expected(made, x, "cats"), tolerance=3e-2)
        close(made(x, task=ids)[:1], expected(made, x[:1], "birds"), tolerance=3e-2)
    assert len({id(p) for p in made.lilora_A.values()}) == 1


def test_materialising_from_the_meta_device_keeps_the_shared_factors_one():
    with torch.device("meta"):
        made = layer()
    made.to_empty(device="cpu")
    nn.init.normal_(made.base_layer.weight)
    nn.init.normal_(made.base_layer.bias)
    randomise(made)
    assert len({id(p) for p in made.lilora_A.values()}) == 1
    close(made(torch.ones(2, K)), expected(made, torch.ones(2, K), "cats"))
    made.set_task("dogs")
    assert made.lilora_U["dogs"].requires_grad


def write_in_place(made):
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter))


def write_data(made):
    for parameter in made.parameters():
        parameter.data = torch.randn_like(parameter)


def step(made):
    optimiser = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=0.5)
    with torch.enable_grad():
        made(torch.randn(4, K)).square().sum().backward()
    optimiser.step()


@pytest.mark.parametrize("write", [write_in_place, write_data, step], ids=lambda f: f.__name__)
def test_no_call_sees_stale_values(write):
    made, x, ids = layer(), torch.randn(3, K), torch.tensor([2, 0, -1])
    made.eval()
    with torch.no_grad():
        before = made(x, task=ids)
        write(made)
        after = made(x, task=ids)
        assert not torch.equal(before, after)
        rows = zip(x, ("birds", "cats", None), strict=True)
        close(after, torch.stack([expected(made, row, name) for row, name in rows]))
        close(made(x), expected(made, x, "cats"))


def test_a_bank_gathered_in_inference_mode_serves_a_later_backward():
    made, x, ids = layer(), torch.randn(3, K, requires_grad=True), torch.tensor([2, 0, -1])
    made.set_task("cats", train=False)
    with torch.inference_mode():
        made(x, task=ids)
    made(x, task=ids).sum().backward()
    assert x.grad.abs().sum() > 0


def test_repr_tells_the_settings():
    assert "r=8, sub_rank=4" in repr(layer())
    assert "tasks=['cats', 'dogs', 'birds'], active=['cats']" in repr(layer())


# --- layers of a model -------------------------------------------------------------------------------------------------


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


# --- what was checked once -----------------------------------------------------------------------------------------------


def other_memory(made):
    """As sharding does between the forwards."""
    made.lilora_A[TASKS[0]].data = torch.empty(0)


def another_rank(made):
    made.lilora_V[TASKS[0]] = nn.Parameter(torch.randn(3, made.rank))


def another_base(made):
    made.base_layer.weight = nn.Parameter(torch.randn(N + 1, K), requires_grad=False)


def other_memory_of_the_base(made):
    made.base_layer.weight.data = torch.empty(0)


@pytest.mark.parametrize(
    "change", [other_memory, other_memory_of_the_base, another_rank, another_base], ids=lambda f: f.__name__
)
def test_a_change_after_the_first_forward_is_checked_again(change):
    made, x = layer().eval(), torch.randn(2, K)
    with torch.no_grad():
        made(x)
        made(x)
        change(made)
        with pytest.raises(ValueError, match=r"lilora::linear: \w+ is \["):
            made(x)


def test_another_kind_of_x_is_checked_again():
    made = layer().eval()
    with torch.no_grad():
        made(torch.randn(2, K))
        with pytest.raises(ValueError, match=f"it must be .R, K. with K = {K + 1}, the columns of x"):
            made(torch.randn(2, K + 1))
        with pytest.raises(TypeError, match=r"x is torch.float64 and weight is torch.float32"):
            made(torch.randn(2, K, dtype=torch.float64))


def test_a_replaced_base_is_let_go():
    made = layer()
    made(torch.randn(2, K))
    before = weakref.ref(made.base_layer.weight)
    made.base_layer = nn.Linear(K, N).requires_grad_(False)
    assert before() is None


def test_another_dropout_is_checked_again():
    made = layer()
    made.dropout = 0.5
    made(torch.randn(2, K))
    made.dropout = 1.0
    with pytest.raises(ValueError, match=r"p is 1.0; the dropout probability must be in \[0, 1\)"):
        made(torch.randn(2, K))


def test_gradients_by_torch_func_of_factors():
    made, x = layer(), torch.randn(3, K)
    values = {f"{name}.cats": getattr(made, name)["cats"].detach() for name in ("lilora_U", "lilora_V")}

    def loss(values):
        return torch.func.functional_call(made, values, (x,)).square().sum()

    got = torch.func.grad(loss)(values)
    made(x).square().sum().backward()
    for path, grad in got.items():
        torch.testing.assert_close(grad, made.get_parameter(path).grad)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"r": True}, "r is True; it must be an integer"),
        ({"sub_rank": 0}, "sub_rank is 0; it must be an integer"),
        ({"r": 8, "sub_rank": 9}, "sub_rank is 9 and r is 8, the most that the rank of U V can be; give at most r"),
        ({"alpha": float("nan")}, "alpha is nan; it must be a positive number"),
        ({"alpha": float("inf")}, "alpha is inf; it must be a positive number"),
        ({"alpha": "x"}, "alpha is 'x'; it must be a positive number"),
        ({"alpha": True}, "alpha is True; it must be a positive number"),
        ({"dropout": "x"}, "dropout is 'x'; it must be in"),
        ({"dropout": float("nan")}, "dropout is nan; it must be in"),
    ],
)
def test_a_layer_takes_no_setting_that_is_no_number_in_its_range(options, words):
    with pytest.raises(ValueError, match=words):
        LiLoRALinear(nn.Linear(4, 3), **options)


@pytest.mark.parametrize("scaling", [float("nan"), float("inf"), "x", True])
def test_a_pool_takes_no_scaling_that_is_no_finite_number(scaling):
    with pytest.raises(ValueError, match=r"scaling is .*; it must be a finite number"):
        RankPoolLinear(nn.Linear(4, 3), lambda *_: None, scaling=scaling)


@pytest.mark.parametrize("r, sub_rank", [(1, 1), (8, 4), (9, 4), (128, 64)])
def test_sizes_that_are_not_given_follow_r(r, sub_rank):
    layer = LiLoRALinear(nn.Linear(3, 3), r=r)
    assert (layer.sub_rank, layer.lilora_scaling) == (sub_rank, 2.0)
    layer = LiLoRALinear(nn.Linear(3, 3), r=r, sub_rank=1, alpha=3.0 * r)
    assert (layer.sub_rank, layer.lilora_scaling) == (1, 3.0)
