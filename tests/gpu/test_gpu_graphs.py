"""CUDA graphs: what a replay computes is what launches compute, bit for bit."""

import pytest
import torch
from support.gpu_cases import assert_equal, base_on_gpu, capture, leaves, make_on_gpu, ours, seed_tensor


@pytest.mark.parametrize("op, rows", [("delta", 8), ("linear", 8), ("linear", 64), ("linear", 1000)])
def test_a_graph_follows_changed_task_ids(op, rows):
    i = make_on_gpu(rows, 256, 384, 128, 64, 64, dtype=torch.bfloat16)
    bases = [base_on_gpu(i)]
    ids = i.task.clone()
    with torch.no_grad():
        graph, (y,) = capture(lambda: ours(op, [i], bases, 0.0, None))
        for turn in range(5):
            i.task.copy_(torch.full_like(ids, turn) if turn % 2 else ids.roll(turn))
            i.x.copy_(torch.randn_like(i.x))
            graph.replay()
            (want,) = ours(op, [i], bases, 0.0, None)
            assert torch.equal(y, want)


@pytest.mark.parametrize("op, rows", [("delta", 200), ("linear", 64), ("linear", 1000)])
def test_a_graph_of_forward_and_backward(op, rows):
    i = make_on_gpu(rows, 256, 384, 128, 64, 8, dtype=torch.bfloat16)
    copies, wanted = leaves([i], ("x", "a", "b0", "u", "v", "fusion"))
    bases, seed = [base_on_gpu(i)], seed_tensor(4)

    def step():
        (y,) = ours(op, copies, bases, 0.1, seed)
        return [y, *torch.autograd.grad(y, list(wanted.values()), y.detach())]

    graph, results = capture(step)
    for turn in range(5):
        seed.fill_(turn)
        copies[0].task.copy_(i.task.roll(turn))
        graph.replay()
        assert_equal(results, step())
