"""The gate before every figure, and what becomes of times."""

import sys
from dataclasses import replace

import pytest
import torch

from bench import compare, models, peers, roofline
from bench.bases import BASES
from bench.problems import Problem, samples
from bench.test_linear import on_cpu
from bench.timing import Ceilings, Machine, measure

TINY = Problem(12, 16, 20, 3, rank=4, sub_rank=2, dtype=torch.float32)
MACHINE = Machine.here(2, tiny=True)
CEILING = Ceilings(1e9, 1e9, 2e9)


def rows(monkeypatch, problem, training, **changed):
    """Rows of base, formula and the changed peers."""
    monkeypatch.setattr(compare, "REGISTRY", compare.REGISTRY | changed)
    names = ["base", "formula", *changed]
    found = list(compare.compare("linear", problem, names, MACHINE, CEILING, training))
    return {(row["implementation"], row.get("direction")): row for row in found}


def but(change):
    """The formula's peer with something changed after it is built."""
    return peers.Peer("changed", lambda sets, training: change(peers.formula(sets, training), sets))


def off(built, sets):
    def forward(at):
        y = built.forward(at).clone()
        y[-1, -1] += 1e-3
        return y

    return replace(built, forward=forward)


def without_gradient_of_v(built, sets):
    class Forget(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y, v):
            ctx.shape = v.shape
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy, dy.new_ones(ctx.shape)

    return replace(built, forward=lambda at: Forget.apply(built.forward(at), sets[at].v))


@pytest.mark.parametrize("training", [False, True])
def test_a_wrong_output_gets_no_figure_and_takes_none_from_others(monkeypatch, training):
    found = rows(monkeypatch, TINY, training, wrong=but(off))
    assert "y of wrong is wrong by" in found["wrong", None]["error"]
    assert "us" in found["formula", "both" if training else "forward"]


def test_a_wrong_gradient_gets_no_figure(monkeypatch):
    found = rows(monkeypatch, TINY, True, wrong=but(without_gradient_of_v))
    assert "gradient 4 of wrong is wrong by" in found["wrong", None]["error"]


def dropping(share, scale):
    """LoRA with a dropout of its own."""

    def build(sets, training):
        built = peers.peft_lora(sets, training)

        def forward(at):
            s, (_, a, b) = sets[at], built.leaves[at]
            keep = (torch.rand_like(s.x) >= share).to(s.x.dtype) * scale
            return s.x @ s.weight.T + peers.SCALING * (s.x * keep) @ a.T @ b.T

        return replace(built, forward=forward)

    return peers.Peer("dropping", build)


@pytest.mark.parametrize(
    "share, scale, why",
    [
        (0.25, 1 / 0.75, None),
        (0.5, 2.0, "of x instead of 0.25"),
        (0.25, 1.0, "is wrong by"),
        (0.0, 1.0, "drops 0.0000 of x"),
    ],
)
def test_dropout_is_held_to_its_share_and_its_scale(monkeypatch, share, scale, why):
    problem = replace(TINY, rows=600, p=0.25)
    found = rows(monkeypatch, problem, True, dropping=dropping(share, scale))
    if why is None:
        assert "us" in found["dropping", "both"]
    else:
        assert why in found["dropping", None]["error"]


def test_the_gate_leaves_the_base_weight_as_it_was(monkeypatch):
    kept = []

    def remember(built, sets):
        kept.extend((s, s.weight.clone()) for s in sets)
        return built

    rows(monkeypatch, replace(TINY, p=0.25), True, kept=but(remember))
    assert kept
    assert all(torch.equal(s.weight, weight) for s, weight in kept)


def test_a_peer_that_cannot_run_says_why(monkeypatch):
    def refuse(sets, training):
        raise peers.Unavailable("it is far away")

    found = rows(monkeypatch, TINY, False, absent=peers.Peer("absent", refuse))
    assert found["absent", None]["unavailable"] == "it is far away"


def test_overhead_removed_is_taken_against_peft_at_the_same_dropout():
    times = {"base": [100.0] * 5, "peft": [140.0] * 5, "peft_names": [180.0] * 5, "ours": [110.0] * 5}
    times = {name: {"forward": found} for name, found in times.items()}
    assert compare.removed(times, "ours", "forward", 1)["overhead_removed"] == 0.75
    mixed = compare.removed(times, "ours", "forward", 8)
    assert mixed["overhead_removed"] == 0.875
    assert mixed["ratio_to_peft"]["median"] == round(110 / 180, 4)
    assert compare.removed(times, "base", "forward", 1) == {}


def test_the_base_by_others_is_compared_as_the_base():
    names = ("base", "base_mkl", "peft", "ours")
    times = {
        name: {"forward": [time] * 5, "host": [time] * 5}
        for name, time in zip(names, (4.0, 2.0, 8.0, 6.0), strict=True)
    }
    field = compare.Field({}, [], False, {}, dict.fromkeys(names, 0.0), [])
    found = {name: compare.row(field, TINY, times, name, "forward", CEILING) for name in names}
    assert found["ours"]["ratio_to_peers"]["base_mkl"]["median"] == 3
    assert "overhead_removed" not in found["base_mkl"]
    assert found["base_mkl"]["bytes"] == found["base"]["bytes"] < found["ours"]["bytes"]


def test_every_case_on_a_cpu_has_a_name_of_its_own():
    names = [str(case) for case in on_cpu()]
    assert len(set(names)) == len(names)


def test_bytes_over_the_rate_of_reading_alone():
    assert CEILING.rates(2.0, 1000, 1)["percent_of_read"] == 25


def test_an_absent_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    found = rows(monkeypatch, TINY, False, base_openvino=BASES["base_openvino"])
    assert found["base_openvino", None]["unavailable"] == "openvino is not installed"


def test_the_kernels_of_few_rows_alone_refuse_more(monkeypatch):
    found = rows(monkeypatch, replace(TINY, rows=1025), False, base_streamed=BASES["base_streamed"])
    assert found["base_streamed", None]["unavailable"] == "our CPU kernels do not take it"


@pytest.mark.parametrize("mib, sets", [(45, 3), (180, 2), (10, 6)])
def test_inputs_that_take_turns_on_a_cpu_do_not_fit_into_its_cache(mib, sets):
    assert Machine(torch.device("cpu"), 2).copies(mib << 20) == sets


def test_rounds_alternate_and_stop_in_time():
    calls = []

    def candidate(name):
        def run(turn, mark):
            calls.append(name)
            mark()

        return run

    machine = Machine(torch.device("cpu"), 50)
    candidates = {name: candidate(name) for name in "ab"}
    times = measure(machine, candidates, ["all"], seconds=0.0)
    assert len(times["a"]["all"]) == 5
    assert calls[:6] in (list("baabba"), list("abbaab"))


def test_samples_are_the_rows_of_their_tasks():
    for rows_, tasks in ((7, 3), (64, 64), (20, 1), (5, 4)):
        ids = torch.arange(rows_) * tasks // rows_
        found = torch.cat([torch.full((at.stop - at.start,), t) for t, at in samples(Problem(rows_, 4, 4, tasks))])
        assert torch.equal(found, ids)


def test_a_model_that_mixes_up_tasks_gets_no_figure():
    size = models.TINY
    base = models.frozen("MLP", size, torch.device("cpu"))
    ours = models.variant(base, "ours", "MLP", size, 0.0, mixed=True)
    x = torch.randn(size.samples, 3, size.hidden)

    def output(model, more):
        return model(x.to(models.dtype_of(model)), **more)

    assert models.gate(base, {"ours": ours}, output, size)["ours"] < 1e-5
    swapped = replace(ours, more={"task_ids": ours.more["task_ids"].flip(0)})
    with pytest.raises(compare.Wrong, match="ours is off by"):
        models.gate(base, {"ours": swapped}, output, size)


def test_saved_and_peak_bytes_of_a_product():
    x, w = torch.randn(256, 128, requires_grad=True), torch.randn(64, 128, requires_grad=True)
    assert compare.saved_bytes(lambda: x @ w.T, [w]) == x.nbytes
    peak = compare.peak_bytes(MACHINE, lambda: (x.detach() @ w.detach().T).relu())
    assert 2 * 256 * 64 * 4 <= peak < 2.1 * 256 * 64 * 4


def test_peft_on_paper_is_what_peft_does():
    """Its own layers, on tensors without data: the launches, bytes and operations that bench/roofline.py has of it."""
    from peft import LoraConfig, get_peft_model

    problem = Problem(64, 48, 80, rank=8)
    call = roofline.Call(problem)
    roofline.peft(call)
    linear = torch.nn.Sequential(torch.nn.Linear(48, 80, bias=False, device="meta", dtype=torch.bfloat16))
    config = LoraConfig(r=8, target_modules=["0"], lora_alpha=16)
    layer = get_peft_model(linear, config, autocast_adapter_dtype=False).base_model.model[0].to(torch.bfloat16)
    x = roofline.made(64, 48).requires_grad_()
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    with roofline.Counter() as forward:
        y = layer(x)
    with roofline.Counter() as backward:
        torch.autograd.grad(y, wanted, torch.empty_like(y))
    for theirs, ours in ((forward, call.forward), (backward, call.backward)):
        assert sorted(launch.memory for launch in theirs.launches) == sorted(launch.memory for launch in ours.launches)
        assert sum(launch.flops for launch in theirs.launches) == sum(launch.flops for launch in ours.launches)
