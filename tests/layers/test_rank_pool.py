"""Layers with a pool of ranks: against dense formulations in fp64, and what a choice may cost."""

import pytest
import torch
from torch import nn

from lilora.methods.pclr.pool import GateRule, Query, RankPool, normalised
from lilora_kernels.layers.base import Factors
from lilora_kernels.layers.rank_pool import Choice, RankPoolLinear

K, N, SAMPLES, TOKENS = 7, 5, 3, 4
SIZES = {"old": 6, "shared": 2, "new": 3}


def make_layer(choose, scaling=1.5, train=("old", "shared", "new")):
    layer = RankPoolLinear(nn.Linear(K, N).double(), choose, scaling)
    layer.base_layer.requires_grad_(False)
    for part, n in SIZES.items():
        layer.put(part, torch.randn(n, K, dtype=torch.float64), torch.randn(N, n, dtype=torch.float64), part in train)
    return layer


def dense(layer, x, parts, gate, rows):
    """base + scaling * sum over ranks j of gate[row, j] (a_j . x) b_j, rank by rank."""
    y = x @ layer.base_layer.weight.T + layer.base_layer.bias
    column = 0
    for part, ranks in parts:
        a, b = layer.lora_A[part], layer.lora_B[part]
        for j in range(a.shape[0]) if ranks is None else ranks.tolist():
            weight = 1.0 if gate is None else gate[rows, column][:, None] if rows is not None else gate[0, column]
            y = y + layer.scaling * weight * (x @ a[j])[:, None] * b[:, j]
            column += 1
    return y


CHOICES = {
    "shared by the batch": lambda: (
        Choice(((("old",), torch.tensor([5, 0])), (("shared",), None), (("new",), None))),
        None,
    ),
    "gated, one for all": lambda: (
        Choice(((("shared",), None), (("new",), torch.tensor([2]))), torch.rand(1, 3, dtype=torch.float64)),
        None,
    ),
    "per sample": lambda: (
        Choice(((("old",), None), (("new",), None)), torch.rand(SAMPLES, 9, dtype=torch.float64).round(decimals=1)),
        torch.arange(SAMPLES, dtype=torch.int32).repeat_interleave(TOKENS),
    ),
    "per row": lambda: (
        Choice(((("new",), None),), torch.randn(SAMPLES * TOKENS, 3, dtype=torch.float64)),
        torch.arange(SAMPLES * TOKENS, dtype=torch.int32),
    ),
}


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("train", [("old", "shared", "new"), ("new",), ("shared", "new")], ids=str)
def test_forward_and_gradients_equal_the_dense_formulation(name, train):
    torch.manual_seed(0)
    choice, rows = CHOICES[name]()
    layer = make_layer(lambda layer, x: (choice, rows), train=train)
    x = torch.randn(SAMPLES, TOKENS, K, dtype=torch.float64, requires_grad=True)
    parts = [(part, ranks) for (part,), ranks in choice.groups]
    wanted = dense(layer, x.reshape(-1, K), parts, choice.gate, None if rows is None else rows.long())
    dy = torch.randn(SAMPLES * TOKENS, N, dtype=torch.float64)
    named = {n: p for n, p in layer.named_parameters() if p.requires_grad and n.split(".")[-1] in dict(parts)}
    wanted_grads = torch.autograd.grad((wanted * dy).sum(), [x, *named.values()])
    got = layer(x)
    torch.testing.assert_close(got.reshape(-1, N), wanted, rtol=1e-9, atol=1e-9)
    got_grads = torch.autograd.grad((got.reshape(-1, N) * dy).sum(), [x, *named.values()])
    for a, b in zip(got_grads, wanted_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_gate_gets_its_gradient():
    torch.manual_seed(0)
    gate = torch.randn(SAMPLES, 9, dtype=torch.float64, requires_grad=True)
    rows = torch.arange(SAMPLES, dtype=torch.int32).repeat_interleave(TOKENS)
    choice = Choice(((("old",), None), (("new",), None)), gate)
    layer = make_layer(lambda layer, x: (choice, rows))
    x = torch.randn(SAMPLES, TOKENS, K, dtype=torch.float64)
    wanted = dense(layer, x.reshape(-1, K), [("old", None), ("new", None)], gate, rows.long())
    dy = torch.randn_like(wanted)
    (expected,) = torch.autograd.grad((wanted * dy).sum(), gate)
    (got,) = torch.autograd.grad((layer(x).reshape(-1, N) * dy).sum(), gate)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_frozen_leading_parts_are_left_out_of_the_gradients(monkeypatch):
    seen = []
    run = Factors.run
    monkeypatch.setattr(Factors, "run", lambda *args: seen.append(args[-1]) or run(*args))
    choice = Choice(((("old",), None), (("shared",), None), (("new",), None)))
    for train, ranks in (
        (("new",), (8, 11)),
        (("shared", "new"), (6, 11)),
        (("old", "shared", "new"), None),
        ((), None),
    ):
        make_layer(lambda layer, x: (choice, None), train=train)(torch.randn(2, K, dtype=torch.float64))
        assert seen.pop() == ranks, train


def test_b_trains_where_a_does_not():
    layer = make_layer(lambda layer, x: CHOICES["shared by the batch"]())
    layer.lora_A.requires_grad_(False)
    layer.lora_B["shared"].requires_grad_(False)
    x, dy = torch.randn(6, K, dtype=torch.float64), torch.randn(6, N, dtype=torch.float64)
    want = dense(
        layer, x, [(names[0], ranks) for names, ranks in CHOICES["shared by the batch"]()[0].groups], None, None
    )
    wanted = [layer.lora_B["old"], layer.lora_B["new"]]
    for got, expected in zip(
        torch.autograd.grad(layer(x), wanted, dy), torch.autograd.grad(want, wanted, dy), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_inference_gathers_the_same_choice_once(monkeypatch):
    from lilora_kernels.layers import rank_pool

    calls = []
    gather = rank_pool.gather
    monkeypatch.setattr(rank_pool, "gather", lambda *args: calls.append(1) or gather(*args))
    choice = Choice(((("old",), torch.tensor([1, 3])), (("shared",), None)))
    layer = make_layer(lambda layer, x: (choice, None))
    x = torch.randn(2, K, dtype=torch.float64)
    with torch.no_grad():
        first = layer(x)
        assert torch.equal(layer(x), first)
        assert len(calls) == 1
        layer.lora_A["old"].mul_(2)  # a change of the values shows
        assert not torch.equal(layer(x), first)
        assert len(calls) == 2


def test_rows_of_the_gate_are_checked_in_every_forward():
    choice, rows = CHOICES["per sample"]()
    layer = make_layer(lambda layer, x: (choice, rows)).eval()
    x = torch.randn(SAMPLES * TOKENS, K, dtype=torch.float64)
    with torch.no_grad():
        layer(x)
        rows = rows[:1]
        with pytest.raises(ValueError, match=r"gate_row is \[1\]; it must be \[M\] with M = 12"):
            layer(x)


def test_put_owns_contiguous_memory_in_fp32_at_least():
    layer = RankPoolLinear(nn.Linear(K, N).bfloat16(), lambda *_: (None, None))
    a = torch.randn(1, K).expand(4, K)
    layer.put("new", a, torch.randn(N, 4), train=True)
    assert layer.lora_A["new"].dtype == torch.float32
    assert layer.lora_A["new"].is_contiguous()
    assert layer.lora_A["new"].data_ptr() != a.data_ptr()
    layer.put("new", a[:0], torch.randn(N, 0), train=True)
    assert layer.rank == 0
    with pytest.raises(ValueError, match=r"part 'new' is \[4, 7\] and \[4, 5\]; it must be \[n, 7\] and \[5, n\]"):
        layer.put("new", torch.randn(4, K), torch.randn(4, N), train=True)


# --- the choice of a pool -------------------------------------------------------------------------------------------------

TEXT, VISION = 6, 4


def make_pool(old, new, shared=0, **rule):
    rule = {"rank": 3, "scope": "sample", "value": "binary", "query": "two", "vision_weight": 0.5} | rule
    pool = RankPool(GateRule(**rule), TEXT, VISION)
    for part, n in (("old", old), ("new", new)):
        pool.put(part, torch.randn(n, TEXT), torch.randn(n, VISION), train=True)
    pool.shared = shared
    return pool


def queries(samples=SAMPLES):
    return Query(normalised(torch.randn(samples, TEXT)), normalised(torch.randn(samples, VISION)))


def plain_scores(pool, query, part):
    """[B][n], a loop over both."""
    text, vision = pool.keys(part)
    rows = []
    for qt, qv in zip(query.text, query.vision, strict=True):
        row = []
        for kt, kv in zip(text, vision, strict=True):
            if pool.rule.query == "two":
                row.append(qt @ kt / kt.norm() + pool.rule.vision_weight * (qv @ kv / kv.norm()))
            else:
                q, k = torch.cat([qt, qv]), torch.cat([kt, kv])
                row.append(q @ k / (q.norm() * k.norm()))
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("query", ["two", "concatenated"])
def test_scores(query):
    torch.manual_seed(1)
    pool, q = make_pool(8, 2, query=query), queries()
    torch.testing.assert_close(pool.scores("old", q), plain_scores(pool, q, "old"), rtol=1e-5, atol=1e-6)


def best(scores, r):
    return set(sorted(range(len(scores)), key=lambda j: (-scores[j].item(), j))[:r])


@pytest.mark.parametrize("value", ["binary", "score"])
def test_every_sample_gets_its_best_ranks(value):
    torch.manual_seed(2)
    pool, q = make_pool(8, 2, shared=1, reuse="all", value=value, expert_scaling=2.0, shared_scaling=4.0), queries()
    choice = pool.choose(q)
    assert [names for names, _ in choice.groups] == [("old",), ("shared",), ("new",)]
    scores = torch.cat([plain_scores(pool, q, p) for p in ("old", "new")], 1)
    for gate, row in zip(choice.gate, scores, strict=True):
        wanted = [2.0 * (row[j].item() if value == "score" else 1) * (j in best(row, 3)) for j in range(10)]
        torch.testing.assert_close(gate, torch.tensor([*wanted[:8], 4.0, *wanted[8:]]), rtol=1e-5, atol=1e-6)


def test_a_batch_shares_the_ranks_of_the_highest_summed_score_in_training_only():
    torch.manual_seed(3)
    pool, q = make_pool(8, 0, scope="batch"), queries()
    choice = pool.choose(q)
    ((names, ranks),) = choice.groups
    assert names == ("old",)
    assert set(ranks.tolist()) == best(plain_scores(pool, q, "old").sum(0), 3)
    assert choice.gate.tolist() == [[1.0, 1.0, 1.0]]
    assert pool.eval().choose(q).gate.shape == (SAMPLES, 8)


def test_old_ranks_top_up_too_few_new_ones():
    torch.manual_seed(4)
    q = queries(1)
    pool = make_pool(8, 2, reuse="top_up")
    (old, ranks), (new, all_new) = pool.choose(q).groups
    assert (old, new, all_new) == (("old",), ("new",), None)
    assert set(ranks.tolist()) == best(plain_scores(pool, q, "old")[0], 1)
    enough = make_pool(8, 3, reuse="top_up").choose(q)
    assert [names for names, _ in enough.groups] == [("new",)]
    inference = make_pool(8, 3, reuse="top_up").eval().choose(queries())
    assert [names for names, _ in inference.groups] == [("old",), ("new",)]


def test_the_switch_gives_new_ranks_to_samples_of_the_newest_task_only():
    torch.manual_seed(5)
    pool, q = make_pool(8, 2, shared=1), queries()
    choice = pool.choose(q, newest=torch.tensor([True, False, True]))
    assert [names for names, _ in choice.groups] == [("old",), ("shared",), ("new",)]
    scores = plain_scores(pool, q, "old")
    for i, (newest, row) in enumerate(zip([True, False, True], scores, strict=True)):
        old = best(row, 1) if newest else best(row, 3)
        assert choice.gate[i].tolist() == [float(j in old) for j in range(8)] + [1.0] + [float(newest)] * 2


def test_identical_keys_choose_the_lowest_ranks_whatever_the_query():
    """A task whose keys are all alike is chosen as a whole: routing by task."""
    pool = make_pool(0, 0)
    task, other = torch.randn(1, TEXT), torch.randn(1, TEXT)
    vision = torch.randn(1, VISION)
    pool.put("old", torch.cat([task.expand(3, -1), other.expand(3, -1)]), vision.expand(6, -1), train=False)
    q = Query(normalised(torch.cat([task, other])), normalised(vision).expand(2, -1))
    assert pool.choose(q).gate.tolist() == [[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]]


def test_a_sample_gets_what_it_gets_alone():
    torch.manual_seed(6)
    pool, q = make_pool(8, 2, reuse="all").eval(), queries()
    together = pool.choose(q).gate
    for i in range(SAMPLES):
        ((names, ranks),) = pool.choose(Query(q.text[i : i + 1], q.vision[i : i + 1])).groups
        assert names == ("old", "new")
        assert set(ranks.tolist()) == set(together[i].nonzero().flatten().tolist())


def test_gradients_reach_keys_by_the_score_only():
    torch.manual_seed(7)
    for value, learns in (("score", True), ("binary", False)):
        pool = make_pool(8, 2, value=value)
        gate = pool.choose(queries()).gate
        assert gate.requires_grad == learns
        if learns:
            gate.square().sum().backward()
            assert pool.text["old"].grad.abs().sum() > 0


def test_wrong_queries_are_named():
    pool = make_pool(4, 2)
    with pytest.raises(ValueError, match=r"the text query is \[3, 5\]; the keys want \[samples, 6\]"):
        pool.choose(Query(torch.randn(3, 5), torch.randn(3, VISION)))
    with pytest.raises(ValueError, match=r"keys of part 'new' are \[2, 3\]; they must be \[n, 4\]"):
        pool.put("new", torch.randn(2, TEXT), torch.randn(2, 3), train=True)


def test_a_thread_that_gathers_in_between_takes_nothing_away():
    class Interrupted(RankPoolLinear):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name == "_gathered" and value is not None and interrupts:
                run(interrupts.pop())  # as a thread does that runs between two lines of this one

    interrupts, chosen = [], []
    choices = [Choice((((part,), None),)) for part in ("old", "new")]
    layer = Interrupted(nn.Linear(K, N).double(), lambda *_: (chosen[-1], None), 1.0)
    for part in ("old", "new"):
        layer.put(part, torch.randn(3, K, dtype=torch.float64), torch.randn(N, 3, dtype=torch.float64), False)
    layer.eval()
    x = torch.randn(2, 4, K, dtype=torch.float64)

    def run(choice):
        chosen.append(choice)
        with torch.no_grad():
            y = layer(x)
        chosen.pop()
        return y

    wanted = [run(choice) for choice in choices]
    assert not torch.allclose(*wanted)
    layer._gathered = None
    interrupts.append(choices[0])
    torch.testing.assert_close(run(choices[1]), wanted[1])
    assert not interrupts
