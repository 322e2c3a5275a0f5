"""`python -m bench.tune`: what is searched, what is refused, and what is written. Times are made up, but for one run."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import tune
from bench.compare import Wrong
from bench.problems import ATTENTION, DOWN, GATE_UP
from bench.timing import Machine
from lilora_kernels.ops import triton_runtime

ROOT = Path(__file__).parents[2]
TABLE = triton_runtime.table(())
PLANS, KERNELS, ROWS = ["by_phase", "one_launch"], ["forward", "backward"], [64, 1024, 8192]
MACHINE = Machine(torch.device("cpu"), rounds=5)


class Timed:
    """Launches whose times, in microseconds, are cost(problem, configuration, phase) and a little noise."""

    def __init__(self, cost, compiler, entry, problem):
        self.cost, self.entry, self.problem = cost, entry, problem

    def phases(self, configuration):
        split = configuration.get("SPLIT_K", configuration.get("SPLIT_N"))
        return [phase for phase in self.entry.phases if phase != 1 or split > 1]

    def compile(self, configurations, seconds):
        return [None] * len(configurations)

    def check(self, configuration):
        pass

    def unfit_variant(self, present, found, seconds):
        return None

    def times(self, configurations, phase, rounds, seconds):
        if phase is not None:
            assert all(phase in self.phases(configuration) for configuration in configurations.values())

        def once(configuration):
            phases = self.phases(configuration) if phase is None else [phase]
            constants = [of_phase(configuration, each) for each in phases]
            return sum(self.cost(self.problem, each) for each in constants) * random.uniform(0.998, 1.002)

        return {name: [once(found) for _ in range(rounds)] for name, found in configurations.items()}


def of_phase(configuration, phase):
    return triton_runtime.phase_config({"phases": {}, **configuration}, phase, phase)


def run(cost, plans=PLANS, kernels=KERNELS, rows=ROWS, minutes=1.0, timed=Timed, **options):
    return tune.tune(MACHINE, plans, kernels, rows, minutes, running=partial(timed, cost), **options)


def warps_matter(problem, constants):
    return 100 if constants["num_warps"] == 8 else 80


def bucket(table, plan, kernel, rows):
    return next(found for found in table[plan][kernel] if found["rows"] == rows)


# --- what is searched -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [(), ("sm_90",)], ids=["default", "sm_90"])
def test_an_entry_is_held_out_on_rows_that_it_serves_and_shapes_that_were_not_searched(names):
    table = triton_runtime.table(names)
    entries = tune.entries(table, PLANS, KERNELS, [64, 256, 1024, 8192])
    assert [str(entry) for entry in entries[:5]] == [
        "by_phase forward 8192", "by_phase backward 8192", "one_launch forward 64", "one_launch backward 64",
        "by_phase forward 1024",
    ]  # fmt: skip
    assert len(entries) == sum(len(buckets) for kernels in table.values() for buckets in kernels.values())
    for entry in entries:
        searched, held_out = tune.problems(entry, tiny=False)
        rows = tuple(found["rows"] for found in table[entry.plan][entry.kernel])
        for problem in (searched, *held_out):
            assert rows[triton_runtime.nearest(rows, problem.rows)] == entry.rows
        assert (searched.columns, searched.outputs) == GATE_UP
        assert {(problem.columns, problem.outputs) for problem in held_out} == {DOWN, ATTENTION}
        assert {problem.tasks for problem in held_out} == {1, 8}
        assert {problem.rows for problem in held_out} == {entry.fewest, entry.most}


def test_a_constant_of_a_phase_leaves_other_phases_and_pairs_alone():
    present = bucket(triton_runtime.table(("sm_90",)), "by_phase", "backward", 8192)
    found = tune.changed(present, 2, "BLOCK_K", 128)
    assert of_phase(found, 2) == of_phase(present, 2) | {"BLOCK_K": 128}
    for phase in (0, 1, 3):
        assert of_phase(found, phase) == of_phase(present, phase)
    assert found["phases"]["2-pair"] == present["phases"]["2-pair"]
    assert tune.changed(found, 2, "BLOCK_K", 64) == present  # what all phases have is not repeated


def test_the_search_takes_as_many_steps_as_there_are_gains_and_no_other():
    entry = tune.entries(TABLE, ["by_phase"], ["forward"], [1024])[0]
    present = {name: value for name, value in bucket(TABLE, "by_phase", "forward", 1024).items() if name != "rows"}
    timed = Timed(
        lambda _, constants: 100 + 10 * constants["SPLIT_K"] - 10 * constants["num_stages"], None, entry, None
    )
    found = tune.Search(timed, entry, rounds=5, left=lambda: 1.0).run(present)
    stages = {str(phase): {"num_stages": 5} for phase in (0, 2)}  # with SPLIT_K = 1 there is no phase 1
    assert found == present | {"SPLIT_K": 1, "phases": stages}


def test_what_does_not_compile_or_is_wrong_is_dropped_and_counted():
    failures = Counter()

    class Failing(Timed):
        @staticmethod
        def too_large(configuration):
            return any(of_phase(configuration, phase)["num_stages"] > 3 for phase in range(3))

        def compile(self, configurations, seconds):
            failed = [self.too_large(each) for each in configurations]
            failures["OutOfResources"] += sum(failed)
            return ["OutOfResources: shared memory, Required: 300000" if each else None for each in failed]

        def check(self, configuration):
            assert not self.too_large(configuration)
            if any(of_phase(configuration, phase)["BLOCK_M"] > 64 for phase in range(3)):
                failures["Wrong"] += 1
                raise Wrong("y is wrong")

    def cost(problem, constants):
        return 1000 / constants["BLOCK_M"] / constants["num_stages"] / constants["num_warps"]

    table, (decision,) = run(cost, ["by_phase"], ["forward"], [8192], timed=Failing)
    assert decision["dropped"] == failures
    assert min(failures["OutOfResources"], failures["Wrong"]) > 0
    assert decision["tried"] > failures.total()
    assert table is None
    assert decision["reason"] == "nothing faster found"  # the present constants are the best that are left


def test_an_entry_whose_present_configuration_is_wrong_is_kept_and_says_so():
    class Broken(Timed):
        def check(self, configuration):
            raise Wrong("y is wrong")

    table, decisions = run(warps_matter, timed=Broken)
    assert table is None
    assert {decision["reason"] for decision in decisions} == {"Wrong: y is wrong"}


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ratios, why",
    [
        ({DOWN: 1.0, ATTENTION: 1.0}, "not less than 0.97"),
        ({DOWN: 0.98, ATTENTION: 0.98}, "not less than 0.97"),
        ({DOWN: 0.5, ATTENTION: 1.15}, "a held-out problem takes 1.1"),
    ],
    ids=["no gain", "too little", "one slower"],
)
def test_faster_where_it_was_searched_is_not_enough(ratios, why):
    def cost(problem, constants):
        ratio = {GATE_UP: 0.5, **ratios}[problem.columns, problem.outputs]
        return 100 * (ratio if constants["num_warps"] == 4 else 1)

    def ratios_of(problem):
        return ratios[problem["K"], problem["N"]]

    table, (decision,) = run(cost, ["by_phase"], ["forward"], [8192])
    assert table is None
    assert why in decision["reason"]
    assert decision["found"] is not None
    assert decision["searched"]["ratio"]["median"] == pytest.approx(0.5, rel=0.01)
    assert len(decision["held_out"]) == 4
    for result in decision["held_out"]:
        assert result["ratio"]["median"] == pytest.approx(ratios_of(result), rel=0.01)


def test_a_configuration_that_fits_only_what_was_timed_is_refused():
    class Tight(Timed):
        def unfit_variant(self, present, found, seconds):
            assert found != present
            return "OutOfResources: phases (0, 0) need too much"

    table, (decision,) = run(warps_matter, ["by_phase"], ["forward"], [8192], timed=Tight)
    assert table is None
    assert not decision["improved"]
    assert decision["reason"] == "OutOfResources: phases (0, 0) need too much"


def test_what_a_variant_needs_is_known_without_launching_it():
    entry = tune.entries(TABLE, ["by_phase"], ["forward"], [1024])[0]
    present = bucket(TABLE, "by_phase", "forward", 1024)
    masters = {"masters": torch.float32}
    assert masters in tune.variants()
    assert tune.variant_once(90, 227 * 1024, entry, present, (1, 1), masters) is None
    assert tune.variant_once(90, 8 * 1024, entry, present, (1, 1), masters).startswith(
        "OutOfResources: phases (1, 1) need"
    )
    broken = present | {"BLOCK_M": 48}
    assert "CompilationError" in tune.variant_once(90, 227 * 1024, entry, broken, (1, 1), masters)


def test_entries_that_there_is_no_time_for_keep_their_configuration():
    clock = 0.0

    class Slow(Timed):
        def times(self, configurations, phase, rounds, seconds):
            nonlocal clock
            clock += 2
            return super().times(configurations, phase, rounds, seconds)

    table, decisions = run(warps_matter, timed=Slow, minutes=2.0, now=lambda: clock)
    improved = [decision["improved"] for decision in decisions]
    assert improved[0]
    assert not improved[-1]
    assert len(improved) == len(tune.entries(TABLE, PLANS, KERNELS, ROWS))
    assert decisions[-1]["reason"] == "no time left to validate what was found"
    assert clock < 120 + 2 * len(decisions)  # an entry may overrun its time by one measurement
    for decision in decisions:
        place = decision["plan"], decision["kernel"], decision["rows"]
        assert (bucket(table, *place) != bucket(TABLE, *place)) == decision["improved"]
    assert run(warps_matter, minutes=0.0, now=lambda: clock)[0] is None


# --- what is written --------------------------------------------------------------------------------------------------


def test_a_better_configuration_is_written_as_a_table_that_the_kernels_load(tmp_path, monkeypatch):
    written = []
    table, decisions = run(warps_matter, ["by_phase"], ["forward"], [8192], write=written.append)
    assert written == decisions
    json.dumps(decisions)
    assert decisions[0]["improved"]
    tune.save(table, tmp_path / "Some_GPU.json")
    assert [path.name for path in tmp_path.iterdir()] == ["Some_GPU.json"]
    monkeypatch.setattr(triton_runtime, "CONFIGS", tmp_path)
    loaded = triton_runtime.table.__wrapped__(("Some_GPU", "sm_90"))
    assert loaded == table
    for plan, kernels in TABLE.items():
        for kernel, buckets in kernels.items():
            for present, found in zip(buckets, loaded[plan][kernel], strict=True):
                tuned = (plan, kernel, present["rows"]) == ("by_phase", "forward", 8192)
                assert (found == present) != tuned
                for phase in range(3 if kernel == "forward" else 4):
                    expected = triton_runtime.phase_config(triton_runtime.fitted(present, 2, 2, 128), phase, phase)
                    got = triton_runtime.phase_config(triton_runtime.fitted(found, 2, 2, 128), phase, phase)
                    changed = tuned and phase != 1  # not launched with SPLIT_K = 1
                    assert got == expected | ({"num_warps": 4} if changed else {})


@pytest.fixture
def command(monkeypatch):
    """command(*arguments) runs main with these made-up results of `tune` on a machine that can run the kernels."""
    monkeypatch.setattr(triton_runtime, "INTERPRETED", True)

    def run_main(*arguments, better=None):
        monkeypatch.setattr(tune, "tune", lambda *_: (better, [{"improved": better is not None}]))
        return tune.main(["--tiny", *map(str, arguments)])

    return run_main


def test_a_file_stays_as_it_is_when_nothing_is_better(command, tmp_path, capsys):
    file = tmp_path / "cpu.json"
    file.write_text("earlier")
    assert command("--out", tmp_path) == 0
    assert "no configuration is better" in capsys.readouterr().out
    assert file.read_text() == "earlier"
    assert command("--out", tmp_path, better=TABLE) == 0
    assert json.loads(file.read_text()) == TABLE
    assert list(tmp_path.iterdir()) == [file]


def test_a_table_that_cannot_be_written_leaves_the_file(tmp_path):
    file = tmp_path / "cpu.json"
    file.write_text("earlier")
    with pytest.raises(TypeError):
        tune.save({"by_phase": {"forward": [{"rows": object()}]}}, file)
    assert file.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    "arguments, why",
    [
        (["--plans", "by_phase,both"], "--plans has 'both'; the table in use has one_launch, by_phase"),
        (["--kernels", "sideways"], "--kernels has 'sideways'"),
        (["--rows", "64,100"], "--rows has '100'; the table in use has 64, 1024, 8192"),
        (["--rows", "many"], "--rows has 'many'"),
        (["--minutes", "0"], "--minutes is 0.0"),
        (["--minutes", "nan"], "--minutes is nan"),
        (["--out", "missing"], "--out is missing; give a folder that exists"),
        (["--out", "missing/table.json"], "--out is missing/table.json"),
        (["--out", "table.txt"], "--out is table.txt"),
    ],
)
def test_a_wrong_argument_is_named_in_one_sentence(command, tmp_path, monkeypatch, capsys, arguments, why):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        command("--out", tmp_path, *arguments)
    assert stopped.value.code == 2
    assert f"error: {why}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "tiny, why",
    [([], "it needs an NVIDIA GPU"), (["--tiny"], "set TRITON_INTERPRET=1")],
    ids=["no GPU", "no interpreter"],
)
def test_a_machine_that_cannot_run_the_kernels_is_told_why(tmp_path, monkeypatch, capsys, tiny, why):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(triton_runtime, "INTERPRETED", False)
    with pytest.raises(SystemExit) as stopped:
        tune.main(["--out", str(tmp_path), *tiny])
    assert stopped.value.code == 2
    assert why in capsys.readouterr().err


# --- real kernels -----------------------------------------------------------------------------------------------------

REAL = """
import runpy, sys, torch
from bench import tune
from bench.compare import Wrong
from bench.timing import Machine
from lilora_kernels.ops import triton_runtime

table, machine = triton_runtime.table(()), Machine(torch.device("cpu"), 1, True)

def launches(entry, problem):
    return tune.Launches(tune.Compiler(machine), entry, problem)

def present(entry):
    return {name: value for name, value in table[entry.plan][entry.kernel][0].items() if name != "rows"}

entry = tune.entries(table, ["by_phase"], ["forward"], [1024])[0]
launched = launches(entry, tune.problems(entry, True)[0])
of_phase = {phase: launched.times({"present": present(entry)}, phase, 1, 1.0)["present"] for phase in (0, 2)}
assert all(len(times) == 1 and times[0] > 0 for times in of_phase.values()), of_phase
launched.exact["h"][3, 5] += 1e-3
try:
    launched.check(present(entry))
except Wrong as wrong:
    print(wrong)

entry = tune.entries(table, ["one_launch"], ["forward"], [64])[0]
decision = {"held_out": []}
tuner = tune.Tuner(machine, launches, lambda: 0.0)
print(tuner.validate(entry, present(entry), tune.changed(present(entry), None, "TILES_N", 2), 1e9, decision))
assert [result["M"] for result in decision["held_out"]] == [9, 24], decision
assert triton_runtime.config.__module__ == triton_runtime.__name__  # not the one of `using`

sys.argv = ["tune", "--tiny", "--out", sys.argv[1], "--minutes", "0.01"]
sys.argv += ["--plans", "one_launch", "--kernels", "forward", "--rows", "64"]
runpy.run_module("bench.tune", run_name="__main__")
"""


def test_the_command_runs_the_kernels_in_the_interpreter(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", REAL, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "h of by_phase forward 1024 is wrong by" in done.stdout
    assert "held-out problem" in done.stdout
    assert ("is written with 1 new" in done.stdout) == (tmp_path / "cpu.json").is_file()
    assert "one_launch forward 64: kept" in done.stdout or (tmp_path / "cpu.json").is_file()
