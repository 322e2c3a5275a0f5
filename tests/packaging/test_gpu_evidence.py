"""`bench.gpu_evidence` on a machine without a GPU: every stage with tiny shapes, and what it keeps when one fails."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

STAGES = list("0123456789")
ROOT = Path(__file__).parents[2]
SPREAD = {"median", "p20", "p80"}
SHAPE = {"M", "K", "N", "dtype"}
CALL = SHAPE | {"R", "S", "T", "p"}


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """Results of one dry run of all stages, and its log."""
    out = tmp_path_factory.mktemp("evidence")
    command = [sys.executable, "-m", "bench.gpu_evidence", "--out", str(out), "--dry-run", "--commit", "abc"]
    command += ["--stages", ",".join(STAGES)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    log = (out / "log.txt").read_text()
    assert result.returncode == 0, result.stdout + log[-5000:]
    assert {path.name for path in out.iterdir()} <= {"results.json", "log.txt", "configs.json"}
    return json.loads((out / "results.json").read_text()), log


def test_the_header_names_machine_versions_commit_and_command(dry_run):
    environment = dry_run[0]["environment"]
    assert environment["commit"] == "abc"
    assert environment["dry_run"] is True
    assert "--dry-run" in environment["command"]
    assert {"device", "driver", "cpu", "python", "torch", "triton", "peft", "started"} <= set(environment)


def test_every_stage_runs_on_a_cpu(dry_run):
    content, log = dry_run
    assert list(content["stages"]) == STAGES
    for number, stage in content["stages"].items():
        assert stage["status"] == "ok", (number, stage)
        assert {"clocks_before", "clocks_after", "seconds", "title"} <= set(stage)
        assert f"===== stage {number}" in log
    assert content["warming"]["exit_codes"] == [0]
    assert content["cuda_build"]["status"] in ("left out", "found")


def test_every_figure_says_of_what_it_is(dry_run):
    stages = dry_run[0]["stages"]
    assert {"copy_gb_per_s", "matmul_tflop_per_s"} <= set(stages["1"]["results"][0])
    results = [(number, r) for number in "123459" for r in stages[number]["results"] if r["case"] != "ceilings"]
    assert all("error" not in result for _, result in results)
    reasons = {result["implementation"]: result["unavailable"] for _, result in results if "unavailable" in result}
    assert {"ours_fused", "ours_triton", "vllm", "sglang", "lorafusion", "nemo_automodel"} == set(reasons)
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
        for implementation in ("base", "ours", "ours_operation", "formula", "peft", "grouped_mm"):
            assert ("3", "linear", implementation, direction) in compared
    for direction in ("forward", "backward"):
        for beta in (0, 1):
            assert ("2", "addmm_", f"beta {beta}", direction) in compared
        for plan in ("triton, one launch", "triton, by phase"):
            assert ("4", "delta", plan, direction) in compared
    assert ("5", "decode", "ours", "forward") in compared
    launches = [r for _, r in timed if r["case"] == "launches"]
    assert {(r["direction"], r["phase"]) for r in launches} >= {("forward", 0), ("forward", 2), ("backward", 0)}
    assert all(r["bytes"] <= r["bytes_issued"] and r["flops"] >= 0 for r in launches)


def test_the_whole_model_and_the_search_leave_figures(dry_run):
    stages = dry_run[0]["stages"]
    rows = {(r["case"], r["direction"], r["implementation"], r["T"]): r for r in stages["7"]["results"]}
    for part in ("MLP", "decoder layer"):
        assert {"saved_bytes", "peak_bytes"} <= set(rows[part, "both", "ours", 1])
        assert (part, "forward", "peft_names", 2) in rows
    for name in ("ours", "peft_split"):
        assert rows["training step", "step", name, 2]["peak_bytes"] > 0
    assert rows["generate", "generate", "ours", 2]["tokens_per_s"] > 0
    (decision,) = stages["6"]["results"]
    assert {"improved", "reason"} <= set(decision)
    assert all("unavailable" in r for r in stages["8"]["results"])


@pytest.fixture
def evidence(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import gpu_evidence

    return gpu_evidence


def test_a_failing_or_endless_stage_keeps_its_results_and_those_of_the_others(evidence, tmp_path):
    write = "import sys, time; open(sys.argv[-1], 'a').write('{\"case\": \"%s\"}\\n'); print('output of %s'); "

    def stage(number, rest):
        code = write.replace("%s", str(number)) + rest
        return evidence.Stage(number, f"stage {number}", [sys.executable, "-uc", code], 60)

    kept = evidence.Evidence(tmp_path / "out", {"device": "none"})
    stages = [stage(1, ""), stage(2, "sys.exit(3)"), stage(3, "time.sleep(60)"), stage(4, "")]
    went_well = [kept.run(s, 3.0, {}) for s in stages]
    assert went_well == [True, False, False, True]
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    statuses = [s["status"] for s in content["stages"].values()]
    assert statuses == ["ok", "failed with exit code 3", "stopped after 3 s", "ok"]
    assert [s["results"] for s in content["stages"].values()] == [[{"case": str(n)}] for n in (1, 2, 3, 4)]
    log = (tmp_path / "out" / "log.txt").read_text()
    assert all(f"output of {n}" in log for n in (1, 2, 3, 4))


def test_half_a_line_of_a_killed_stage_takes_nothing_away(evidence, tmp_path):
    (tmp_path / "results").write_text('{"case": 1}\n{"case": 2, "us"')
    assert evidence.lines(tmp_path / "results") == [{"case": 1}, {"error": "this result was cut off"}]


def test_an_unknown_stage_is_refused_before_anything_runs(tmp_path):
    command = [sys.executable, "-m", "bench.gpu_evidence", "--out", str(tmp_path / "out"), "--stages", "1,x"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "--stages is '1,x'; give numbers of [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]" in result.stderr
    assert not (tmp_path / "out").exists()
