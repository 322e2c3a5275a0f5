"""The suites of runs: what is left out, what is found first, what ends one, and that every suite can be run."""

import json
from pathlib import Path

import pytest
import typer

from bench import suite, suite_tables
from lilora.cli import app
from lilora.errors import UserError
from lilora.reports.scores import ScoreMatrix

NAMES = sorted(path.stem for path in (suite.ROOT / "bench" / "suites").glob("*.yaml"))


def metrics(label, seed, rate):
    scores = ScoreMatrix(["a", "b"])
    for number, (after, task) in enumerate((("a", "a"), ("b", "a"), ("b", "b"))):
        scores.set(after, task, 10 * (number + seed), nll=0.5)
    run = {"method": label, "seed": seed, "matrix": scores.to_dict(), "params_per_task": None, "seconds": 1.0}
    run |= {
        "extra": {"train": {"learning_rate": rate}, "model": f"{suite.ROOT}/runs/base"},
        "metrics": scores.metrics(),
    }
    return {"environment": {"device": "here"}, "runs": [run]}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A suite of three labels and two seeds, whose commands are recorded and leave what they would."""
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    monkeypatch.setattr(suite, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(suite, "write_report", lambda *arguments: arguments[0])
    monkeypatch.setattr(suite.subprocess, "run", lambda *_, **__: None)
    called = []

    def lilora(command, *words, log):
        words = list(map(str, words))
        options = dict(zip(words[1::2], words[2::2], strict=False))
        called.append((command, options.get("--label"), options.get("--seed"), options.get("--lr")))
        if options.get("--label") == "broken":
            raise UserError("lilora train ended with 1: it broke")
        if command == "train":
            out = Path(words[words.index("--out") + 1])
            out.mkdir(parents=True, exist_ok=True)
            content = metrics(options["--label"], int(options["--seed"]), float(options["--lr"]))
            (out / "metrics.json").write_text(json.dumps(content))
        pairs = {key: [[1.0, 0.5], [0.5, 1.0]] for key in "AB"}
        analysis = {"threshold": 0.5, "overlap": pairs, "expected": pairs, "cka": pairs, "redundant": pairs}
        return json.dumps(analysis if command == "analyze" else {"best": {"candidate": {"learning_rate": 0.5}}})

    monkeypatch.setattr(suite, "lilora", lilora)
    small = suite.Suite(
        name="small", title="Small", manifest="m.yaml", build="build.py", options={"method": "lora"}, seeds=[0, 1],
        rates=[0.1, 0.5], runs={"fixed": {"lr": 0.25}, "tuned": {}},
    )  # fmt: skip
    return small, called, lambda some=small: suite.run(some, list(some.runs), 1, tmp_path / "runs")


def test_rates_are_found_once_and_what_has_a_file_is_not_run_again(tiny):
    small, called, run = tiny
    small.results.mkdir(parents=True)
    content = metrics("fixed", 1, 0.25) | {"options": {"method": "lora", "lr": 0.25}}
    small.file("fixed", 1).write_text(json.dumps(content))
    run()
    assert [call[:3] for call in called[:1]] == [("tune", None, None)]
    assert called[1:] == [
        ("train", "fixed", "0", "0.25"),
        ("train", "tuned", "0", "0.5"),
        ("train", "tuned", "1", "0.5"),
    ]
    assert len(small.finished()) == 4
    assert json.loads(small.file("tuned", 1).read_text())["runs"][0]["extra"]["model"] == "runs/base"
    del called[:]
    run()
    assert called == []
    small.file("tuned", 0).unlink()
    run()
    assert called == [("train", "tuned", "0", "0.5")]


def test_a_label_may_take_the_rate_of_another(tiny, monkeypatch):
    small, called, run = tiny
    small = small.model_copy(update={"runs": {"changed": {}, "tuned": {}}, "rate_of": {"changed": "tuned"}})
    run(small)
    assert [call[1] for call in called] == [None, "changed", "tuned", "changed", "tuned"]
    assert {call[3] for call in called[1:]} == {"0.5"}
    assert [path.name for path in (small.results / "tune").iterdir()] == ["tuned.json"]
    monkeypatch.setattr(suite_tables.Suite, "read", lambda name: small)
    table = suite_tables.suite_table("small", "make small")
    assert "scored on the test splits; changed that of tuned." in table


def test_a_file_of_other_options_is_said_and_nothing_is_run(tiny):
    small, called, run = tiny
    run()
    del called[:]
    with pytest.raises(UserError, match=r"fixed-0.json has other options than its suite \(lr 0.25 and 0.75\); delete"):
        run(small.model_copy(update={"runs": {"fixed": {"lr": 0.75}, "tuned": {}}}))
    assert called == []


def test_a_failure_ends_the_suite_and_keeps_what_was_done(tiny):
    small, called, run = tiny
    with pytest.raises(UserError, match="it broke"):
        run(small.model_copy(update={"runs": {"fixed": {"lr": 0.25}, "broken": {"lr": 1}, "later": {"lr": 1}}}))
    assert [call[1] for call in called] == ["fixed", "broken"]
    assert small.file("fixed", 0).exists()


def test_the_table_of_a_suite_is_made_of_its_files(tiny, monkeypatch):
    small, _, run = tiny
    monkeypatch.setattr(suite_tables.Suite, "read", lambda name: small)
    with pytest.raises(FileNotFoundError):
        suite_tables.suite_table("small", "make small")
    run()
    table = suite_tables.suite_table("small", "make small")
    assert "| tuned | 0.5 | 15.0 ± 7.1 | 20.0 ± 7.1 | -10.0 ± 0.0 | 0.50 | none | 2 |" in table
    assert "lilora tune" not in table
    monkeypatch.setattr(suite_tables.Suite, "read", lambda name: small.model_copy(update={"runs": {"tuned": {}}}))
    assert "the best of 2 by `lilora tune` on seed 100, scored on the test splits." in suite_tables.suite_table(
        "small", "make small"
    )
    small.tuning("tuned").write_text(small.tuning("tuned").read_text().replace("{", '{"scored_on": "validation", ', 1))
    table = suite_tables.suite_table("small", "make small")
    assert "on seed 100, scored on samples held out of the training." in table
    monkeypatch.setattr(suite_tables.Suite, "read", lambda name: small)
    content = json.loads(small.file("fixed", 1).read_text())
    small.file("fixed", 1).write_text(json.dumps(content | {"options": {"lr": 9}}))
    with pytest.raises(UserError, match="the runs of fixed have different options"):
        suite_tables.suite_table("small", "make small")


def test_redundancy_is_the_mean_over_pairs_and_runs(tiny):
    small, _, run = tiny
    small = small.model_copy(update={"analyse": ["fixed"]})
    run(small)
    assert suite_tables.redundancy(small.model_copy(update={"seeds": [7]})) == ""
    for seed in small.seeds:
        content = json.loads(small.file("fixed", seed).read_text())
        pairs = [[None, 0.1 * (seed + 1)], [0.3, None]]
        content["analysis"] |= {
            key: {"A": pairs, "B": [[1, 1], [1, 1]]} for key in ("redundant", "overlap", "expected", "cka")
        }
        small.file("fixed", seed).write_text(json.dumps(content))
    table = suite_tables.redundancy(small)
    assert "| redundant, % | 22.5 ± 3.5 | 100.0 ± 0.0 |" in table
    assert "Of fixed, 2 runs" in table


def test_a_run_whose_analysis_lacks_something_is_made_again(tiny):
    small, called, run = tiny
    run()
    del called[:]
    with_analysis = small.model_copy(update={"analyse": ["fixed"]})
    assert suite_tables.redundancy(with_analysis) == ""
    run(with_analysis)
    assert [call[0] for call in called] == ["train", "analyze"] * 2
    content = json.loads(small.file("fixed", 1).read_text())
    del content["analysis"]["cka"]
    small.file("fixed", 1).write_text(json.dumps(content))
    assert "1 run;" in suite_tables.redundancy(with_analysis)
    assert (with_analysis.done("fixed", 0), with_analysis.done("fixed", 1)) == (True, False)


@pytest.mark.parametrize("name", NAMES)
def test_every_suite_gives_options_that_train_takes_and_files_that_are_its_own(name):
    found = suite.Suite.read(name)
    assert (suite.ROOT / found.manifest).exists()
    assert (suite.ROOT / found.build.split()[0]).exists()
    assert {*found.analyse, *found.rate_of, *found.rate_of.values()} <= found.runs.keys()
    train = typer.main.get_command(app).commands["train"]
    for label in found.runs:
        options = found.options | found.runs[label]
        assert "lr" in options or len(found.rates) > 1
        context = train.make_context("train", [found.manifest, *suite.words_of(options | {"lr": 1})])
        assert context.params["tasks"] == Path(found.manifest)
    names = {found.file(label, seed).name for label in found.runs for seed in found.seeds}
    assert {path.name for path in found.results.glob("*-?.json")} <= names
    for label in found.runs:
        assert all(found.done(label, seed) in (True, False) for seed in found.seeds)
