"""`python -m bench.tune`: what is searched, what is refused, and what is written. Times are made up, but for one run."""

import itertools
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
from bench.tune_launches import AT_ONCE, FORWARD, KERNELS, ROWS, Entry, entries, problems, variant_once, variants
from lilora_kernels.backends import ONE_LAUNCH_ROWS
from lilora_kernels.ops import triton_runtime
from lilora_kernels.ops.delta import triton_configs
from tools.resources import Variant

ROOT = Path(__file__).parents[2]
MACHINE = Machine(torch.device("cpu"), rounds=5)
FEW, *_, MORE, MOST = ROWS
ENTRY = Entry("shrink", MOST)


class Timed:
    """Launches whose times, in microseconds, are cost(problem, sizes) and a little noise."""

    def __init__(self, cost, compiler, entry, problem):
        self.cost, self.entry, self.problem = cost, entry, problem

    def compile(self, configurations, seconds):
        return [None] * len(configurations)

    def check(self, sizes):
        pass

    def unfit_variant(self, found, seconds):
        return None

    def times(self, configurations, timed, rounds, seconds):
        def once(sizes):
            return self.cost(self.problem, sizes) * random.uniform(0.998, 1.002)

        return {name: [once(found) for _ in range(rounds)] for name, found in configurations.items()}


def run(cost, kernels=KERNELS, rows=ROWS, minutes=1.0, timed=Timed, **options):
    return tune.tune(MACHINE, kernels, rows, minutes, running=partial(timed, cost), **options)


def run_one(cost, **options):
    better, (decision,) = run(cost, [ENTRY.kernel], [ENTRY.rows], **options)
    return better, decision


def warps_matter(problem, sizes):
    return 100 if sizes["num_warps"] == 8 else 80


# --- what is searched -------------------------------------------------------------------------------------------------


def test_an_entry_is_held_out_on_rows_that_it_serves_and_shapes_that_were_not_searched():
    found = entries(KERNELS, ROWS)
    assert [str(entry) for entry in found[:8]] == [
        f"shrink {MOST}", f"expand {MOST}", f"from_dy {MOST}", f"from_x {MOST}", f"add_partials {MOST}",
        f"delta_forward {ONE_LAUNCH_ROWS}", f"delta_backward {FEW}", f"shrink {MORE}",
    ]  # fmt: skip
    places = [(entry.kernel, bucket) for entry in found for bucket in entry.buckets]
    assert sorted(places) == sorted(itertools.product(KERNELS, ROWS))
    for entry in found:
        searched, held_out = problems(entry, tiny=False)
        for problem in (searched, *held_out):
            assert triton_configs.bucket(problem.rows) in entry.buckets
        assert triton_configs.bucket(entry.fewest - 1) not in entry.buckets or entry.fewest == 1
        assert entry.fewest < searched.rows < entry.rows
        assert (searched.columns, searched.outputs) == GATE_UP
        assert {(problem.columns, problem.outputs) for problem in held_out} == {DOWN, ATTENTION}
        assert {problem.tasks for problem in held_out} == {1, 8}
        assert {problem.rows for problem in held_out} == {entry.fewest, entry.rows}


@pytest.mark.parametrize("kernel", FORWARD)
def test_a_forward_has_one_configuration_for_all_rows_of_one_launch(kernel):
    """So that a row's bits depend on no other row there."""
    few = [rows for rows in ROWS if rows <= ONE_LAUNCH_ROWS]
    better, (decision,) = run(lambda _, sizes: 100 * sizes["num_stages"], [kernel], few)
    assert better == {kernel: {str(rows): decision["found"] for rows in few}}
    assert entries([kernel], few[:1]) == entries([kernel], few) == [Entry(kernel, ONE_LAUNCH_ROWS)]


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_constant_of_a_kernel_is_searched_one_at_a_time(kernel):
    for rows in ROWS:
        present = Entry(kernel, rows).present(MACHINE.device)
        assert ("PROGRAMS" in present) == (kernel in AT_ONCE)
        names = [name for group in tune.groups(present) for name in group]
        steps = [sizes.items() - present.items() for sizes in tune.neighbours(present, names).values()]
        assert {name for step in steps for name, _ in step} == present.keys() == set(names)
        assert all(len(step) == 1 for step in steps)


def test_the_search_takes_as_many_steps_as_there_are_gains_and_no_other():
    timed = Timed(lambda _, sizes: 200 + 10 * sizes["SPLIT_K"] - 10 * sizes["num_stages"], None, ENTRY, None)
    present = triton_configs.shrink(1024, False)
    found = tune.Search(timed, ENTRY, rounds=5, left=lambda: 1.0).run(present)
    assert found == present | {"SPLIT_K": 1, "num_stages": 5}


def test_a_chunk_is_timed_with_all_that_it_matters_to_and_other_constants_by_their_kernel_alone():
    seen, validated = set(), []

    class Watched(Timed):
        def times(self, configurations, timed, rounds, seconds):
            present = configurations["present"]
            for sizes in configurations.values():
                changed = [name for name, size in sizes.items() if size != present[name]]
                seen.update((name, timed) for name in changed)
                if rounds == 2 * MACHINE.rounds:
                    validated.append(timed)
            return super().times(configurations, timed, rounds, seconds)

    every = "from_dy", "from_x", "add_partials"
    run(lambda _, sizes: 100, ["from_dy"], [4096], timed=Watched)
    assert ("CHUNK", every) in seen
    assert {timed for name, timed in seen if name != "CHUNK"} == {("from_dy",)}
    assert validated == []
    run(lambda _, sizes: 100 - 0.01 * sizes["CHUNK"], ["from_dy"], [4096], timed=Watched)
    assert set(validated) == {every}
    validated.clear()
    run(warps_matter, ["from_dy"], [4096], timed=Watched)
    assert set(validated) == {("from_dy",)}
    seen.clear()
    run(lambda _, sizes: 100, ["delta_backward"], [FEW], timed=Watched)
    assert {timed for _, timed in seen} == {("at_once",)}


def test_what_does_not_compile_or_is_wrong_is_dropped_and_counted():
    failures = Counter()

    class Failing(Timed):
        @staticmethod
        def too_large(sizes):
            return sizes["num_stages"] > 3

        def compile(self, configurations, seconds):
            failed = [self.too_large(each) for each in configurations]
            failures["OutOfResources"] += sum(failed)
            return ["OutOfResources: shared memory, Required: 300000" if each else None for each in failed]

        def check(self, sizes):
            assert not self.too_large(sizes)
            if sizes["BLOCK_M"] > 64:
                failures["Wrong"] += 1
                raise Wrong("y is wrong")

    def cost(problem, sizes):
        return 1000 / sizes["BLOCK_M"] / sizes["num_stages"] / sizes["num_warps"]

    better, decision = run_one(cost, timed=Failing)
    assert decision["dropped"] == failures
    assert min(failures["OutOfResources"], failures["Wrong"]) > 0
    assert decision["tried"] > failures.total()
    assert better == {}
    assert decision["reason"] == "nothing faster found"  # the present constants are the best that are left


def test_an_entry_whose_present_configuration_is_wrong_is_kept_and_says_so():
    class Broken(Timed):
        def check(self, sizes):
            raise Wrong("y is wrong")

    better, decisions = run(warps_matter, timed=Broken)
    assert better == {}
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
    def cost(problem, sizes):
        ratio = {GATE_UP: 0.5, **ratios}[problem.columns, problem.outputs]
        return 100 * (ratio if sizes["num_warps"] == 4 else 1)

    def ratios_of(problem):
        return ratios[problem["K"], problem["N"]]

    better, decision = run_one(cost)
    assert better == {}
    assert why in decision["reason"]
    assert decision["found"] is not None
    assert decision["searched"]["ratio"]["median"] == pytest.approx(0.5, rel=0.01)
    assert len(decision["held_out"]) == 4
    for result in decision["held_out"]:
        assert result["ratio"]["median"] == pytest.approx(ratios_of(result), rel=0.01)


def test_a_configuration_that_fits_only_what_was_timed_is_refused():
    class Tight(Timed):
        def unfit_variant(self, found, seconds):
            assert found["num_warps"] == 4
            return "OutOfResources: shrink needs too much"

    better, decision = run_one(warps_matter, timed=Tight)
    assert better == {}
    assert not decision["improved"]
    assert decision["reason"] == "OutOfResources: shrink needs too much"


def test_wider_elements_larger_ranks_and_a_gate_have_to_fit_too():
    for large, sub_rank in ((True, 128), (False, 64)):
        found = variants(large)
        assert {Variant(masters=torch.float32), Variant(dtype=torch.float32), Variant(gate=True)} < set(found)
        assert Variant(masters=torch.float32, rank=256, sub_rank=sub_rank) in found


def test_what_a_variant_needs_is_known_without_launching_it():
    present, masters = triton_configs.shrink(1024, True), Variant(masters=torch.float32)
    entry = Entry("shrink", 1024)
    assert variant_once(90, 227 * 1024, entry, present, masters) is None
    assert variant_once(90, 8 * 1024, entry, present, masters).startswith("OutOfResources: shrink needs ")
    assert "CompilationError" in variant_once(90, 227 * 1024, entry, present | {"BLOCK_M": 48}, masters)


def test_entries_that_there_is_no_time_for_keep_their_configuration():
    clock = 0.0

    class Slow(Timed):
        def times(self, configurations, timed, rounds, seconds):
            nonlocal clock
            clock += 2
            return super().times(configurations, timed, rounds, seconds)

    better, decisions = run(warps_matter, timed=Slow, minutes=2.0, now=lambda: clock)
    improved = [decision["improved"] for decision in decisions]
    assert improved[0]
    assert not improved[-1]
    assert len(improved) == len(entries(KERNELS, ROWS))
    reasons = {decision["reason"] for decision in decisions}
    assert reasons >= {"no time left", "no time left to validate what was found"}
    assert clock < 120 + 2 * len(decisions)  # an entry may overrun its time by one measurement
    for decision in decisions:
        assert (str(decision["rows"]) in better.get(decision["kernel"], {})) == decision["improved"]
    assert run(warps_matter, minutes=0.0, now=lambda: clock)[0] == {}


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    """loaded(*names): what the kernels take for a GPU of these names from tmp_path."""
    monkeypatch.setattr(triton_configs, "CONFIGS", tmp_path)
    monkeypatch.setattr(triton_configs, "tuned", triton_configs.tuned.__wrapped__)

    def chosen(*names):
        return {(kernel, rows): triton_configs.chosen(names, kernel, rows) for kernel in KERNELS for rows in ROWS}

    return chosen


def test_a_better_configuration_is_written_as_a_file_that_the_kernels_load(tmp_path, loaded):
    written = []
    better, decision = run_one(warps_matter, write=written.append)
    assert written == [decision]
    json.dumps(decision)
    assert decision["improved"]
    before = loaded("Some_GPU", "sm_90")
    tune.save(better, tmp_path / "Some_GPU.json", MACHINE.device)
    assert [path.name for path in tmp_path.iterdir()] == ["Some_GPU.json"]
    after = loaded("Some_GPU", "sm_90")
    assert after.pop(("shrink", MOST)) == decision["found"] == decision["present"] | {"num_warps": 4}
    assert before.pop(("shrink", MOST))["num_warps"] == 8
    assert after == before


def test_what_a_file_has_of_others_stays_and_what_is_better_now_takes_the_place_of_what_was(tmp_path):
    file, old, new = tmp_path / "cpu.json", {"num_warps": 8}, {"num_warps": 4}
    tune.save({"expand": {"4096": old, "64": old}}, file, MACHINE.device)
    tune.save({"expand": {"4096": new, "1024": new}, "shrink": {"64": new}}, file, MACHINE.device)
    assert json.loads(file.read_text()) == {"expand": {"64": old, "1024": new, "4096": new}, "shrink": {"64": new}}
    assert file.read_text().count("\n") == 10  # a line for each


def test_a_new_file_has_what_it_will_stand_in_for(tmp_path, loaded, monkeypatch):
    """The kernels read the first file of a GPU's names alone."""
    monkeypatch.setattr(triton_runtime, "device_names", lambda device: ("Some_GPU", "sm_90"))
    (tmp_path / "sm_90.json").write_text(json.dumps({"expand": {str(FEW): {"num_warps": 8}}}))
    tune.save({"shrink": {str(FEW): {"num_warps": 8}}}, tmp_path / "Some_GPU.json", MACHINE.device)
    after = loaded("Some_GPU", "sm_90")
    assert after["expand", FEW]["num_warps"] == after["shrink", FEW]["num_warps"] == 8


@pytest.fixture
def command(monkeypatch):
    """command(*arguments) runs main with these made-up results of `tune` on a machine that can run the kernels."""
    monkeypatch.setattr(triton_runtime, "INTERPRETED", True)

    def run_main(*arguments, better={}):  # noqa: B006
        monkeypatch.setattr(tune, "tune", lambda *_: (better, [{"improved": bool(better)}]))
        return tune.main(["--tiny", *map(str, arguments)])

    return run_main


BETTER = {"shrink": {"64": {"num_warps": 8}}}


def test_a_file_stays_as_it_is_when_nothing_is_better(command, tmp_path, capsys):
    file = tmp_path / "cpu.json"
    file.write_text("{ }")
    assert command("--out", tmp_path) == 0
    assert "no configuration is better" in capsys.readouterr().out
    assert file.read_text() == "{ }"
    assert command("--out", tmp_path, better=BETTER) == 0
    assert json.loads(file.read_text()) == BETTER
    assert list(tmp_path.iterdir()) == [file]


def test_a_table_that_cannot_be_written_leaves_the_file(tmp_path, monkeypatch):
    file = tmp_path / "cpu.json"
    file.write_text("{ }")
    with pytest.raises(TypeError):
        tune.save({"shrink": {"64": {"num_warps": object()}}}, file, MACHINE.device)
    assert list(tmp_path.iterdir()) == [file]

    def full(path, text):
        with path.open("w") as stream:
            stream.write(text[:5])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space left"):
        tune.save(BETTER, file, MACHINE.device)
    assert file.read_text() == "{ }"


@pytest.mark.parametrize(
    "text",
    [
        "earlier",
        "[]",
        '{"one_launch": {"forward": [{"rows": 64}]}}',
        '{"shrink": {"64": 8}}',
        '{"shrink": {"few": {}}}',
    ],
)
def test_a_file_that_is_no_table_is_refused_before_the_search_and_stays(command, tmp_path, capsys, text):
    file = tmp_path / "cpu.json"
    file.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        command("--out", tmp_path, better=BETTER)
    assert stopped.value.code == 2
    assert f"error: {file} is not {{kernel: {{rows: sizes}}}} in JSON; move it away" in capsys.readouterr().err
    assert file.read_text() == text


@pytest.mark.parametrize(
    "arguments, why",
    [
        (
            ["--kernels", "shrink,sideways"],
            "--kernels has 'sideways'; there are shrink, expand, delta_forward, from_dy,",
        ),
        (["--rows", "1024,100"], f"--rows has '100'; there are {', '.join(map(str, ROWS))}"),
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
from bench.tune_launches import Compiler, Entry, Launches, ROWS, launch_once, problems
from lilora_kernels.backends import ONE_LAUNCH_ROWS
from lilora_kernels.ops import triton_runtime
from lilora_kernels.ops.delta import triton_configs

machine = Machine(torch.device("cpu"), 1, True)

def launches(entry, problem):
    return Launches(Compiler(machine), entry, problem)

for kernel in ("expand", "from_dy"):
    entry = Entry(kernel, 1024)
    present = entry.present(machine.device)
    launched = launches(entry, problems(entry, True)[0])
    for timed in (entry.timed(()), entry.timed(["CHUNK"])):
        (time,) = launched.times({"present": present}, timed, 1, 1.0)["present"]
        assert time > 0
    assert launch_once(machine, entry, launched.problem, present) is None
    assert "power of 2" in launch_once(machine, entry, launched.problem, present | {"BLOCK_M": 48})
    launched.check(present)
    launched.exact["h" if kernel == "expand" else "a"][3, 5] += 1
    try:
        launched.check(present)
    except Wrong as wrong:
        print(wrong)

entry = Entry("delta_forward", ONE_LAUNCH_ROWS)
present, decision = entry.present(machine.device), {"held_out": []}
tuner = tune.Tuner(machine, launches, lambda: 0.0)
print(tuner.validate(entry, present, present | {"TILES_N": 2}, 1e9, decision))
assert [result["M"] for result in decision["held_out"]] == [9, 24], decision
assert triton_configs.configuration.__module__ == triton_configs.__name__  # not the one of `using`

sys.argv = ["tune", "--tiny", "--out", sys.argv[1], "--minutes", "0.01"]
sys.argv += ["--kernels", "delta_forward", "--rows", str(ROWS[0])]
runpy.run_module("bench.tune", run_name="__main__")
"""


def test_the_command_runs_the_kernels_in_the_interpreter(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", REAL, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "h of expand 1024 is wrong by" in done.stdout
    assert "a of from_dy 1024 is wrong by" in done.stdout
    assert "held-out problem" in done.stdout
    assert ("is written with 1 new" in done.stdout) == (tmp_path / "cpu.json").is_file()
    assert f"delta_forward {ONE_LAUNCH_ROWS}: kept" in done.stdout or (tmp_path / "cpu.json").is_file()
