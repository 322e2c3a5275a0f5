"""`bench.gpu_evidence` on a machine without a GPU: every stage with tiny shapes, and what it keeps when one fails."""

import json
import os
import runpy
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from bench import gpu_evidence
from bench.environment import LOAD_FIELDS, under_load

ROOT = Path(__file__).parents[2]

STAGES = ["2", "0", "1", "3", "5", "4", "6", "7", "8", "9"]
SPREAD = {"median", "p20", "p80"}
SHAPE = {"M", "K", "N", "dtype"}
CALL = SHAPE | {"R", "S", "T", "p"}


# The stages are forked from the process that starts them: it has imported what each of them does first, and peft, which takes
# those that compare with it seconds. Half of all the time would be Inductor's, compiling peers.
FORKING = f"""
import sys
from functools import partial
from types import SimpleNamespace

import peft
import torch

torch.compile = partial(torch.compile, backend="aot_eager")

sys.path.append({str(ROOT / "tests")!r})
from support.forked import Forked

from bench import gpu_evidence

gpu_evidence.subprocess = SimpleNamespace(**vars(gpu_evidence.subprocess) | {{"Popen": Forked}})
sys.exit(gpu_evidence.main())
"""


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """Results of one dry run of all stages, its log, and what it printed."""
    out = tmp_path_factory.mktemp("evidence")
    command = [sys.executable, "-c", FORKING, "--out", str(out), "--dry-run", "--commit", "abc"]
    command += ["--stages", ",".join(STAGES), "--minutes", "30"]  # every stage has all its time, beside other work too
    interpreted = os.environ | {"TRITON_INTERPRET": "1"}  # when Triton is imported, before there is a stage
    result = subprocess.run(command, cwd=ROOT, env=interpreted, capture_output=True, text=True, check=False)
    log = (out / "log.txt").read_text()
    assert result.returncode == 0, result.stdout + log[-5000:]
    assert {path.name for path in out.iterdir()} <= {
        "results.json",
        "log.txt",
        "configs.json",
        "clocks.csv",
        "table.txt",
    }
    return json.loads((out / "results.json").read_text()), log, result.stdout


def test_the_header_names_machine_versions_commit_and_command(dry_run):
    environment = dry_run[0]["environment"]
    assert environment["commit"] == "abc"
    assert environment["dry_run"] is True
    assert "--dry-run" in environment["command"]
    assert {"device", "driver", "cpu", "python", "torch", "triton", "peft", "started"} <= set(environment)


def test_every_stage_runs_on_a_cpu_in_the_order_asked_for(dry_run):
    content, log, _ = dry_run
    assert list(content["stages"]) == ["first", *STAGES]
    for name, stage in content["stages"].items():
        assert stage["status"] == "ok", (name, stage)
        assert {"clocks_before", "clocks_after", "seconds", "title"} <= set(stage)
        assert f"===== stage {name}" in log
    assert content["cuda_build"]["status"] in ("left out", "found")


def test_the_first_call_says_what_every_backend_does(dry_run):
    states = {row["implementation"]: row for row in dry_run[0]["stages"]["first"]["results"]}
    assert not {"error", "unavailable"} & set(states["triton"])
    assert "unavailable" in states["cuda"]


def test_every_figure_says_of_what_it_is(dry_run):
    stages = dry_run[0]["stages"]
    assert {"copy_gb_per_s", "matmul_tflop_per_s"} <= set(stages["1"]["results"][0])
    results = [(number, r) for number in "123459" for r in stages[number]["results"] if r["case"] != "ceilings"]
    assert all("error" not in result for _, result in results)
    reasons = {result["implementation"]: result["unavailable"] for _, result in results if "unavailable" in result}
    outside = {"vllm", "sglang", "lorafusion", "nemo_automodel"}
    of_cuda = {
        "ours_cuda",
        *(f"ours_cuda_{plan}" for plan in ("decode", "one_launch", "composed", "by_phase", "fused")),
    }
    assert {"ours_triton", "peft_names"} | of_cuda | outside == set(reasons)
    timed = [(number, result) for number, result in results if "unavailable" not in result]
    for number, result in timed:
        assert (CALL if number in "3459" else SHAPE) <= set(result)
        assert set(result["us"]) == SPREAD
        assert result["us"]["p20"] <= result["us"]["median"] <= result["us"]["p80"]
        assert {"bytes", "flops", "floor_us", "percent_of_floor", "implementation", "direction"} <= set(result)
    compared = {
        (number, result["case"], result["implementation"], result["direction"])
        for number, result in timed
        if "ratio_to_base" in result or "ratio_to_by_phase" in result
    }
    for direction in ("forward", "backward", "both"):
        for implementation in ("base", "ours", "ours_triton_by_phase", "formula", "peft", "grouped_mm"):
            assert ("3", "linear", implementation, direction) in compared
    for direction in ("forward", "backward"):
        for beta in (0, 1):
            assert ("2", "addmm_", f"beta {beta}", direction) in compared
        for plan in ("triton, one_launch", "triton, by_phase"):
            assert ("4", "delta", plan, direction) in compared
    assert ("5", "decode", "ours", "forward") in compared
    launches = [r for _, r in timed if r["case"] == "launches"]
    assert {r["job"] for r in launches} == {"shrink", "expand", "from_dy", "from_x", "add_partials"}
    assert all(r["bytes"] <= r["bytes_issued"] and r["flops"] >= 0 for r in launches)


def test_models_and_the_search_leave_figures(dry_run):
    stages = dry_run[0]["stages"]
    rows = {(r["case"], r["direction"], r["implementation"], r["T"]): r for r in stages["7"]["results"]}
    assert {"saved_bytes", "peak_bytes"} <= set(rows["MLP", "both", "ours", 1])
    assert ("MLP", "forward", "peft_names", 2) in rows
    (decision,) = stages["6"]["results"]
    assert {"improved", "reason"} <= set(decision)
    assert all("unavailable" in r for r in stages["8"]["results"])


def test_the_last_lines_are_one_table(dry_run):
    """What matters most last: the reply of a machine may keep the end alone."""
    titles = [
        "each launch, % of its floor",
        "addmm_ in place",
        "delta, time / by_phase",
        "decode in a graph, time / base",
    ]
    titles += ["linear both, time / PEFT", "linear both, time / base", "first call: triton ok, cuda unavailable"]
    titles += ["failed stages: none"]
    printed = dry_run[2][dry_run[2].rindex(titles[0]) :]
    places = [printed.find(title) for title in titles]
    assert -1 not in places
    assert all(a < b for a, b in pairwise(places))


# --- what befalls a stage ---------------------------------------------------------------------------------------------


def stage_of(name, code):
    """A stage that runs Python code; `write(row)` writes a result, `option(name)` is what follows an option."""
    head = (
        "import json, sys, time\n"
        "option = lambda name: sys.argv[sys.argv.index(name) + 1]\n"
        "write = lambda **row: open(option('--into'), 'a').write(json.dumps(row) + '\\n')\n"
    )
    return gpu_evidence.Stage(name, f"stage {name}", [sys.executable, "-uc", head + code], 60)


@pytest.fixture
def kept(tmp_path):
    return gpu_evidence.Evidence(tmp_path / "out", {"device": "none"})


def test_a_failing_or_endless_stage_keeps_its_results_and_those_of_the_others(kept, tmp_path):
    rest = {"1": "", "2": "sys.exit(3)", "3": "time.sleep(60)", "4": ""}
    stages = [stage_of(n, f"write(case={n!r})\nprint('output of {n}')\n{code}") for n, code in rest.items()]
    went_well = [kept.run(s, 3.0, {}) for s in stages]
    assert went_well == [True, False, False, True]
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    statuses = [s["status"] for s in content["stages"].values()]
    assert statuses == ["ok", "failed with exit code 3", "stopped after 3 s", "ok"]
    assert [s["results"] for s in content["stages"].values()] == [[{"case": n}] for n in rest]
    log = (tmp_path / "out" / "log.txt").read_text()
    assert all(f"output of {n}" in log for n in rest)


LOSES_THE_DEVICE = """
at = int(option("--start-at")) if "--start-at" in sys.argv else 0
while at < 4:
    write(case="begin", at=at, of=4)
    if at == 1:
        DIES
    write(case=at)
    at += 1
"""


@pytest.mark.parametrize("dies", ["sys.exit(75)", "import os; os.abort()"])
def test_another_process_goes_on_after_one_that_has_lost_the_device_or_its_life(kept, dies):
    assert not kept.run(stage_of("5", LOSES_THE_DEVICE.replace("DIES", dies)), 60.0, {})
    found = kept.content["stages"]["5"]
    assert [row["case"] for row in found["results"]] == [0, 2, 3]
    assert found["status"] == "a process lost the device"
    assert found["processes"] == 2


def test_no_process_goes_on_after_the_last_case_or_without_time(kept):
    for at, seconds in ((3, 60.0), (1, gpu_evidence.LEAST_SECONDS - 1)):
        code = f"write(case='begin', at={at}, of=4)\nsys.exit(75)"
        assert not kept.run(stage_of("5", code), seconds, {})
        assert kept.content["stages"]["5"]["processes"] == 1


def test_what_a_stage_had_to_compile_is_counted(kept, tmp_path):
    cache = tmp_path / "triton"
    (cache / "there").mkdir(parents=True)
    code = f"import pathlib; pathlib.Path({str(cache)!r}, 'new').mkdir()"
    assert kept.run(stage_of("3", code), 60.0, {"TRITON_CACHE_DIR": str(cache)})
    assert kept.content["stages"]["3"]["compiled_here"] == 1


def test_time_counts_from_the_start_of_a_process_and_not_from_the_end_of_its_imports():
    """As the parent counts it, which kills what takes longer."""
    code = "import time; time.sleep(4); import sys; sys.argv[1:] = ['1', '--dry-run', '--seconds', '4']; "
    code += (
        "from bench import environment, gpu_stages; print(environment.age_of_process()); sys.exit(gpu_stages.main())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "there was no time for this case" in done.stdout
    assert 4 <= float(done.stdout.split()[0]) < 60


def test_a_process_that_dies_before_it_began_a_case_is_followed_by_none(kept):
    assert not kept.run(stage_of("5", "sys.exit(75)"), 60.0, {})
    assert kept.content["stages"]["5"]["processes"] == 1


def test_half_a_line_of_a_killed_stage_takes_nothing_away(tmp_path):
    (tmp_path / "results").write_text('{"case": 1}\n{"case": 2, "us"')
    assert gpu_evidence.lines(tmp_path / "results") == [{"case": 1}, {"error": "this result was cut off"}]


# --- time -------------------------------------------------------------------------------------------------------------


def stages_of(*names):
    return [gpu_evidence.Stage(n, n, [], gpu_evidence.LIMITS[n], gpu_evidence.KEPT[n]) for n in ("first", *names)]


@pytest.mark.parametrize("used", ["little", "all"])
def test_no_stage_takes_what_is_kept_for_those_after_it(used):
    """The first command's stages in its 7.7 minutes: stage 4, the last one, always has what is kept for it."""
    left = 60 * 7.7 - gpu_evidence.RESERVE
    stages = stages_of("2", "0", "1", "3", "5", "4")
    assert sum(stage.kept for stage in stages) <= 430
    for at, stage in enumerate(stages):
        seconds = gpu_evidence.seconds_for(stage, stages[at + 1 :], left)
        assert stage.kept <= seconds <= stage.limit
        left -= seconds if used == "all" else 5
    assert left >= -1e-9


def test_with_less_time_than_is_kept_every_stage_has_its_share():
    stages = stages_of("2", "3", "4")
    left = 100.0
    shares = []
    for at, stage in enumerate(stages):
        shares.append(gpu_evidence.seconds_for(stage, stages[at + 1 :], left))
        left -= shares[-1]
    assert all(share > 5 for share in shares)
    assert left >= -1e-9


# --- refusals, and what is not needed ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--stages", "1,x"], "--stages is '1,x'; give numbers of ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9']"),
        (
            ["--kit", "nowhere.tar.xz"],
            "--kit is nowhere.tar.xz, which is no file; make gpu-kit makes one, and names it",
        ),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(options, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_evidence", "--out", str(tmp_path / "out"), *options])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("bench.gpu_evidence", run_name="__main__")
    assert ended.value.code == 2
    assert sentence in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_kernels_and_stages_need_no_package_of_the_learners_side():
    code = (
        "import sys\n"
        "for name in ('pydantic', 'rich', 'typer', 'transformers'): sys.modules[name] = None\n"
        "import lilora_kernels, bench.gpu_correctness, bench.gpu_evidence, bench.gpu_next, bench.gpu_stages as stages\n"
        "names = [n for n in stages.STAGES if n != 7]\n"
        "print(sum(1 for n in names for _ in stages.STAGES[n](True)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 6


def test_what_the_samples_of_the_clocks_say(tmp_path):
    def sample(busy, clock, power, capped):
        values = {
            "utilization.gpu": busy,
            "clocks.sm": clock,
            "power.draw": power,
            "clocks_event_reasons.sw_power_cap": capped,
        }
        return ", ".join(str(values.get(field, "0")) for field in LOAD_FIELDS.split(","))

    lines = [LOAD_FIELDS, sample(3, 345, 80, "Not Active"), sample(99, 1980, 640, "Not Active")]
    lines += [sample(97, 1755, 700, "Active"), "2026/11/28 07:00:00, 9"]  # the last one was cut off
    (tmp_path / "clocks.csv").write_text("\n".join(lines))
    found = under_load(tmp_path / "clocks.csv")
    assert (found["samples"], found["busy"]) == (4, 2)
    assert found["clocks.sm"] == {"least": 1755.0, "median": 1980.0, "most": 1980.0}
    assert found["power.draw"]["most"] == 700.0
    assert found["throttled"] == {"sw_power_cap": 1}
    assert under_load(tmp_path / "nowhere.csv") is None
