"""torch.compile(fullgraph=True): how many graphs, and that they compute what eager does."""

import pytest
import torch
from support.tiny_llava import TASKS, batch, randomise, tiny_llava
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import StaticCache

from lilora_kernels import LiLoRALinear, attach, fuse_mlps, route
from lilora_kernels.layers.lilora import set_task


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()


@pytest.fixture
def compiled():
    """compile(module) -> (compiled module, counter): counter.frame_count is the number of graphs so far."""

    def compile(module):
        counter = CompileCounterWithBackend("aot_eager")
        return torch.compile(module, backend=counter, fullgraph=True), counter

    return compile


def mlp(tasks=(), **options):
    model = nn.Sequential(nn.Linear(12, 16), nn.SiLU(), nn.Linear(16, 12)).requires_grad_(False)
    for i in (0, 2):
        model[i] = LiLoRALinear(model[i], **{"r": 4, "sub_rank": 2, "alpha": 4, "dropout": 0.0, **options})
        for task in tasks:
            model[i].add_task(task)
    randomise(model)
    attach(model)
    return model


def step(run, model, x, **kwargs):
    """Output and gradients of one forward and backward."""
    model.zero_grad(set_to_none=True)
    y = run(x, **kwargs)
    y.square().sum().backward()
    return y.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same(got, wanted):
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-5, atol=1e-6)
    assert got[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(got[1][name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy, dropout", [("first", 0.0), ("always", 0.2)])
def test_twelve_tasks_added_and_trained_make_at_most_two_graphs(compiled, policy, dropout):
    model = mlp(train_a=policy, train_b0=policy, dropout=dropout)
    run, graphs = compiled(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    for i in range(12):
        for layer in (model[0], model[2]):
            layer.add_task(f"task{i}")
        set_task(model, f"task{i}")
        optimiser.param_groups[0]["params"] = [p for p in model.parameters() if p.requires_grad]
        for _ in range(2):
            x = torch.randn(5, 12)
            got = step(run, model, x)
            assert any(f".task{i}" in name for name in got[1])
            if not dropout:
                same(got, step(model, model, x))
            optimiser.step()
    assert graphs.frame_count <= 2
    x = torch.randn(5, 12)
    model.eval()
    outputs = []
    for i in range(12):
        set_task(model, f"task{i}", train=False)
        outputs.append(run(x))
        torch.testing.assert_close(outputs[-1], model(x), rtol=1e-5, atol=1e-6)
    assert not torch.equal(outputs[0], outputs[11])
    assert graphs.frame_count <= 4


def test_changing_task_ids_compile_once_in_inference(compiled):
    model, x = mlp(TASKS).eval(), torch.randn(4, 3, 12)
    run, graphs = compiled(model)
    with torch.no_grad():
        for ids in ([0, 1, 2, -1], [2, 2, 0, 1], [-1, -1, -1, -1], [1, 0, 0, 2]):
            ids = torch.tensor(ids, dtype=torch.int32)
            torch.testing.assert_close(run(x, task_ids=ids), model(x, task_ids=ids), rtol=1e-5, atol=1e-6)
    assert graphs.frame_count == 1


def test_changing_task_ids_compile_once_in_training(compiled):
    model, x = mlp(TASKS), torch.randn(4, 3, 12)
    set_task(model, *TASKS)
    run, graphs = compiled(model)
    for ids in ([0, 1, 2, -1], [2, 2, 0, 1], [1, 1, 1, 1]):
        ids = torch.tensor(ids)
        same(step(run, model, x, task_ids=ids), step(model, model, x, task_ids=ids))
    assert graphs.frame_count == 1


def test_changing_routes_compile_once(compiled):
    model, x = mlp(TASKS).eval(), torch.randn(4, 3, 12)
    run, graphs = compiled(model)
    with torch.no_grad():
        for names in (["read", "count", "where", None], ["count"] * 4, ["where", None, None, "read"]):
            with route(model, names):
                torch.testing.assert_close(run(x), model(x), rtol=1e-5, atol=1e-6)
    assert graphs.frame_count == 1


def test_one_layer_with_explicit_ids(compiled):
    layer, x = mlp(TASKS)[0].eval(), torch.randn(4, 3, 12)
    run, graphs = compiled(layer)
    with torch.no_grad():
        for ids in ([0, 1, 2, -1], [2, 2, 0, 1]):
            ids = torch.tensor(ids, dtype=torch.int32)
            torch.testing.assert_close(run(x, task=ids), layer(x, task=ids), rtol=1e-5, atol=1e-6)
    assert graphs.frame_count == 1


def test_a_task_that_is_not_active_is_told_of_in_a_graph_too(compiled):
    model = mlp("ab")
    set_task(model, "a")
    run, _ = compiled(model)
    with pytest.raises(ValueError, match=r"the id 1; .*: make all tasks of a batch active with set_task"):
        run(torch.randn(2, 12), task_ids=["b", "a"])


def test_deleted_tasks_leave_holes_in_a_graph_too(compiled):
    model, x, ids = mlp(TASKS).eval(), torch.randn(4, 3, 12), torch.tensor([0, 2, -1, 2])
    for layer in (model[0], model[2]):
        layer.delete_task("count")
    run, _ = compiled(model)
    with torch.no_grad():
        torch.testing.assert_close(run(x, task_ids=ids), model(x, task_ids=ids), rtol=1e-5, atol=1e-6)


def test_a_graph_never_reads_a_stale_bank(compiled):
    model, x, ids = mlp(TASKS).eval(), torch.randn(4, 3, 12), torch.tensor([0, 2, -1, 1])
    run, graphs = compiled(model)
    with torch.no_grad():
        for _ in range(3):
            wanted = model(x, task_ids=ids)  # gathers the bank
            torch.testing.assert_close(run(x, task_ids=ids), wanted, rtol=1e-5, atol=1e-6)
            with route(model, ids):
                torch.testing.assert_close(run(x), wanted, rtol=1e-5, atol=1e-6)
            for p in model.parameters():
                p.copy_(torch.randn_like(p) / 3)
            stale, fresh = wanted, run(x, task_ids=ids)
            assert not torch.equal(stale, fresh)
            torch.testing.assert_close(fresh, model(x, task_ids=ids), rtol=1e-5, atol=1e-6)
            for p in model.parameters():
                p.copy_(torch.randn_like(p) / 3)
            with route(model, ids):
                fresh = run(x)
            torch.testing.assert_close(fresh, model(x, task_ids=ids), rtol=1e-5, atol=1e-6)
    assert graphs.frame_count == 2


def test_training_without_routes_after_routed_training_compiles(compiled):
    model, x = mlp(TASKS), torch.randn(4, 3, 12)
    model(x, task_ids=[0, 0, -1, 0]).sum().backward()
    run, graphs = compiled(model)
    same(step(run, model, x), step(model, model, x))
    model(x, task_ids=[0, 0, -1, 0]).sum().backward()
    same(step(run, model, x), step(model, model, x))
    assert graphs.frame_count == 1


def test_a_whole_model_with_task_ids_trains(compiled):
    model, inputs = tiny_llava(layers=1).train(), batch([0, 0])
    set_task(model, *TASKS)
    run, graphs = compiled(model)
    for ids in ([0, 1], [-1, 2]):
        ids = torch.tensor(ids, dtype=torch.int32)
        found = []
        for call in (run, model):
            model.zero_grad(set_to_none=True)
            call(**inputs, task_ids=ids, use_cache=False).logits.square().mean().backward()
            found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert found[0].keys() == found[1].keys()
        for name, gradient in found[1].items():
            torch.testing.assert_close(found[0][name], gradient, rtol=1e-3, atol=1e-5)
    assert graphs.frame_count == 1


def test_twenty_forwards_of_a_whole_model_with_images_compile_once(compiled):
    """Adapted in its projector too. The first forward is not compiled: in it transformers puts hooks into the tower."""
    model = tiny_llava(layers=1)
    run, graphs = compiled(model)
    with torch.no_grad():
        model(**batch([1, 1]))
        for i in range(20):
            inputs, ids = batch([[1, 1], [2, 0], [0, 2]][i % 3]), torch.randint(-1, 3, (2,))
            got = run(**inputs, task_ids=ids, use_cache=False).logits
            torch.testing.assert_close(got, model(**inputs, task_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert graphs.frame_count == 1


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
def test_decode_steps_with_a_static_cache_are_one_graph(compiled, fused):
    """Whatever the tasks, and nothing in it asks the device for a value."""
    model = tiny_llava(layers=1)
    if fused:
        fuse_mlps(model)
    run, graphs = compiled(model.forward)
    caches = [StaticCache(model.config.text_config, max_cache_len=32) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            torch.manual_seed(0)
            model(**batch([1, 1]), task_ids=torch.tensor([0, 2]), past_key_values=cache)
        for i in range(6):
            step = {"input_ids": torch.randint(3, 30, (2, 1)), "task_ids": torch.randint(-1, 3, (2,))}
            with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
                got = run(**step, past_key_values=caches[0]).logits
            torch.testing.assert_close(got, model(**step, past_key_values=caches[1]).logits, rtol=1e-4, atol=1e-4)
    assert graphs.frame_count == 1
    (graph,) = graphs.graphs
    called = {str(node.target) for node in graph.graph.nodes if node.op.startswith("call")}
    assert any("lilora" in name for name in called)
    assert not called & {"item", "tolist", "cpu", "numpy", "nonzero"}
