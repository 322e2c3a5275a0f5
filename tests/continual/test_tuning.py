"""`lilora tune`: what goes on to the next round and wins, going on, divergence, and its sentences."""

import json

import pytest
import yaml

from lilora import cli
from lilora.bank.bank import Bank
from lilora.continual import tuning
from lilora.continual.task_sequence import held_out
from lilora.continual.tuning import FILE, Candidate, Result, Tuning, halving, rounds


def test_the_better_half_goes_on_to_twice_as_many_tasks():
    assert rounds(8, 2, 12) == [(8, 2), (4, 4), (2, 8)]
    assert rounds(8, 2, 6) == [(8, 2), (4, 4), (2, 6)]
    assert rounds(5, 3, 4) == [(5, 3), (3, 4)]
    assert rounds(3, 2, 1) == [(3, 1)]
    candidates = [Candidate(learning_rate=rate) for rate in (1e-4, 1e-3, 1e-2, 1e-1)]
    points = {(1e-4, 2): 10, (1e-3, 2): 40, (1e-2, 2): 30, (1e-1, 2): 20, (1e-3, 4): 5, (1e-2, 4): 25}
    calls = []

    def measure(candidate, tasks):
        calls.append((candidate.learning_rate, tasks))
        return Result(candidate=candidate, tasks=tasks, ap=points[calls[-1]])

    *_, last = halving(candidates, rounds(4, 2, 4), measure)
    assert last[0].candidate.learning_rate == 1e-2
    assert calls == list(points)


def test_equal_points_are_told_apart_by_likelihood_and_divergence_is_last():
    a, b, c, d = (Candidate(learning_rate=rate) for rate in (1e-4, 1e-3, 1e-2, 1e-1))
    results = [
        Result(candidate=a, tasks=2, ap=0.0, nll=3.0),
        Result(candidate=b, tasks=2, diverged="not finite"),
        Result(candidate=c, tasks=2, ap=0.0, nll=1.5),
        Result(candidate=d, tasks=2, ap=1.0, nll=9.0),
    ]
    assert [r.candidate for r in sorted(results, key=Result.rank)] == [d, c, a, b]


def test_points_of_cider_are_within_the_plot():
    results = [Result(candidate=Candidate(learning_rate=rate), tasks=2, ap=ap) for rate, ap in ((1e-3, 130), (1, None))]
    (axes,) = tuning._figure(Tuning(tasks=["a", "b"], seed=100, options={}, results=results)).axes
    assert axes.get_ylim() == (0, 130)


@pytest.fixture(scope="module")
def tuned(suite, tmp_path_factory):
    """Three rates of one LoRA, one of which no model survives, for three steps a task; there are no test files."""
    folder = tmp_path_factory.mktemp("tuned")
    content = yaml.safe_load((suite / "tasks.yaml").read_text())
    content |= {"data": str(suite / "data"), "model": str(suite / "base")}
    for task in content["tasks"]:
        task["test"] = "missing.json"
    (folder / "tasks.yaml").write_text(yaml.safe_dump(content))
    out = folder / "out"
    options = (
        "--method lora --r 4 --max-steps 3 --batch-size 4 --gradient-accumulation 1 --device cpu --set lora_alpha=1e20"
    )
    words = ["tune", folder / "tasks.yaml", *options.split(), "--order", "colour,name,count", "--out", out, "--quiet"]
    return [*map(str, words), "--lr", "1e-30,1e-24,1.0"], out


def test_rates_are_tried_recorded_and_the_best_is_said(tuned, lilora, monkeypatch):
    words, out = tuned
    code, said, err = lilora(*words)
    assert code == 0, err
    held = Tuning.model_validate_json((out / FILE).read_bytes())
    assert [(r.candidate.learning_rate, r.tasks) for r in held.results] == [(1e-30, 2), (1e-24, 2), (1.0, 2), *[
        (r.candidate.learning_rate, 3) for r in sorted(held.results[:3], key=Result.rank)[:2]
    ]]  # fmt: skip
    assert held.best == min(held.results[3:], key=Result.rank)
    assert "its loss is not finite at step 3" in held.results[2].diverged
    assert (held.seed, held.scored_on) == (100, "validation")
    assert all(r.nll > 0 for r in held.results if r.ap is not None)
    bank = Bank.open(out / "lr-1e-24")
    assert (bank.config["train"]["learning_rate"], bank.tasks) == (1e-24, ["colour", "name", "count"])
    answers = (out / "lr-1e-24" / "predictions" / "name-colour.jsonl").read_text().splitlines()
    assert [json.loads(answer)["id"] for answer in answers] == list(map(str, held_out(12)))
    assert (out / "tune.png").stat().st_size > 1000
    best = f"{held.best.candidate.learning_rate:g}"
    assert f"in the manifest: learning_rate: {{lora: {best}}}" in said
    assert f"--set lora_alpha=1e20 --order colour,name,count --lr {best}" in said.replace("\n", " ")

    trained = []
    monkeypatch.setattr(cli.tune, "_measured", lambda *arguments: trained.append(arguments))
    code, again, err = lilora(*words, "--json")
    assert code == 0, err
    assert (json.loads(again), trained) == (json.loads(held.model_dump_json()), [])
    (out / FILE).write_text((out / FILE).read_text().replace('"scored_on": "validation"', '"scored_on": "test"'))
    code, _, err = lilora(*words)
    assert (code, "scored_on 'test' there and 'validation' here" in err) == (2, True)
    (out / FILE).write_text(held.model_dump_json())
    code, _, err = lilora(*words, "--max-steps", "4")
    assert code == 2
    assert "holds another tuning: options {'max_steps': 3} there and {'max_steps': 4} here" in err


def test_all_diverged_is_one_sentence(suite, tmp_path, lilora, monkeypatch):
    def measured(command, candidate, tasks, arguments, out):
        return Result(candidate=candidate, tasks=tasks, diverged="its loss is not finite")

    monkeypatch.setattr(cli.tune, "_measured", measured)
    words = [
        "tune",
        suite / "tasks.yaml",
        "--out",
        tmp_path,
        "--quiet",
        "--try",
        "stability=[0.1, 1]",
        "--preset",
        "paper",
    ]
    code, _, err = lilora(*words, "--lr", "1e-3,1e-2")
    assert (code, err) == (
        2,
        "lilora: all of 4 candidates diverged (its loss is not finite); give lower rates with --lr\n",
    )


def test_a_method_that_trains_on_all_tasks_together_has_one_round(suite, tmp_path, lilora, monkeypatch):
    trained = []

    def measured(command, candidate, tasks, arguments, out):
        trained.append((candidate.learning_rate, tasks))
        return Result(candidate=candidate, tasks=tasks, ap=5.0, nll=candidate.learning_rate)

    monkeypatch.setattr(cli.tune, "_measured", measured)
    words = ["tune", suite / "tasks.yaml", "--out", tmp_path, "--quiet", "--method", "joint", "--lr", "1e-3,1e-2,1e-4"]
    code, _, err = lilora(*words)
    assert code == 0, err
    assert trained == [(1e-4, 3), (1e-3, 3), (1e-2, 3)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "zero-shot"], "--method zero-shot trains nothing"),
        (["--lr", "1e-3"], "nothing to choose from"),
        (["--lr", "1e-3,x"], "'x' is no rate"),
        (["--lr", "1e-3,1e-3"], "given twice"),
        (["--lr", "1e-3,2"], "'2' is no rate"),
        (["--try", "stability=3"], "one list is wanted"),
        (["--try", "stabilty=[3]"], "lilora has no setting 'stabilty'"),
        (["--label", "x"], "--label behind lilora tune"),
        (["--validate"], "--validate behind lilora tune"),
        (["--rr", "3"], "No such option"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_is_trained(words, said, suite, tmp_path, lilora):
    code, _, err = lilora("tune", suite / "tasks.yaml", "--out", tmp_path / "out", *words)
    assert code == 2
    assert said in err
    assert not (tmp_path / "out").exists()
