"""`delta_pair` with the eager backend: two calls of `delta` or `linear` with the same mask, their dx added."""

import pytest
import torch
from support.cases import SCALING, base, make
from support.pair_cases import PAIR_CASES, adapters, check_pair, pair_id

from lilora_kernels import functional


@pytest.mark.parametrize("case", PAIR_CASES, ids=pair_id)
def test_equals_two_calls(case):
    check_pair(**case)


def arguments(outputs=(20, 28)):
    one, two = (make(outputs=n, dtype=torch.float32, seed=n).leaves() for n in outputs)
    weights = [base(i)[0] for i in (one, two)]
    first, second = adapters(one), adapters(two)
    return (one.x, weights[0], None, *first, weights[1], None, *second, one.task, torch.tensor([5]), SCALING, 0.1, None)


def test_opcheck():
    torch.library.opcheck(torch.ops.lilora.delta_pair.default, arguments())


def test_fullgraph_compile():
    torch._dynamo.reset()
    one, two = (make(outputs=n, dtype=torch.float32, seed=n) for n in (20, 28))

    def run(x):
        return functional.delta_pair(torch.sin(x), adapters(one), adapters(two), task=one.task, scaling=SCALING)

    for got, want in zip(torch.compile(run, fullgraph=True)(one.x), run(one.x), strict=True):
        torch.testing.assert_close(got, want)


def test_gradcheck():
    one, two = (make(rows=5, columns=5, outputs=n, rank=3, sub_rank=2, tasks=2, seed=n).leaves() for n in (4, 3))
    factors = [*adapters(one), *adapters(two)]
    weights = [(base(i)[0], base(i)[1]) for i in (one, two)]

    def run(x, *given):
        return functional.delta_pair(
            x, given[:5], given[5:], bases=weights, task=one.task, seed=torch.tensor([3]), p=0.3, scaling=SCALING
        )

    assert torch.autograd.gradcheck(run, [one.x, *factors])


def test_one_output_alone_has_gradients():
    one, two = (make(outputs=n, dtype=torch.float32, seed=n).leaves() for n in (20, 28))
    y, _ = functional.delta_pair(one.x, adapters(one), adapters(two), task=one.task, scaling=SCALING)
    y.sum().backward()
    assert (one.u.grad != 0).any()
    assert (two.u.grad == 0).all()


@pytest.mark.parametrize("changed, words", [("a", "a_1 is"), ("v", "v is"), ("fusion", "fusion_1 is")])
def test_pairs_that_do_not_fit(changed, words):
    one, two = (make(outputs=20, dtype=torch.float32) for _ in range(2))
    other = make(outputs=20, rank=9, sub_rank=5, dtype=torch.float32)
    if changed == "a":
        two = other
    else:
        setattr(two, changed, None if changed == "fusion" else getattr(other, changed))
    with pytest.raises(ValueError, match=words):
        functional.delta_pair(one.x, adapters(one), adapters(two), task=one.task)


def test_autocast_casts_the_activations():
    one, two = (make(outputs=n, dtype=torch.float32, seed=n).leaves() for n in (20, 28))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ys = functional.delta_pair(one.x, adapters(one), adapters(two), bases=[base(one), base(two)], task=one.task)
    assert all(y.dtype == torch.bfloat16 for y in ys)
    sum(y.float().sum() for y in ys).backward()
    assert one.x.grad.dtype == one.u.grad.dtype == two.a.grad.dtype == torch.float32


def test_compiled_backward_of_strided_factors():
    torch._dynamo.reset()
    one, two = (make(outputs=n, dtype=torch.float32, seed=n) for n in (20, 28))
    for i in (one, two):
        i.a, i.b0 = i.a.T.contiguous().T, i.b0.T.contiguous().T

    def run(one, two):
        ys = functional.delta_pair(one.x, adapters(one), adapters(two), task=one.task, ranks=(1, 5))
        return sum(y.square().sum() for y in ys)

    grads = []
    for function in (run, torch.compile(run, fullgraph=True)):
        leaves = one.leaves(), two.leaves()
        for i, given in zip(leaves, (one, two), strict=True):
            i.a = given.a.detach().requires_grad_()
        function(*leaves).backward()
        grads.append([leaves[0].x.grad, *(t.grad for i in leaves for t in adapters(i))])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)
    assert (grads[0][1][[0, 5, 6, 7]] == 0).all()


def test_bases_that_do_not_fit():
    one, two = (make(outputs=n, dtype=torch.float32, seed=n).leaves() for n in (20, 28))
    bases = [base(one), base(two)]

    def run(first=None, bases=bases):
        return functional.delta_pair(one.x, first or adapters(one), adapters(two), bases=bases, task=one.task)

    with pytest.raises(ValueError, match="first has 4 entries"):
        run(first=adapters(one)[:4])
    with pytest.raises(ValueError, match="two pairs"):
        run(bases=[base(one)[0], None])
    with pytest.raises(ValueError, match="give the weight too"):
        run(bases=[(None, bases[0][1]), bases[1]])
    with pytest.raises(ValueError, match="weight is"):
        run(bases=[bases[1], bases[0]])
    with pytest.raises(TypeError, match=r"use torch\.autocast"):
        run(bases=[(bases[0][0].bfloat16(), None), bases[1]])
    with pytest.raises(ValueError, match="the base is frozen here"):
        run(bases=[(bases[0][0].requires_grad_(), None), bases[1]])
