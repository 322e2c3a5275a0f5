"""The barrier inside a launch: launches of other sizes in between, on two streams and in two graphs at the same time."""

from functools import partial

import pytest
import torch
from support.gpu_cases import assert_equal, capture, make_on_gpu, run_all, seed_tensor

ROUNDS = 100
# Launches with one, two and three barriers, of one to all processors' worth of work.
SHAPES = [(1, 256, 384), (64, 1024, 512), (200, 256, 2048), (3000, 256, 384)]


@pytest.fixture
def jobs():
    """Functions that run forward and backward of `delta`, one launch each; and their results."""
    made = []
    for at, (rows, columns, outputs) in enumerate(SHAPES):
        i = make_on_gpu(rows, columns, outputs, 128, 64, 8, dtype=torch.bfloat16, seed=at)
        made.append(partial(run_all, "delta", i, 0.1, seed_tensor(at)))
    results = [job() for job in made]
    torch.cuda.synchronize()
    return made, results


def test_launches_of_changing_sizes(jobs):
    for turn in range(ROUNDS):
        at = turn * 7 % len(SHAPES)
        assert_equal(jobs[0][at](), jobs[1][at])


def test_two_streams_at_the_same_time(jobs):
    streams = [torch.cuda.Stream() for _ in range(2)]
    found = []
    for turn in range(ROUNDS):
        for lane, stream in enumerate(streams):
            at = (turn + 2 * lane) % len(SHAPES)
            with torch.cuda.stream(stream):
                found.append((at, jobs[0][at]()))
        if turn % 10 == 9:
            torch.cuda.synchronize()
            for at, results in found:
                assert_equal(results, jobs[1][at])
            found.clear()


def test_two_graphs_replayed_in_turn_and_together(jobs):
    captured = [capture(jobs[0][at]) for at in (1, 2)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    for turn in range(ROUNDS):
        for lane, (graph, _) in enumerate(captured):
            with torch.cuda.stream(streams[lane if turn % 2 else 0]):
                graph.replay()
        if turn % 10 == 9:
            torch.cuda.synchronize()
            for at, (_, results) in zip((1, 2), captured, strict=True):
                assert_equal(results, jobs[1][at])
