"""The table of docs/families.md shows the outcome of every cell of the matrix, and no other cell."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_families_matrix import CELLS, REFUSED

from bench import readme

ROOT = Path(__file__).parents[2]


def test_the_committed_outcomes_are_those_of_the_matrix():
    recorded = json.loads((ROOT / "bench" / "results" / "families.json").read_text())["families"]
    cells = {(family, behaviour): outcome for family, row in recorded.items() for behaviour, outcome in row.items()}
    assert cells.keys() == set(CELLS), "run `make families`, which records the outcome of every cell"
    for cell, outcome in cells.items():
        if cell in REFUSED:
            assert outcome.startswith("refused: ")
            assert re.search(REFUSED[cell], outcome)
        else:
            assert outcome == "passed", cell


def test_the_recorder_and_the_table_show_what_failed_or_is_missing(tmp_path, monkeypatch, request):
    recorder_of = request.config.pluginmanager.getplugin(str(Path(__file__).with_name("conftest.py"))).Recorder
    recorder = recorder_of(tmp_path / "families.json")

    def report(outcome, *properties, when="call"):
        found = SimpleNamespace(when=when, outcome=outcome, passed=outcome == "passed", user_properties=properties)
        recorder.pytest_runtest_logreport(found)

    report("passed", ("cell", ("a", "train")))
    report("passed", ("cell", ("a", "merge")), ("refused", "a cannot"), when="setup")
    report("passed", ("cell", ("a", "merge")), ("refused", "a cannot"))
    report("failed", ("cell", ("b", "train")))
    report("passed", ("other", 1))
    report("passed", ("cell", ("c", "train")))
    report("passed", ("cell", ("c", "merge")), ("refused", "c neither"))
    found = {"types": 5, "built": 4, "found": 4, "attention alone": ["d"], "not built": ["e"]}
    report("failed", ("structure", {"types": 0}))
    report("passed", ("structure", found))
    recorder.pytest_sessionfinish()
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    lines = readme.families().splitlines()
    assert lines[0] == "| `model_type` | train | merge |"
    assert lines[2:5] == ["| a, c | ✓ | no |", "| b | failed | – |", ""]
    assert "Of transformers' 5 model types" in lines[5]
    page = readme.families_table()
    for line in ("| a | ✓ | no (1) |", "| c | ✓ | no (2) |", "(1) Refused: a cannot.  ", "(2) Refused: c neither.  "):
        assert f"\n{line}\n" in page


@pytest.mark.parametrize("page", ["docs/families.md", "docs/families-table.md"])
def test_the_pages_are_those_of_the_recorded_outcomes(page):
    text = (ROOT / page).read_text()
    assert text == readme.updated(page, text), "run `python -m bench.readme`"
