"""The model of an H200: what it counts, that the ceilings alone give the paper's ratios, and what it says of our plans."""

import itertools
import json
from functools import partial

import pytest
import torch

from bench import model, roofline
from bench.problems import ATTENTION, DOWN, GATE_UP, Problem
from lilora_kernels.ops.delta import eager, triton_backend
from tools import cuda_traffic, traffic

# --- counts and ceilings ----------------------------------------------------------------------------------------------


def test_the_counter_counts_what_computes_its_bytes_and_its_operations():
    x, w = torch.empty(8, 4, device="meta"), torch.empty(6, 4, device="meta", dtype=torch.float32)
    with roofline.Counter() as seen:
        y = torch.mm(x, w.T)
        y.addmm_(x, w.T)
        torch.mm(x, w.T, out=y)
        torch.empty_like(y).zero_()
        torch.empty(8, 1, device="meta").expand(8, 6) + 1
    assert [launch.name for launch in seen.launches] == ["mm", "addmm_", "mm", "zero_", "add"]
    operands, result = 32 + 24, 48
    assert [launch.memory for launch in seen.launches] == [
        4 * elements for elements in (operands + result, operands + 2 * result, operands + result, result, 8 + result)
    ]
    assert [launch.wide_flops for launch in seen.launches] == [2 * 8 * 4 * 6] * 3 + [0, 0]
    assert seen.launches[1].accumulated == 4 * result
    with roofline.Counter() as seen, seen.one_launch("both"):
        x.bfloat16() @ w.bfloat16().T
        y.copy_(y)
    assert len(seen.launches) == 1
    assert seen.launches[0].flops == 2 * 8 * 4 * 6
    assert seen.launches[0].memory == 4 * (operands + result) + 2 * (operands + result)


PEFT = roofline.peft
HIDDEN = roofline.expand_first, False
EXPOSED = partial(roofline.expand_first, apart=True), True


@pytest.mark.parametrize(
    "implementation, exposed, shape, p, forward, backward, both",
    [
        (roofline.floor, False, GATE_UP, 0, 1.043, 1.086, 1.064),
        (roofline.floor, False, DOWN, 0, 1.043, 1.086, 1.064),
        (roofline.floor, False, ATTENTION, 0, 1.0625, 1.125, 1.094),
        (PEFT, False, GATE_UP, 0, 1.288, 1.268, 1.278),
        (PEFT, False, DOWN, 0, 1.147, 1.296, 1.221),
        (PEFT, False, ATTENTION, 0, 1.318, 1.413, 1.366),
        (PEFT, False, GATE_UP, 0.05, 1.330, None, None),
        (PEFT, False, DOWN, 0.05, 1.259, None, None),
        (roofline.addmm_after, False, GATE_UP, 0, 1.108, 1.208, 1.158),
        (roofline.addmm_after, False, DOWN, 0, 1.080, 1.236, 1.158),
        (*HIDDEN, GATE_UP, 0, 1.064, 1.098, 1.081),
        (*HIDDEN, DOWN, 0, 1.064, 1.116, 1.090),
        (*EXPOSED, GATE_UP, 0, 1.108, 1.145, 1.127),
        (*EXPOSED, DOWN, 0, 1.080, 1.173, 1.127),
    ],
)
def test_the_ceilings_alone_give_the_ratios_of_the_roofline_on_paper(
    implementation, exposed, shape, p, forward, backward, both
):
    """Paper has three digits, and the gradients of parameters in fp32: a thousandth more in backward."""
    found = roofline.ratios(implementation, Problem(8192, *shape, p=p), exposed)
    for counted, wanted in zip(found, (forward, backward, both), strict=True):
        assert wanted is None or counted == pytest.approx(wanted, abs=1.5e-3)


def test_a_launch_takes_as_long_as_its_slowest_part_and_its_start():
    launch = roofline.Launch("", memory=4.3e6, issued=11e6, flops=790e6, waves=1.5, start="barrier")
    assert launch.parts()["L2"] == pytest.approx(3e-6)
    assert launch.seconds() == pytest.approx(3e-6 + roofline.START["barrier"])
    assert roofline.Launch("", loads=100).seconds() == pytest.approx(100 * 0.2e-6 + 2.5e-6)
    assert roofline.Launch("", draws=8e6).parts()["draws"] == pytest.approx(55e6 / (132 * 64 * 1.755e9))


@pytest.mark.parametrize(
    "result, waves",
    [
        ((8192, 11008), 21 * 132 / (64 * 43)),  # 128 x 256
        ((2048, 11008), 11 * 132 / (16 * 86)),  # 128 x 128
        ((8192, 128), 1),  # fewer tiles than processors
        ((8, 2048, 11008), 42 * 132 / (8 * 16 * 43)),
    ],
)
def test_products_come_in_waves_of_the_tiles_that_suit_them(result, waves):
    assert roofline.tiled(result) == pytest.approx(waves)


def test_sizes_of_the_cuda_kernels():
    """By hand from csrc: the forward at few rows and at 8192, the backward at 8192, chunks whose partials are bounded."""
    one, many = (traffic.Shape(m, *GATE_UP, 128, 64) for m in (1, 8192))
    shrink, prepare, expand = cuda_traffic.forward(one, True, 132)
    assert (shrink.items, prepare.items, expand.items) == (8, 1, 126)  # ranges of 88 outputs
    assert prepare.loads == 1  # eight partial sums of four elements at once
    for rows, tasks in ((16, 1), (17, 1), (64, 1), (64, 8), (64, 64)):
        shape = traffic.Shape(rows, *GATE_UP, 128, 64, tasks)
        shrink, prepare, expand = cuda_traffic.forward(shape, True, 132)
        assert (prepare.items, prepare.loads, expand.items) == (-(-rows // 16), 2, 126)
        issued = {each.tensor: each.issued for phase in (shrink, expand) for each in phase.traffic}
        once = {"weight": 4096 * 11008 * 2, "a": 128 * 4096 * 2, "b0": 11008 * 128 * 2, "u": tasks * 11008 * 64 * 2}
        assert {name: issued[name] for name in once} == once
    shrink, prepare, expand = cuda_traffic.forward(many, False, 132)
    assert (shrink.items, prepare.items, expand.items) == (64 * 2, 512, 64 * 2)
    *_, expand = cuda_traffic.forward(many, False, 132, 132 * cuda_traffic.expanding_at_once(many))
    assert expand.items == 64 * 4  # two blocks of a processor
    found = list(cuda_traffic.backward(many, 132, True))
    sums = 256 + 688 + 344 + 4
    assert [phase.items for phase in found] == [512 + 4, 64 * 2 + 4 * 86, 512, 64 * 2 + 4 * (22 + 1) + 1, sums]
    assert [phase.loads for phase in found] == [2, 0, 3, 0, 2]
    assert cuda_traffic.chunk_rows(many) == 2048
    assert cuda_traffic.chunk_rows(traffic.Shape(8192, *GATE_UP, 128, 64, 64)) == 8192


# --- our plans --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan", ["composed", "Triton composed", "Triton one_launch", "Triton by_phase", "CUDA by_phase", "CUDA fused"]
)
@pytest.mark.parametrize("problem", [Problem(512, *GATE_UP, 8), Problem(8192, *DOWN)])
def test_a_plan_does_at_least_what_has_to_be(plan, problem):
    found = model.predict(problem, plan)
    for direction, figures in found.items():
        bytes_, flops = problem.least(direction, adapted=True)
        assert figures["memory"] >= 0.98 * bytes_
        assert figures["flops"] >= flops
        assert figures["us"] > 1e6 * max(bytes_ / roofline.MEMORY, flops / roofline.PRODUCTS)
        assert figures["ratio"] > 1
    assert found["both"]["us"] == pytest.approx(found["forward"]["us"] + found["backward"]["us"])


def test_launches_of_the_plans():
    few, many = Problem(64, *GATE_UP), Problem(8192, *GATE_UP, 8, 0.05)
    launches = lambda problem, plan: [figures["launches"] for figures in model.predict(problem, plan).values()]  # noqa: E731
    assert launches(few, "Triton one_launch") == [2, 2, 4]
    assert launches(many, "Triton by_phase") == [3, 4, 7]
    assert launches(many, "Triton composed") == [4, 9, 13]
    assert launches(few, "CUDA decode") == [3]
    assert launches(many, "CUDA fused") == [4, 6, 10]
    assert launches(few, "PEFT") == [5, 7, 12]
    forward, backward, _ = launches(Problem(8192, *GATE_UP, 8), "composed")
    assert forward <= 13
    assert backward <= 36


def test_decoding_takes_the_launches_beside_it_only_where_they_last_longer():
    """Of the base's weight, most of the time; of 16 tasks in few rows z would take longer than a narrow layer."""
    for problem in (Problem(8, *GATE_UP, 8), Problem(16, 512, 512, 16)):
        call = model.Ours(problem)
        model.decode(call)
        *starts, stream, expand = call.forward.launches
        assert [launch.seconds() for launch in starts] == [2.5e-6, 1.5e-6]
        longest = max(stream.parts().values())
        assert (longest == stream.beside) == (problem.columns == 512)
        assert stream.seconds() == pytest.approx(1.5e-6 + longest)
        assert stream.flight > 0
        phases = cuda_traffic.forward(call.shape, True, 132)
        moved = sum(each.unique for phase in phases for each in phase.traffic)
        assert sum(launch.memory for launch in (*starts, stream, expand)) == pytest.approx(moved)


def test_dropout_is_drawn_where_a_phase_reads_x():
    for plan, phases in (("Triton by_phase", [0, 3]), ("CUDA by_phase", [0, 3]), ("CUDA fused", [0, 3])):
        for p in (0.0, 0.05):
            call = model.Ours(Problem(2048, *GATE_UP, 8, p))
            model.PLANS[plan](call)
            assert (call.forward.launches[0].draws == 2048 * 4096) == bool(p), (plan, phases)
            assert (sum(launch.draws for launch in call.backward.launches) >= 2048 * 4096) == bool(p)


def test_what_the_choices_cite(monkeypatch):
    """The figures beside ONE_LAUNCH_ROWS, FUSED_ROWS and both `forms_m`, by which a choice is made, and those of a kept M_t."""

    def us(rows, plan, tasks=1):
        return model.predict(Problem(rows, *GATE_UP, tasks), plan)["both"]["us"]

    launched = [[us(rows, f"Triton {plan}", 8) for plan in ("one_launch", "by_phase")] for rows in (64, 128, 256)]
    assert launched == [pytest.approx(pair, abs=0.6) for pair in ([114, 117], [118, 121], [144, 147])]
    forward = lambda rows, plan, shape: model.predict(Problem(rows, *shape, 8), plan)["forward"]["us"]  # noqa: E731
    decoded = [
        forward(rows, "CUDA decode", shape) / forward(rows, "CUDA one_launch", shape)
        for rows in (16, 32)
        for shape in (GATE_UP, DOWN)
    ]
    assert decoded == pytest.approx([0.85, 0.69, 1.19, 1.08], abs=0.006)
    fused = [us(rows, "CUDA fused") / us(rows, "CUDA by_phase") for rows in (8192, 4096)]
    assert fused == pytest.approx([0.98, 1.0], abs=0.005)
    saved = {}
    for shape, rows in itertools.product((GATE_UP, DOWN), (1, 8, 64)):
        plans = "Triton one_launch", model.KEPT
        whole, kept = (model.predict(Problem(rows, *shape), plan)["forward"]["ratio"] for plan in plans)
        saved.setdefault(rows, []).append(100 * (whole - kept))
    few = saved[1] + saved[8]  # ops/README.md
    assert (min(few), max(few), max(saved[64])) == pytest.approx((0.6, 1.7, 6.9), abs=0.06)
    ratios = []
    with monkeypatch.context() as patch:
        patch.setattr(triton_backend, "TRITON", triton_backend.TRITON._replace(forms_m=lambda *_: True))
        for rows, tasks in ((2048, 8), (1024, 8), (8192, 32)):
            problem = Problem(rows, *GATE_UP, tasks)
            found = [model.predict(problem, f"Triton {plan}")["both"]["ratio"] for plan in ("composed", "by_phase")]
            ratios.append(pytest.approx(found, abs=0.006))
    assert ratios == [[1.30, 1.38], [1.50, 1.52], [1.26, 1.28]]
    composed = []
    for by_m in (True, False):
        monkeypatch.setattr(eager, "TORCH", eager.TORCH._replace(forms_m=lambda *_, by_m=by_m: by_m))
        composed.append([us(rows, "composed", tasks) for rows, tasks in ((2048, 1), (8192, 1), (16384, 8))])
    assert composed == [pytest.approx(each, abs=0.6) for each in ([701, 2251, 5422], [685, 2371, 4613])]


# --- tables -----------------------------------------------------------------------------------------------------------


def test_the_committed_table_is_what_the_model_says():
    """Of some problems; all take a minute."""
    committed = (model.RESULTS / "model/RESULTS.md").read_text()
    found = list(model.problems())
    assert len(found) == 2 * 2 * 15
    chosen = [(name, problem) for name, problem in found if problem.rows in (1, 2048) and problem.p == 0]
    chosen += [(name, problem) for name, problem in found if problem.rows == 512 and problem.tasks == 8 and problem.p]
    for line in model.table(chosen).splitlines():
        assert line in committed
    lines = committed.split("## Predicted")[1].count("\n| ") - 2
    assert lines == sum(model.takes(plan, problem) for _, problem in found for plan in model.PLANS)


def test_measured_medians_stand_beside_the_predictions(tmp_path):
    shape = Problem(8192, *GATE_UP).describe()
    rows = [
        {"case": "linear", **shape, "implementation": name, "direction": "forward", **figures}
        for name, figures in {
            "base": {"us": {"median": 1000.0}, "ratio_to_base": {"median": 1.0}},
            "ours_triton_by_phase": {"us": {"median": 1200.0}, "ratio_to_base": {"median": 1.2}},
            "ours_cuda_fused": {"error": "it broke off"},
            "grouped_mm": {"us": {"median": 1300.0}},
        }.items()
    ]
    rows.append(
        {"case": "linear", **shape, "dtype": "float32", "implementation": "base", "direction": "forward", "us": {}}
    )
    rows.append({"case": "begin", "at": 0, "of": 1})
    content = {"environment": {"device": "NVIDIA H200"}, "stages": {"3": {"results": rows}, "0": {"status": "ok"}}}
    (tmp_path / "h200").mkdir()
    (tmp_path / "h200/results.json").write_text(json.dumps(content))
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/results.json").write_text(json.dumps({"environment": {"device": "a CPU"}, "results": []}))
    text = model.document(tmp_path, [])
    assert "Measured: NVIDIA H200" in text
    assert "a CPU" not in text
    predicted = model.predict(Problem(8192, *GATE_UP), "Triton by_phase")["forward"]
    us = predicted["us"]
    line = (
        f"| 8192 | 4096 | 11008 | 1 | 0.0 | linear | Triton by_phase | forward | {us:.1f} | 1200.0 | {1200 / us:.2f} "
    )
    assert line + f"| {predicted['ratio']:.3f} | 1.200 |" in text
    measured = text.split("## Predicted")[0]
    assert measured.count("\n| 8192") == 2  # without what broke off, what has no model, and fp32
