"""What a LiLoRALinear keeps: merged weights, copies, files, casts, and what it has checked once."""

import copy
import io
import weakref

import pytest
import torch
from support.layers import TASKS, K, N, R, close, expected, layer
from support.tiny_llava import randomise
from torch import nn

import lilora_kernels
from lilora_kernels import LiLoRALinear, RankPoolLinear

# --- loading ----------------------------------------------------------------------------------------------------------


def test_a_state_dict_with_several_a_is_refused():
    """The last one would be that of all tasks."""
    made = layer()
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    state = {name: tensor.clone() for name, tensor in before.items()}
    made.load_state_dict(state)
    made.load_state_dict({name: tensor.double() if "cats" in name else tensor for name, tensor in state.items()})
    state["lilora_A.cats"] *= 2
    with pytest.raises(RuntimeError, match="lilora_A is not the same for the tasks 'cats' and 'dogs', which share it"):
        nn.Sequential(made).load_state_dict({f"0.{name}": tensor for name, tensor in state.items()})
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.state_dict().items())
    made.load_state_dict({name: torch.full_like(tensor, torch.nan) for name, tensor in state.items()})
    assert made.lilora_A["cats"].isnan().all()


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


# --- what was checked once --------------------------------------------------------------------------------------------


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
