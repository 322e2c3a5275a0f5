"""Task ids belong to the thread or asyncio task that gave them."""

import asyncio
import contextvars
import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.frozen_model import NAMES, X, close, made, run

from lilora_kernels import freeze, route, set_task, unfreeze
from lilora_kernels.routing.context import tasks_of

WAYS = (["a"] * 4, ["c", None, "a", "b"], ["b", "b", None, "c"], [None] * 4)


def plain(model):
    with torch.no_grad():  # grad mode is the thread's: it may not be left open across an await
        return model(X)


@pytest.mark.parametrize("frozen", [False, True])
def test_threads_with_task_ids_of_their_own(frozen):
    model = made()
    wanted = [run(model, names, X) for names in WAYS]
    if frozen:
        freeze(model)
    barrier = threading.Barrier(4)

    def work(i):
        barrier.wait()
        for turn in range(60):
            at = (i + turn) % len(WAYS)
            if turn % 2:
                got = run(model, WAYS[at], X)
            else:
                with route(model, WAYS[at]), torch.no_grad():
                    got = model(X)
            close(got, wanted[at])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert tasks_of(model).current is None
    assert tasks_of(model).opened == 0


def test_one_thread_changes_the_tasks_that_the_others_do_not_use():
    model = made(("a", "b", "c", "swapped"))
    wanted = [run(model, names, X) for names in WAYS]
    freeze(model, 64)
    ended = threading.Event()

    def work(i):
        turn = i
        while not ended.is_set():
            turn += 1
            at = turn % len(WAYS)
            close(run(model, WAYS[at], X), wanted[at])

    with ThreadPoolExecutor(3) as pool:
        computing = [pool.submit(work, i) for i in range(3)]
        try:
            for turn in range(50):
                unfreeze(model)
                for layer in model:
                    layer.add_task(f"t{turn}")
                    layer.overwrite_task("swapped", *(torch.randn_like(p) for p in layer._own("swapped")))
                freeze(model, 64)
                for layer in model:
                    layer.delete_task(f"t{turn}")
        finally:
            ended.set()
        for each in computing:
            each.result()


def test_asyncio_tasks_that_wait_inside_their_route():
    model = made()
    wanted = [run(model, names, X) for names in WAYS]

    async def work(at):
        with route(model, WAYS[at]):
            for _ in range(3):
                await asyncio.sleep(0)
                close(plain(model), wanted[at])
            close(await asyncio.to_thread(plain, model), wanted[at])

    async def all_of_them():
        await asyncio.gather(*(work(i % len(WAYS)) for i in range(12)))

    asyncio.run(all_of_them())
    assert tasks_of(model).current is None


def test_contexts_that_are_left_in_another_order():
    model = made()
    wanted = [run(model, names, X) for names in WAYS]

    def opened(at):
        with route(model, WAYS[at]):
            while True:
                yield plain(model)

    first, second = opened(0), opened(1)
    close(next(first), wanted[0])
    close(next(second), wanted[1])
    first.close()
    close(next(second), wanted[1])
    contextvars.copy_context().run(second.close)
    assert tasks_of(model).opened == 0
    with route(model, WAYS[2]), tasks_of(model).use(tasks_of(model).current):
        pass
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with route(model, WAYS[1]):
        with tasks_of(model).use(tasks_of(model).current):  # as a recomputation does
            pass
        close(plain(compiled), wanted[1])


def test_compiled_forwards_of_two_threads():
    model = made()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    wanted = [run(model, names, X) for names in WAYS]
    ids = [torch.tensor([-1 if n is None else tasks_of(model).id_of(n) for n in names]) for names in WAYS]

    def work(i):
        for turn in range(20):
            at = (i + turn) % len(WAYS)
            with route(model, WAYS[at]), torch.no_grad():
                close(compiled(X), wanted[at])
            close(run(compiled, ids[at], X), wanted[at])

    work(0)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))


def test_a_thread_without_ids_raises_while_another_has_a_route():
    model = made()
    with route(model, NAMES), ThreadPoolExecutor(1) as pool:
        with pytest.raises(RuntimeError, match=r"route\(model, \.\.\.\) is open in another thread"):
            pool.submit(run, model, None, X).result()
        close(pool.submit(run, model, WAYS[1], X).result(), run(model, WAYS[1], X))
        assert torch.isfinite(run(copy.deepcopy(model), WAYS[0], X)).all()
        twin = pickle.loads(pickle.dumps(model))
        set_task(twin, "b")
        assert pool.submit(run, twin, None, X).result().shape == X.shape
    assert run(model, None, X).shape == X.shape


def test_many_calls_of_eight_threads_and_of_asyncio_tasks():
    """2,400 each, with ids as names, numbers and tensors: none wrong, none refused."""
    model, calls = made(), 2400
    wanted = [run(model, names, X) for names in WAYS]
    numbers = [[-1 if name is None else tasks_of(model).id_of(name) for name in names] for names in WAYS]
    forms = [WAYS, numbers, [torch.tensor(ids) for ids in numbers]]

    def right(turn):
        at = turn % len(WAYS)
        got = run(model, forms[turn % 3][at], X)
        return torch.allclose(got, wanted[at], rtol=0, atol=1e-5)

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(right, range(calls))) == calls

    async def task(start):
        found = 0
        for turn in range(start, calls, 12):
            found += right(turn) if turn % 2 else await asyncio.to_thread(right, turn)
            await asyncio.sleep(0)
        return found

    async def all_of_them():
        return sum(await asyncio.gather(*map(task, range(12))))

    assert asyncio.run(all_of_them()) == calls
