"""`pytest bench/` leaves results; RESULTS.md, plots and the tables of README and docs/ come from results alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.forked import Forked

from bench import readme, report

ROOT = Path(__file__).parents[2]


def alone() -> dict[str, str]:
    """The environment without xdist's: pytest-benchmark stands back when it finds itself in one of several processes."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder of a tiny run of everything in bench/."""
    folder = tmp_path_factory.mktemp("bench") / "results"
    command = [sys.executable, "-m", "pytest", "bench/", "--tiny", "-q", "-p", "no:cacheprovider", "--out", str(folder)]
    result = subprocess.run(command, cwd=ROOT, env=alone(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:]
    assert "test_linear[training-tiny-M20-K32-T2-p0.05-float32-both-ours]" in result.stdout
    return folder


def test_results_name_their_origin_and_hold_every_case(results):
    environment, rows = report.load(results)
    assert {"device", "torch", "peft", "commit", "command", "started"} <= set(environment)
    cases = {row["case"] for row in rows}
    assert cases >= {"linear, tiny", "MLP", "decoder layer", "training step", "generate", "bank over tasks"}
    assert not [row for row in rows if "error" in row]
    timed = [row for row in rows if "us" in row]
    assert all(row["us"]["p20"] <= row["us"]["median"] <= row["us"]["p80"] for row in timed)
    linear = [row for row in timed if row["case"] == "linear, tiny"]
    assert all({"floor_us", "percent_of_floor", "largest_error", "ratio_to_base"} <= set(row) for row in linear)


def test_the_document_has_every_figure_and_every_reason(results):
    report.write(results)
    text = (results / "RESULTS.md").read_text()
    environment, rows = report.load(results)
    assert environment["commit"] in text
    for row in rows:
        if "unavailable" in row:
            assert row["unavailable"] in text
    assert "| LiLoRALinear | 3 | forward |" in text
    assert {path.name for path in results.iterdir()} == {
        "results.json", "RESULTS.md", "bars.png", "rows.png", "growth.png", "roofline.png"
    }  # fmt: skip


# Plugins for a run: what may go wrong in one, and whether results.json may then be written.
BROKEN_OFF = """
import bench.growth

def step_memory(*arguments):
    raise RuntimeError("broken off")

bench.growth.step_memory = step_memory
"""
WRONG = """
import dataclasses
import bench.compare

RIGHT = bench.compare.REGISTRY["{peer}"]

def built(sets, training):
    right = RIGHT.build(sets, training)
    return dataclasses.replace(right, forward=lambda at: right.forward(at) + 1)

bench.compare.REGISTRY["{peer}"] = dataclasses.replace(RIGHT, build=built)
"""


def faulty(tmp_path, plugin: str, case: str) -> tuple[str, Path]:
    """What a run with the plugin prints, and the folder for its results. It must fail."""
    (tmp_path / "fault.py").write_text(plugin)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "fault", "bench/", "-k", case]
    with (tmp_path / "printed").open("w") as printed, pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        code = Forked([*command, "--tiny", "--out", str(out)], cwd=ROOT, env=alone(), stdout=printed).wait()
    text = (tmp_path / "printed").read_text()
    assert code == 1, text
    return text, out


def test_a_case_that_breaks_off_leaves_no_results(tmp_path):
    printed, out = faulty(tmp_path, BROKEN_OFF, "memory")
    assert "broken off" in printed
    assert not out.exists()


@pytest.mark.parametrize("peer", ["formula", "base_mkl"])
def test_a_wrong_peer_fails_and_its_error_is_in_the_results(tmp_path, peer):
    printed, out = faulty(tmp_path, WRONG.format(peer=peer), "tiny and M6")
    assert "1 failed" in printed
    _, rows = report.load(out)
    wrong = [row for row in rows if "error" in row]
    assert {row["implementation"] for row in wrong} == {peer}
    assert not any("us" in row for row in wrong)


def test_our_own_wrong_figures_leave_no_results(tmp_path):
    _, out = faulty(tmp_path, WRONG.format(peer="ours"), "tiny and M6")
    assert not out.exists()


@pytest.mark.parametrize("page", readme.PAGES)
def test_the_tables_of_a_page_are_those_of_the_committed_results(page):
    text = (ROOT / page).read_text()
    assert readme.updated(page, text) == text
    assert all(f"<!-- {table.__name__} -->" in text for table in readme.PAGES[page])


def test_readme_is_short_and_has_one_table_of_results_whose_first_line_is_the_speed_on_a_cpu():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    table = readme.small().split("\n\n")[0].splitlines()
    assert len(table) <= 12
    environment, _ = report.load(readme.RESULTS / "cpu")
    assert table[0].startswith(f"| {environment['device']} |")
    assert "time" in table[2]


def test_a_line_holds_ours_against_its_peer():
    shared = {
        "case": "linear, gate_up",
        "M": 8,
        "K": 4,
        "N": 6,
        "R": 2,
        "S": 1,
        "p": 0.0,
        "dtype": "float32",
        "training": False,
    }
    middle = {"median": 1.25, "p20": 1.2, "p80": 1.3}
    ours = shared | {
        "T": 8, "implementation": "ours", "direction": "forward", "us": middle, "ratio_to_base": middle,
        "against": "peft_names", "ratio_to_peft": middle, "overhead_removed": 0.5, "saved_bytes": 2**20,
    }  # fmt: skip
    theirs = shared | {
        "T": 8, "implementation": "peft_names", "direction": "forward", "us": middle,
        "ratio_to_base": middle | {"median": 1.5}, "saved_bytes": 2**21,
    }  # fmt: skip
    other = theirs | {"K": 5, "ratio_to_base": middle | {"median": 9.0}}
    rows = json.loads(json.dumps([other, ours, theirs]))
    assert readme.headlines(rows) == [rows[1]]
    line = readme.line_of(rows[1], rows)
    assert line == (
        "| linear, gate_up, inference, 8 tasks: M8 4->6 r2 float32 | 1.25 | 1.50 | 1.25, 1.20 .. 1.30 | 50 % | 1.0, 2.0 MiB |"
    )


def decoded(implementation, rows, tasks, us, columns=4, **more):
    problem = {"case": "linear, gate_up", "M": rows, "K": columns, "N": 6, "T": tasks, "dtype": "float32"}
    given = problem | {"training": False, "implementation": implementation, "direction": "forward"}
    return given | {"us": spread(us, us, us), "percent_of_read": 50.0} | more


def test_decoding_stands_against_the_frozen_layer_by_its_fastest_implementation():
    peers = {"base_streamed": 1.25, "base_mkl": 1.5, "peft_names": 2.0}
    peers = {name: spread(median, median, median) for name, median in peers.items()}
    figures = {"ratio_to_base": spread(0.5, 0.4, 0.6), "gb_per_s": 7.0, "ratio_to_peers": peers}
    ours = decoded("ours", 8, 8, 2.0, **figures)
    others = [ours | {"T": 1}, ours | {"M": 32}, ours | {"ratio_to_peers": {"peft_names": peers["peft_names"]}}]
    lines = readme.decoding([*others, ours])
    assert lines[2:4] == [
        "| linear, gate_up: M8 4->6 float32 | 0.50 | 1.25 | 1.50, prepacked for MKL | 7.0 | 50 % |",
        "",
    ]
    assert readme.decoding(others) == []


def test_the_plot_of_decoding_has_the_frozen_layer_once_and_ours_with_one_and_with_several_tasks(tmp_path):
    rows = [
        decoded(name, m, tasks, 10.0 * m + tasks)
        for m, tasks in ((1, 1), (4, 1), (4, 4), (32, 1), (32, 8), (64, 8))
        for name in ("base", "base_streamed", "ours", "formula")
        if (m, name) != (64, "base_streamed")
    ]
    rows += [decoded("base_streamed", 4, 4, 1.0, columns=5), decoded("ours", 4, 4, 1.0, columns=5)]
    points = {}
    for row in report.decode_lines(rows):
        points.setdefault(row["implementation"], []).append((row["M"], row["T"]))
    mixed = [(1, 1), (4, 4), (32, 8)]
    assert points == {
        "base": mixed, "base_streamed": mixed, "ours, one task": [(1, 1), (4, 1), (32, 1)], "ours, up to 8 tasks": mixed,
    }  # fmt: skip
    report.decode(rows, tmp_path / "decode.png")
    assert (tmp_path / "decode.png").exists()


def spread(median, p20, p80):
    return {"median": median, "p20": p20, "p80": p80}


def test_the_first_lines_name_the_cells_in_which_a_peer_is_faster():
    def cell(rows, formula, peft, paired=None, tasks=2, peft_tasks=2):
        """Rows of one cell in which the formula and PEFT take such a part of our time."""
        shared = {"case": "linear", "M": rows, "K": 4, "N": 6, "training": True, "T": tasks, "direction": "both"}
        ours = {
            "implementation": "ours",
            "ratio_to_base": spread(2, 1.9, 2.1),
            "against": "peft",
            "ratio_to_peft": peft,
        }
        theirs = {"ratio_to_base": spread(2 / formula, 1.9 / formula, 2.1 / formula)}
        return [
            {**shared, **ours, "us": spread(1, 1, 1)} | ({"ratio_to_peers": {"formula": paired}} if paired else {}),
            {**shared, **theirs, "implementation": "formula", "us": spread(1, 1, 1)},
            {**shared, "T": peft_tasks, "implementation": "peft", "us": spread(1, 1, 1)},
            {**shared, **theirs, "implementation": "grouped_mm", "us": spread(0.1, 0.1, 0.1)},
        ]

    ahead, level = spread(0.8, 0.7, 0.9), spread(1.02, 0.9, 1.1)
    environment = {"device": "a CPU"}
    rows = cell(1, 1.5, ahead) + cell(2, 0.5, spread(1.3, 1.2, 1.4)) + cell(3, 0.9, spread(1.1, 0.9, 1.3))
    rows += (
        cell(4, 1.01, level)
        + cell(5, 3, ahead, paired=spread(0.9, 0.8, 1))
        + cell(6, 0.7, spread(1.2, 1.1, 1.3), peft_tasks=1)
    )
    first = report.document(environment, rows).splitlines()
    assert first[:2] == ["# a CPU", ""]
    assert first[2].startswith("In 4 of 12 cells")
    assert "in 1 of them unclearly so" in first[2]
    size = "linear, training: M{} 4->6 T2, both".format
    assert first[6:11] == [
        f"| {size(1)} | LiLoRA's formula in PyTorch | ~ 1.500 (1.357 .. 1.658) |  |",
        f"| {size(2)} | {report.TITLES['peft']} | 1.300 (1.200 .. 1.400) |  |",
        f"| {size(6)} | {report.TITLES['peft']} | 1.200 (1.100 .. 1.300) |  |",
        f"| {size(3)} | {report.TITLES['peft']} | 1.100 (0.900 .. 1.300) | unclear |",
        "",
    ]
    lines = report.document(environment, cell(4, 1.01, level)).splitlines()
    assert lines[2] == "In none of 2 cells does the formula in PyTorch or PEFT take less time than ours."


def test_the_committed_document_is_that_of_the_committed_results():
    for folder in report.folders():
        assert (folder / "RESULTS.md").read_text() == report.document(*report.load(folder))


def test_results_of_a_pretended_gpu_are_never_shown(tmp_path):
    about = {"device": "NVIDIA H100 80GB HBM3 (pretended: nothing was computed)", "driver": "0"}
    (tmp_path / "results.json").write_text(json.dumps({"environment": about, "stages": {}}))
    with pytest.raises(SystemExit, match="its GPU was pretended"):
        report.load(tmp_path)
