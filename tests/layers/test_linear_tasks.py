"""The tasks of a LiLoRALinear: their names and ids, and which of their factors train."""

import io

import pytest
import torch
from support.layers import TASKS, K, N, close, expected, layer
from torch import nn

from lilora_kernels import LiLoRALinear, check_task_name
from lilora_kernels.ops.delta import reference

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


def test_what_the_parameters_by_task_have_themselves_is_no_name_of_a_task():
    made = layer(())
    for name in {name for kind in (made.lilora_A, made.lilora_U) for name in dir(kind)}:
        with pytest.raises(ValueError, match=r"is not allowed|is reserved"):
            check_task_name(name)
    for name in ("layer", "tie"):
        made.add_task(name)
    x = torch.randn(2, K)
    made.eval().requires_grad_(False)
    close(made(x, task=torch.tensor([0, 1])), torch.cat([expected(made, x[:1], "layer"), expected(made, x[1:], "tie")]))


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


@pytest.mark.parametrize(
    "name", ["keys", "items", "weight", "bias", "training", "lora_A", "lilora_U", "forward", "modules_to_save"]
)
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


def saved(made):
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    return torch.load(file, weights_only=False)
