"""A frozen model computes what it did, without stacking; its tensors stay where they are; copies and files are whole."""

import copy
import io

import pytest
import torch
from safetensors.torch import load, save
from support.counting import Operations
from support.frozen_model import NAMES, K, Model, N, X, close, made, run
from support.tiny_llava import randomise
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from lilora_kernels import LiLoRALinear, attach, freeze, route, set_task, unfreeze


@pytest.mark.parametrize("fusion", [True, False])
def test_it_computes_what_it_did_and_stacks_nothing(fusion):
    model = made(fusion=fusion)
    wanted, state = run(model, NAMES, X), {name: t.clone() for name, t in model.state_dict().items()}
    freeze(model, capacity=5)
    with Operations() as found:
        assert torch.equal(run(model, NAMES, X), wanted)
    assert found.seen["stack"] == 0
    assert {name: p.requires_grad for name, p in model.named_parameters() if p.requires_grad} == {}
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(model.state_dict()[name], t) for name, t in state.items())


@pytest.mark.parametrize("write", ["copy_", ".data", "load_state_dict", "assign", "setattr", "cast"])
def test_what_is_written_is_seen(write):
    model, plain = made(), made()
    freeze(model)
    for one in (model, plain):
        torch.manual_seed(2)
        state, drawn = {}, {}
        for name, tensor in plain.state_dict().items():  # A and B0 have one value under the names of all tasks
            key = name.rpartition(".")[0] if "lilora_A" in name or "lilora_B" in name else name
            state[name] = drawn.setdefault(key, torch.randn_like(tensor)) if "lilora" in name else tensor
        with torch.no_grad():
            if write == "copy_":
                for name, p in one.named_parameters():
                    p.copy_(state[name])
            elif write == ".data":
                for name, p in one.named_parameters():
                    p.data.copy_(state[name])
            elif write == "cast":
                one.double()
            elif write == "setattr":
                one[0].lilora_U["c"] = nn.Parameter(state["0.lilora_U.c"].clone())
            else:
                one.load_state_dict(state, assign=write == "assign")
    x = X.double() if write == "cast" else X
    assert torch.equal(run(model, NAMES, x), run(plain, NAMES, x))
    assert not torch.equal(run(model, NAMES, x).float(), run(made(), NAMES, X))


def test_tasks_come_and_go_without_another_graph_and_without_moving():
    model = made()
    freeze(model, capacity=6)
    graphs = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    for layer in model:
        layer.delete_task("b")
    for step, name in enumerate(("d", "e")):
        for layer in model:
            layer.add_task(name)
            with torch.no_grad():
                for own in layer._own(name):
                    own.normal_()
        for ids in ([0, -1, 2, 3 + step], [3, 1, 1, 2]):
            task = torch.tensor(ids, dtype=torch.int32)
            with torch.no_grad():
                got = compiled(X, task_ids=task)
            twin = copy.deepcopy(model)
            close(got, run(twin, [i if i != 1 else -1 for i in ids], X))
    assert graphs.frame_count == 1
    assert all(p.data_ptr() == places[name] for name, p in model.named_parameters() if name in places)
    for name in ("f", "g"):  # g has the id of b, for there is no other
        for layer in model:
            layer.add_task(name)
            with torch.no_grad():
                for own in layer._own(name):
                    own.normal_()
    ids = [1, 5, -1, 1]
    with torch.no_grad():
        got = compiled(X, task_ids=torch.tensor(ids, dtype=torch.int32))
    close(got, run(copy.deepcopy(model), ["g", "f", None, "g"], X))
    close(got, run(model, ids, X))
    assert graphs.frame_count == 1
    for layer in model:
        with pytest.raises(
            ValueError, match=r"'h' does not fit: the model was frozen with a capacity of 6 tasks, and has them"
        ):
            layer.add_task("h")
    assert "h" not in model[0].tasks
    assert model[0].tasks == ["a", "g", "c", "d", "e", "f"]
    with pytest.raises(ValueError, match="capacity is 3, but 6 ids are taken"):
        freeze(model, capacity=3)


def test_any_number_of_tasks_comes_and_goes_in_the_room_of_a_few():
    model, plain = made(["a", "b"]), made(["a", "b"])
    freeze(model, capacity=3)
    for step in range(40):
        name = f"t{step}"
        for one in (model, plain):
            torch.manual_seed(step)
            for layer in one:
                layer.add_task(name)
            randomise(one)
        close(run(model, [name, "a", "b", name], X), run(plain, [name, "a", "b", name], X))
        for one in (model, plain):
            for layer in one:
                layer.delete_task(name)
    tasks = model[0].model_tasks
    assert (tasks.names, tasks.known) == (["a", "b", None], ("a", "b"))
    with pytest.raises(ValueError, match=r"task_ids holds 2; known ids are \{0: 'a', 1: 'b'\}"):
        run(model, [2, 0, 0, 0], X)


def test_a_task_that_takes_an_id_of_the_running_batch_is_an_error():
    model = made()
    freeze(model, capacity=3)

    def replace(*_):
        for layer in model:
            layer.delete_task("a")
        for layer in model:
            layer.add_task("z")

    run(model, ["a", "b", "c", "b"], X)
    hook = model[1].register_forward_pre_hook(replace)
    with pytest.raises(ValueError, match="the task with the id 0 was deleted, but a sample of the running batch"):
        run(model, ["a", "b", "c", "b"], X)
    hook.remove()
    assert model[0].model_tasks.id_of("z") == 0
    run(model, ["z", "b", "c", "b"], X)


def test_a_task_that_cannot_be_added_leaves_the_id_of_a_deleted_one_free():
    tasks = made(["a", "b", "c"])[0].model_tasks
    tasks.remove("b")
    tasks.add("d", 3)
    assert tasks.names == ["a", "d", "c"]
    tasks.remove("d", forget=True)
    assert (tasks.names, tasks.known, tasks.has_room(3)) == (["a", None, "c"], ("a", "c"), True)
    tasks.add("e")
    assert tasks.id_of("e") == 3


def test_files_and_copies_hold_each_task_once():
    model = made([f"t{i}" for i in range(8)])
    state = {name: t.clone() for name, t in model.state_dict().items() if "lilora_U" in name or "lilora_V" in name}
    freeze(model, capacity=64)
    windows = {name: t for name, t in model.state_dict().items() if name in state}
    assert all(torch.equal(load(save(windows))[name], t) for name, t in state.items())
    file = io.BytesIO()
    torch.save(windows["0.lilora_U.t3"], file)
    assert file.tell() < 4096
    twin = copy.deepcopy(model)
    names = ["t3", "t1", None, "t7"]
    close(run(twin, names, X), run(model, names, X))
    with torch.no_grad():
        twin[0].lilora_U["t3"].zero_()
    assert not torch.equal(run(twin, names, X), run(model, names, X))


@pytest.mark.parametrize("end", [unfreeze, nn.Module.train], ids=["unfreeze", "train"])
def test_afterwards_it_learns_again(end):
    model = made()
    freeze(model)
    end(model)
    set_task(model, "a", "b")
    for _ in range(2):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        before = run(model, NAMES, X)
        model(X, task_ids=["a", "b", None, "a"]).square().sum().backward()
        optimizer.step()
        assert not torch.equal(run(model, NAMES, X)[2], before[2])
        assert torch.equal(run(model, ["c"] * 4, X)[0], run(made(), ["c"] * 4, X)[0]) == (model[0].train_a == "never")
    model[0].add_task("d")


def test_a_frozen_model_whose_task_trains_again_gets_its_gradients():
    model = made()
    freeze(model)
    set_task(model, "a")
    model(X, task_ids=["a", "b", None, "a"]).square().sum().backward()
    assert model[0].lilora_U["a"].grad.abs().sum() > 0


def test_freezing_again_with_room_for_more_and_before_any_task():
    model, wanted = made(), run(made(), NAMES, X)
    for capacity in (4, 8, 3):
        freeze(model, capacity)
        assert torch.equal(run(model, NAMES, X), wanted)
    model.train().eval()
    for layer in model:
        layer.add_task("d")
    freeze(model)
    assert torch.equal(run(model, NAMES, X), wanted)
    empty = made(())
    freeze(empty, 2)
    for layer in empty:
        layer.add_task("a")
    randomise(empty)
    plain = copy.deepcopy(empty)
    close(run(empty, ["a", None, "a", None], X), run(plain, ["a", None, "a", None], X))


def test_a_deleted_task_of_an_open_route_is_named():
    model = made()
    freeze(model)
    with route(model, NAMES), torch.no_grad():
        model(X)
        for layer in model:
            layer.delete_task("c")
        with pytest.raises(ValueError, match="the task with the id 2 was deleted"):
            model(X)


def test_one_layer_that_trains_again_takes_nothing_from_the_others():
    model, wanted = made(), run(made(), NAMES, X)
    freeze(model, 5)
    model[1].train().eval()
    model.double()
    close(run(model, NAMES, X.double()), wanted.double())
    for layer in model:
        layer.add_task("d")


def test_tasks_of_several_dtypes_are_refused():
    model = made()
    for layer in model:
        layer.lilora_U["b"] = nn.Parameter(layer.lilora_U["b"].bfloat16())
    with pytest.raises(RuntimeError, match=r"of the dtypes .* cannot be frozen together"):
        freeze(model)


def test_what_is_not_here_cannot_be_frozen():
    with torch.device("meta"):
        model = Model(LiLoRALinear(nn.Linear(K, N), r=4, sub_rank=2))
        model[0].add_task("a")
    attach(model)
    with pytest.raises(RuntimeError, match="sharded or on the meta device cannot be frozen"):
        freeze(model)


def test_freezing_again_with_the_same_room_moves_nothing():
    model = made()
    freeze(model, 8)
    wanted = run(model, NAMES, X)
    where = {name: p.data_ptr() for name, p in model.named_parameters()}
    stacks = [layer._frozen[2].data_ptr() for layer in model]
    unfreeze(model)
    for layer in model:
        layer.add_task("new")
        layer.delete_task("b")
    freeze(model, 8)
    assert torch.equal(run(model, NAMES, X), wanted)
    assert [layer._frozen[2].data_ptr() for layer in model] == stacks
    assert not any(layer._frozen[2][1].any() for layer in model)
    now = {name: p.data_ptr() for name, p in model.named_parameters()}
    assert all(where[name] == at for name, at in now.items() if name in where)
    for layer in model:
        start, size = layer._frozen[2].data_ptr(), layer._frozen[2].nbytes
        assert start <= layer.lilora_U["new"].data_ptr() < start + size
    unfreeze(model.double())
    freeze(model, 8)
    assert torch.allclose(run(model, NAMES, X.double()), wanted.double(), atol=1e-5)


def test_a_change_of_tasks_costs_no_more_after_many_deleted_ids_and_is_settled_once_for_all_layers():
    torch.manual_seed(0)
    model = Model(*(LiLoRALinear(nn.Linear(K, N), r=4, sub_rank=2, dropout=0.0) for _ in range(6)))
    for layer in model:
        layer.add_task("a")
    attach(model)
    model.eval()

    def come_and_go(name):
        for layer in model:
            layer.add_task(name)
        places = [layer.lilora_U[name].detach() for layer in model]
        with torch.no_grad():
            for place in places:
                place.fill_(1)
        tables = []
        own = torch.tensor

        def counting(*args, **kwargs):
            tables.append(1)
            return own(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch, Operations() as found:
            patch.setattr(torch, "tensor", counting)
            for layer in model:
                layer.delete_task(name)
        assert not any(place.any() for place in places), "a deleted task leaves nothing in the stacks"
        return len(tables), found.seen

    freeze(model, capacity=300)
    first = come_and_go("first")
    for i in range(200):
        come_and_go(f"task{i}")
    assert come_and_go("last") == first
    assert first[0] == 3  # tables, of the model: positions in training and beyond it, slots
    run(model, ["a", None], X[:2])


def test_slots_are_those_of_the_capacity_that_is_asked_for_again():
    model, plain = made(), made()
    for capacity in (5, 8, 5, None, 5):
        unfreeze(model)
        freeze(model, capacity)
        assert torch.equal(run(model, NAMES, X), run(plain, NAMES, X))


# --- what others hold -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("thawed", [False, True])
def test_tensors_that_were_taken_out_stay_as_they_are_when_their_task_goes_and_another_comes(thawed):
    model = made()
    freeze(model, capacity=3)
    if thawed:
        unfreeze(model)
    own = (".lilora_U.b", ".lilora_V.b", ".lilora_fusion.b")
    taken = {name: t for name, t in model.state_dict().items() if name.endswith(own)}
    held = [getattr(layer, kind)["b"] for layer in model for kind in ("lilora_U", "lilora_V", "lilora_fusion")]
    before = {name: t.clone() for name, t in taken.items()}, [t.detach().clone() for t in held]
    for layer in model:
        layer.delete_task("b")
        layer.add_task("d")
    randomise(model)
    assert all(torch.equal(t, before[0][name]) for name, t in taken.items())
    assert all(torch.equal(t, was) for t, was in zip(held, before[1], strict=True))
    assert model.state_dict(keep_vars=True)["0.lilora_U.d"] is model[0].lilora_U["d"]


def test_a_swap_between_a_forward_and_its_backward_raises():
    model, x = made(), X.clone().requires_grad_()
    freeze(model)
    y = model(x, task_ids=NAMES)
    u, v = torch.randn(N, 2), torch.randn(2, 4)
    model[1].overwrite_task("c", u, v, torch.zeros(1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_parameters_that_processes_share_are_not_frozen():
    model = made()
    model.share_memory()
    with pytest.raises(RuntimeError, match=r"shared memory .* cannot be frozen"):
        freeze(model)
    model = made()
    wanted = run(model, NAMES, X)
    freeze(model)
    with pytest.warns(UserWarning, match="parameters in shared memory are not frozen any more"):
        model.share_memory()
    assert [layer.capacity for layer in model] == [None, None]
    assert all(p.is_shared() for p in model.parameters())
    assert torch.equal(run(model, NAMES, X), wanted)


def test_a_functional_call_with_other_parameters_raises():
    model, other = made(), made()
    randomise(other)
    wanted = run(model, NAMES, X)
    freeze(model)
    with pytest.raises(RuntimeError, match=r"parameters of task 'a' were replaced"), torch.no_grad():
        torch.func.functional_call(model, dict(other.named_parameters()), (X,), {"task_ids": NAMES})
    close(run(model, NAMES, X), wanted)
