"""The cases of a GPU stage: what fails, what is left out, when another process has to go on; and what the gates poison."""

import json
import math
import runpy
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from bench import compare, gpu_cases, gpu_next, gpu_profile, gpu_stages, gpu_table, models, tune_launches
from bench.gpu_cases import GO_ON, Case, LostDevice, run_cases
from bench.peers import PEERS, Peer, formula
from bench.problems import DOWN, GATE_UP, Problem, operand_sets
from bench.timing import Ceilings, Machine
from lilora_kernels import backends

MACHINE = Machine.here(2, tiny=True)
CEILING = Ceilings(1e9, 1e9, 1e9)
TINY = Problem(12, 16, 20, 3, rank=4, sub_rank=2, dtype=torch.float32)
FIGURE = {"us": {"median": 1.0, "p20": 1.0, "p80": 1.0}}


def case(*rows, must=("base", "ours"), extra=False, raises=None):
    def run(machine, ceiling):
        yield from rows
        if raises is not None:
            raise raises

    return Case("case", run, must, extra)


GOOD = ({"implementation": "base", **FIGURE}, {"implementation": "ours", **FIGURE})


@pytest.fixture
def run():
    """run(cases) -> (outcome, the rows that were written)"""

    def of(cases, **options):
        rows = []
        outcome = run_cases(cases, MACHINE, rows.append, **options)
        return outcome, [row for row in rows if row["case"] != "begin"]

    return of


def test_a_good_stage(run):
    outcome, rows = run([case(*GOOD), case(must=())])
    assert (outcome.exit_code, outcome.left_out, len(rows)) == (0, 0, 2)


@pytest.mark.parametrize("missing", ["base", "ours"])
def test_a_figure_that_may_not_be_missing_fails_the_stage(run, missing):
    outcome, rows = run([case(*(row for row in GOOD if row["implementation"] != missing)), case(*GOOD)])
    assert outcome.exit_code == 1
    assert f"no figure of {missing}" in rows[1]["error"]
    assert len(rows) == 4  # the other case ran


@pytest.mark.parametrize("name, code", [("ours_triton_by_phase", 1), ("base", 1), ("peft", 0), ("formula", 0)])
def test_an_error_of_ours_or_of_the_base_fails_the_stage_and_one_of_a_peer_does_not(run, name, code):
    outcome, _ = run([case(*GOOD, {"implementation": name, "error": "it is wrong"})])
    assert outcome.exit_code == code


def test_what_is_unavailable_is_no_failure(run):
    assert run([case(*GOOD, {"implementation": "ours_cuda", "unavailable": "no build"})])[0].exit_code == 0


def test_when_the_time_is_up_extra_cases_are_left_out_and_others_fail(run):
    outcome, rows = run([case(*GOOD, extra=True)] * 3, seconds=-1)
    assert (outcome.exit_code, outcome.left_out) == (0, 3)
    assert rows == [{"case": "left out", "note": "3 cases, for the time was up"}]
    outcome, rows = run([case(*GOOD, extra=True), case(*GOOD)], seconds=-1)
    assert outcome.exit_code == 1
    assert "no time for this case" in rows[-1]["error"]


def test_no_case_begins_that_would_be_cut_off(run):
    """The next one may take as long as the longest so far; a row says which began last."""

    def slow(machine, ceiling):
        time.sleep(0.5)
        yield from GOOD

    rows = []
    cases = [Case("case", slow, ("base",), extra=True)] * 3
    outcome = run_cases(cases, MACHINE, rows.append, seconds=0.9)
    assert outcome.left_out == 2
    assert [row for row in rows if row["case"] == "begin"] == [{"case": "begin", "at": 0, "of": 3}]


def test_a_case_that_raises_takes_nothing_from_the_others(run):
    outcome, rows = run([case(GOOD[0], raises=ValueError("broken")), case(*GOOD)])
    assert outcome.exit_code == 1
    assert [row.get("error", row.get("implementation")) for row in rows] == [
        "base",
        "ValueError: broken",
        "base",
        "ours",
    ]


def test_a_lost_device_ends_the_process_and_names_the_next_case(run, monkeypatch):
    cases = [case(*GOOD), case(raises=LostDevice("the capture of ours failed")), case(*GOOD)]
    outcome, rows = run(cases)
    assert (outcome.exit_code, outcome.go_on_at, len(rows)) == (GO_ON, 2, 3)
    outcome, rows = run(cases, start_at=2)
    assert (outcome.exit_code, len(rows)) == (0, 2)
    # An error after which the device answers with errors is the same.
    assert run([case(raises=ValueError("wrong shape")), case(*GOOD)])[0].go_on_at is None
    monkeypatch.setattr(gpu_cases, "lost", lambda machine: True)
    assert run([case(raises=ValueError("illegal address")), case(*GOOD)])[0].go_on_at == 1


def test_a_capture_that_breaks_off_costs_its_case_alone(monkeypatch):
    """What a graph cannot capture is not tried; the next process begins behind the case whose capture failed."""
    captured = []

    def graph_of(name, *_):
        captured.append(name)
        if name == "formula":
            raise LostDevice("the capture of formula failed: not permitted")
        return lambda: None

    monkeypatch.setattr(gpu_stages, "graph_of", graph_of)
    peers = ("base", "peft_names", "formula")
    each = Case("decode", lambda *given: gpu_stages.time_decode(TINY, *given, peers=peers))
    rows = []
    outcome = run_cases([each, each], MACHINE, rows.append)
    assert captured == ["base", "formula"]
    assert next(row for row in rows if row.get("implementation") == "peft_names")["unavailable"].startswith(
        "no CUDA graph"
    )
    assert outcome.go_on_at == 1
    assert "the capture of formula failed" in rows[-1]["error"]


# --- what the stages hold ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [2, 3, 4])
def test_8192_rows_of_gate_up_and_down_come_first(number):
    cases = list(gpu_stages.STAGES[number](False))
    shapes = [each.run.args[0] for each in cases]
    assert (shapes[0].rows, shapes[0].columns, shapes[0].outputs) == (8192, *GATE_UP)
    first = [(p.rows, p.columns, p.outputs) for p in shapes[:3]]
    assert set(first) <= {(8192, *GATE_UP), (8192, *DOWN), (8192, 4096, 4096)}
    assert (8192, *DOWN) in first
    extra = [each.extra for each in cases]
    assert not extra[0]
    assert any(extra)


def test_the_search_on_a_gpu_takes_the_kernels_of_one_job(monkeypatch):
    searched = []
    monkeypatch.setattr("bench.tune.tune", lambda machine, kernels, *_: searched.extend(kernels) or ({}, None))
    gpu_stages.stage_6(False, Machine.here(2, tiny=True), None, 100, list)
    assert "shrink" in searched
    assert not set(searched) & set(tune_launches.AT_ONCE)


def test_a_plan_that_a_backend_registers_later_is_measured_without_being_named(monkeypatch):
    """Peers come from the table of backends."""
    for name, plans in backends.plans("linear").items():
        for plan in plans if name != "eager" else ():
            assert (f"ours_{name}_{plan}" in gpu_stages.TRAINING) == (name != "cpu")
            assert (f"ours_{name}_{plan}" in gpu_stages.DECODING) == (name != "cpu")
    assert not any(name.startswith("ours_eager_") for name in PEERS)


def test_a_plan_that_cannot_run_is_unavailable_with_its_reason():
    machine = Machine.here(2, tiny=True)
    sets = operand_sets(TINY, machine)
    with pytest.raises(compare.Unavailable, match="cannot run on cpu"):
        PEERS["ours_cuda_fused"].build(sets, False)


# --- poison -----------------------------------------------------------------------------------------------------------


def is_poisoned():
    return bool(torch.empty(64).isnan().all())


def test_the_gate_of_peers_poisons_what_they_allocate(monkeypatch):
    seen = []

    def build(sets, training):
        built = formula(sets, training)
        return SimpleNamespace(**vars(built) | {"forward": lambda at: seen.append(is_poisoned()) or built.forward(at)})

    monkeypatch.setattr(compare, "REGISTRY", compare.REGISTRY | {"watched": Peer("watched", build)})
    for training in (False, True):
        seen.clear()
        field = compare.gated("case", TINY, ["watched"], MACHINE, training)
        assert field.errors["watched"] < 1e-4
        assert seen
        assert all(seen)
        field.built["watched"].forward(0)
        assert not seen[-1]  # what is timed is not poisoned


class Kernels:
    """Kernels whose outputs are what happens to lie in memory, as of a launch that wrote nothing."""

    seen: list = []  # noqa: RUF012

    def run_forward(self, x, bias, adapter, one_launch):
        self.seen.append(is_poisoned())
        return x.new_empty(x.shape[0], adapter.b0.shape[0]), x.new_empty(x.shape[0], adapter.a.shape[0])


def test_the_gate_of_delta_refuses_what_was_never_written():
    s = operand_sets(TINY, MACHINE)[0]
    kernels = Kernels()
    with pytest.raises(compare.Wrong, match="y of delta is wrong by nan"):
        gpu_stages.check_delta(s, s.adapter(), kernels, one_launch=True)
    assert kernels.seen == [True]


def test_the_gate_of_models_and_of_the_search_poison_too(monkeypatch):
    entered = []
    poisoned = compare.poisoned

    def watched(device):
        entered.append(device)
        return poisoned(device)

    monkeypatch.setattr(models, "poisoned", watched)
    size = models.TINY
    base = models.frozen("MLP", size, torch.device("cpu"))
    seen = []

    def output(model, more):
        seen.append(is_poisoned())
        return model(torch.ones(size.samples, 2, size.hidden).to(models.dtype_of(model)), **more)

    ours = models.variant(base, "ours", "MLP", size, 0.0, mixed=True)
    models.gate(base, {"ours": ours}, output, size)
    assert seen[:2] == [True, False]  # the base in its own dtype, then in fp64
    assert sum(seen) == 2

    monkeypatch.setattr(tune_launches, "poisoned", lambda device: entered.append("search") or nullcontext())
    work = SimpleNamespace(jobs=[], y=torch.full((2, 2), math.nan), h=torch.zeros(2, 2))
    monkeypatch.setattr(tune_launches, "prepared", lambda *_: entered.append("prepared") or work)
    launches = tune_launches.Launches.__new__(tune_launches.Launches)
    launches.machine, launches.entry, launches.sets = MACHINE, tune_launches.Entry("expand", 1024), [None]
    launches.exact = {"y": torch.ones(2, 2)}
    with pytest.raises(compare.Wrong):
        launches.check({})
    assert entered[-2:] == ["search", "prepared"]


# --- Nsight Compute, the second command, the table --------------------------------------------------------------------


def test_a_metric_that_ncu_does_not_know_is_left_out_with_a_note(tmp_path):
    ncu = tmp_path / "ncu"
    ncu.write_text(
        '#!/bin/sh\ncase "$*" in *tensor_percent_metric*) echo "==ERROR== Failed to find metric tensor_percent_metric"; exit 1;; '
        'esac\nprintf \'%s\\n\' \'"ID","a.sum"\' \'"","ns"\' \'"0","7"\'\n'
    )
    ncu.chmod(0o755)
    found, unknown = gpu_profile.profiled(str(ncu), ["a.sum", "tensor_percent_metric"], ["1", "2", "3", "4"])
    assert (found.returncode, unknown) == (0, ["tensor_percent_metric"])
    ncu.write_text("#!/bin/sh\necho no driver >&2\nexit 3\n")
    found, unknown = gpu_profile.profiled(str(ncu), ["a.sum"], ["1", "2", "3", "4"])
    assert (found.returncode, unknown) == (3, [])


def results(first="ok", tests="ok", memory="81559 MiB", rows=()):
    about = {"memory, max clocks of SM and memory, power limit": [memory, "1980 MHz"]}
    stages = {"first": {"status": first}, "0": {"status": tests, "results": list(rows)}}
    return {"environment": about, "stages": stages}


@pytest.mark.parametrize(
    "content, chosen",
    [
        (results(), ["--stages", "8,6"]),
        (results(memory="143771 MiB"), ["--stages", "8,7"]),
        (results(first="failed with exit code 1"), ["--stages", "0"]),
        (results(rows=[{"case": "racecheck", "exit_code": 9}]), ["--stages", "0,8,6", "--only", "racecheck"]),
        (results(rows=[{"case": "memcheck", "exit_code": 9, "unavailable": "no such device"}]), ["--stages", "8,6"]),
        (
            results(
                tests="stopped after 130 s",
                rows=[
                    {"case": "test_gpu_delta.py", "exit_code": 0},
                    {"case": "test_gpu_linear.py", "exit_code": 1},
                    {"case": "test_gpu_decode.py", "exit_code": None, "error": "stopped after 130 s"},
                    {"case": "memcheck", "exit_code": 9},
                ],
            ),
            ["--stages", "0", "--only", "tests/gpu/test_gpu_linear.py", "--only", "tests/gpu/test_gpu_decode.py"],
        ),
    ],
)
def test_the_second_command_follows_from_the_first_one_s_results(content, chosen):
    assert gpu_next.choose(content) == chosen


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_a_file_of_results_that_is_none_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "results.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["gpu_next", str(tmp_path / "results.json"), "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("bench.gpu_next", run_name="__main__")
    assert ended.value.code == 2
    assert "is no results.json of bench.gpu_evidence" in " ".join(capsys.readouterr().err.split())


def test_the_table_shows_what_was_wrong_and_where_a_peer_wins():
    shape = {"M": 8192, "K": 4096, "N": 11008, "T": 8, "p": 0.05, "case": "linear"}
    figure = {"direction": "both", "ratio_to_base": {"median": 1.2}, "ratio_to_peft": {"median": 1.1}}
    rows = [
        {**shape, "implementation": "ours", **figure},
        {**shape, "implementation": "ours_cuda_fused", "error": "y is wrong by 3.0e-01"},
        {**shape, "implementation": "peft", "direction": "both", "ratio_to_base": {"median": 1.1}},
    ]
    first = [{"case": "tiny", "implementation": "triton"}, {"case": "tiny", "implementation": "cuda", "error": "no"}]
    tests = [{"case": "test_a.py", "tests": 5, "backends": {"cuda": {"tests": 5, "passed": 4}}, "exit_code": 1}]
    stages = {
        "first": {"status": "failed with exit code 1", "results": first},
        "0": {"status": "failed with exit code 1", "results": [*tests, {"case": "memcheck", "exit_code": 9}]},
        "3": {"status": "failed with exit code 1", "results": rows},
    }
    text = gpu_table.table(json.loads(json.dumps({"stages": stages})))
    assert "first call: triton ok, cuda FAILED" in text
    assert "tests passed: cuda 4 of 5, memcheck FAILED" in text
    line = text.split("linear both, time / base\n")[1].splitlines()[1]
    assert line.split() == ["8192", "4096", "11008", "8", "0.05", "1.200", "WRONG", "1.100"]
    assert "stage 3: failed with exit code 1\n  linear ours_cuda_fused: y is wrong by 3.0e-01" in text
