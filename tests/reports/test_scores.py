import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lilora.errors import UserError
from lilora.reports.scores import METRICS, ScoreMatrix

points = st.floats(0, 100)
shares = st.floats(0, 1)


@st.composite
def filled(draw, least_tasks=1, formats=True):
    """A complete matrix with random scores, and the same as a plain array [T, T] with zeros above the diagonal."""
    size = draw(st.integers(least_tasks, 6))
    matrix, array, share = ScoreMatrix([f"t{i}" for i in range(size)]), np.zeros((size, size)), np.zeros(size)
    for j in range(size):
        for i in range(j + 1):
            array[j, i], share[i] = draw(points), draw(shares)
            matrix.set(f"t{j}", f"t{i}", array[j, i], share[i] if formats else None)
    return matrix, array, share


def cells(matrix):
    return [(after, task) for j, after in enumerate(matrix.tasks) for task in matrix.tasks[: j + 1]]


@given(filled(least_tasks=2))
def test_metrics_are_the_published_sums(case):
    matrix, a, last_shares = case
    size = len(a)
    final, learned = a[size - 1], np.array([a[i, i] for i in range(size)])
    wanted = {
        "AP": final.sum() / size,
        "MAP": sum(a[j].sum() / (j + 1) for j in range(size)) / size,
        "BWT": (final.sum() - np.trace(a)) / (size - 1),
        "Forgetting": (np.trace(a) - final.sum()) / (size - 1),
        "Forgetting_max": (np.max(a, axis=0) - final).sum() / (size - 1),
        "New": learned.sum() / size,
        "MIF": 100 * last_shares.sum() / size,
    }
    assert matrix.metrics() == pytest.approx(wanted, abs=1e-9)
    assert not matrix.undefined()


NEEDED = {  # which cells (j, i) of a 4-task matrix each metric reads
    "AP": lambda j, i: j == 3,
    "MAP": lambda j, i: True,
    "BWT": lambda j, i: i < 3 and j in (i, 3),
    "Forgetting": lambda j, i: i < 3 and j in (i, 3),
    "Forgetting_max": lambda j, i: i < 3,
    "New": lambda j, i: i == j,
    "MIF": lambda j, i: j == 3,
}


@pytest.mark.parametrize("hole", [(j, i) for j in range(4) for i in range(j + 1)], ids=str)
def test_one_missing_cell_is_nan_exactly_where_it_is_needed(hole):
    matrix = ScoreMatrix(["a", "b", "c", "d"])
    random = np.random.default_rng(0)
    for j, i in zip(*np.tril_indices(4), strict=True):
        if (j, i) != hole:
            matrix.set("abcd"[j], "abcd"[i], random.uniform(0, 100), random.uniform())
    after, task = "abcd"[hole[0]], "abcd"[hole[1]]
    needed = {name for name, reads in NEEDED.items() if reads(*hole)}
    assert matrix.missing() == [(after, task)]
    assert math.isnan(matrix.get(after, task))
    assert {name for name, value in matrix.metrics().items() if math.isnan(value)} == needed
    assert matrix.undefined() == {name: f"{name} needs cells that are missing: {task} after {after}" for name in needed}


def test_the_message_names_only_the_cells_the_metric_needs():
    matrix = ScoreMatrix(["a", "b", "c"])
    matrix.set("a", "a", 50)
    why = matrix.undefined()
    assert why["New"] == "New needs cells that are missing: b after b, c after c"
    assert why["AP"] == "AP needs cells that are missing: a after c, b after c, c after c"


def test_one_task_has_no_forgetting():
    matrix = ScoreMatrix(["only"])
    matrix.set("only", "only", 80, 1.0)
    metrics = matrix.metrics()
    assert metrics["AP"] == metrics["MAP"] == metrics["New"] == 80
    assert set(matrix.undefined()) == {"BWT", "Forgetting", "Forgetting_max"}
    assert matrix.undefined()["BWT"] == "BWT needs at least 2 tasks, this run has 1"


def test_mif_is_the_mean_over_tasks_that_instruct_a_format():
    matrix = ScoreMatrix(["words", "caption"])
    matrix.set("words", "words", 10, 0.2)
    matrix.set("caption", "words", 10, 0.7)
    assert math.isnan(matrix.metrics()["MIF"])  # nothing is known of `caption` yet
    matrix.set("caption", "caption", 10)
    assert matrix.metrics()["MIF"] == pytest.approx(70)


def test_mif_without_any_format_says_so():
    matrix = ScoreMatrix(["a"])
    matrix.set("a", "a", 10)
    assert matrix.undefined()["MIF"] == "MIF needs a task that instructs an answer format, this run has none"


@given(filled(), st.data())
def test_json_round_trip(case, data):
    matrix, _, _ = case
    holes = data.draw(st.sets(st.sampled_from(cells(matrix))))
    partial = ScoreMatrix(matrix.tasks)
    for after, task in cells(matrix):
        if (after, task) not in holes:
            partial.set(after, task, matrix.get(after, task), data.draw(st.none() | shares))
    again = ScoreMatrix.from_dict(json.loads(json.dumps(partial.to_dict(), allow_nan=False)))
    assert again.to_dict() == partial.to_dict()
    assert again.missing() == partial.missing()
    np.testing.assert_array_equal(again.scores(), partial.scores())


def test_carried_cells_remember_where_they_were_run():
    matrix = ScoreMatrix(["a", "b", "c"])
    matrix.set("a", "a", 90, 0.5)
    matrix.copy("b", "a", from_after="a")
    matrix.copy("c", "a", from_after="b")
    matrix.set("b", "b", 40, 0.5)
    assert matrix.get("c", "a") == 90
    assert matrix.carried_from("c", "a") == matrix.carried_from("b", "a") == "a"
    assert matrix.carried_from("b", "b") is None
    again = ScoreMatrix.from_dict(json.loads(json.dumps(matrix.to_dict())))
    assert again.carried_from("c", "a") == "a"
    assert again.markdown().splitlines()[2:] == [
        "| a | 90.0 |  |  |",
        "| b | 90.0* | 40.0 |  |",
        "| c | 90.0* | n/a | n/a |",
    ]
    matrix.set("c", "a", 80, 0.5)  # measured after all
    assert matrix.carried_from("c", "a") is None


@given(filled(least_tasks=2, formats=False))
def test_scores_returns_a_copy(case):
    matrix, array, _ = case
    matrix.scores()[:] = -1
    np.testing.assert_array_equal(np.tril(matrix.scores()), array)
    assert np.isnan(matrix.scores()[np.triu_indices(len(array), 1)]).all()


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda m: m.set("a", "z", 1), "unknown task 'z'; the tasks are a, b"),
        (lambda m: m.set("a", "b", 1), "b is trained after a"),
        (lambda m: m.set("b", "a", 1000.1), "the score of a after b is 1000.1"),
        (lambda m: m.set("b", "a", math.nan), "the score of a after b is nan"),
        (lambda m: m.set("b", "a", 1, 50), "the format share of a is 50"),
        (lambda m: m.copy("b", "a", from_after="a"), "cannot be carried over from a"),
        (lambda m: m.copy("b", "b", from_after="b"), "cannot be carried over from b"),
        (lambda m: ScoreMatrix([]), "at least one task name"),
        (lambda m: ScoreMatrix(["a", "a"]), "each name once"),
    ],
)
def test_bad_use_is_one_sentence_and_changes_nothing(call, words):
    matrix = ScoreMatrix(["a", "b"])
    before = matrix.to_dict()
    with pytest.raises(UserError, match=words):
        call(matrix)
    assert matrix.to_dict() == before


@pytest.mark.parametrize(
    "change, words",
    [
        ({"scores": [[1.0]]}, r"scores has rows of length \[1\]; the tasks want \[1, 2\]"),
        ({"scores": [["high"], [1, 2]]}, "at scores.0.0"),
        ({"scores": [[3000], [1, 2]]}, "the score of a after a is 3000"),
        ({"carried_from": [[None], ["z", None]]}, "unknown task 'z'"),
        ({"colour": 1}, "at colour"),
    ],
)
def test_a_damaged_file_is_one_sentence(change, words):
    matrix = ScoreMatrix(["a", "b"])
    matrix.set("b", "a", 5)
    with pytest.raises(UserError, match=words) as caught:
        ScoreMatrix.from_dict(matrix.to_dict() | change)
    assert "\n" not in str(caught.value)


def test_every_metric_is_defined_in_one_line():
    seen = ["AP", "MAP", "BWT", "Forgetting", "Forgetting_max", "New", "MIF"]
    assert list(ScoreMatrix(["a"]).metrics()) == seen
    assert list(ScoreMatrix(["a"], unseen=True).metrics()) == ["Transfer", "Avg", "Last", *seen[2:-1]]
    assert all(metric.definition and "\n" not in metric.definition for metric in METRICS.values())


def test_without_a_task_the_other_cells_stay_as_they_are():
    matrix = ScoreMatrix(["a", "b", "c"])
    for after, task, score in (("a", "a", 10), ("b", "b", 30), ("c", "b", 35), ("c", "c", 50)):
        matrix.set(after, task, score, score / 100)
    matrix.copy("b", "a", "a")
    matrix.copy("c", "a", "a")
    rest = matrix.without("a")
    assert (rest.tasks, rest.to_dict()["scores"]) == (["b", "c"], [[30], [35, 50]])
    assert rest.format_share("c", "b") == 0.35
    rest = matrix.without("b")
    assert (rest.to_dict()["scores"], rest.carried_from("c", "a")) == ([[10], [10, 50]], "a")
    moved = ScoreMatrix(["a", "b", "c"], unseen=True)
    moved.set("a", "b", 20)
    moved.copy("b", "b", "a")
    moved.copy("c", "b", "b")
    rest = moved.without("a")  # the stage at which the cell was run is gone: it stands for itself
    assert (rest.get("b", "b"), rest.get("c", "b"), rest.carried_from("b", "b")) == (20, 20, None)
    assert rest.missing() == [("b", "c"), ("c", "c")]
    assert ScoreMatrix(["a"]).without("a") is None


def test_a_task_without_a_test_split_is_a_stage_and_no_column():
    tasks = ["a", "b", "c", "d"]
    cells = {("a", "a"): 90, ("b", "a"): 80, ("c", "a"): 70, ("c", "c"): 60, ("d", "a"): 50, ("d", "c"): 40}
    matrix = ScoreMatrix(tasks, unscored=["d", "b"])
    assert (matrix.unscored, matrix.columns) == (["b", "d"], ["a", "c"])
    assert [matrix.scored(j) for j in range(4)] == [["a"], ["a"], ["a", "c"], ["a", "c"]]
    for (after, task), score in cells.items():
        assert (after, task) in matrix.missing()
        matrix.set(after, task, score)
    assert matrix.missing() == []
    got = matrix.metrics()
    assert math.isnan(got.pop("MIF"))
    assert got == {
        "AP": 45,
        "MAP": np.mean([90, 80, 65, 45]),
        "BWT": -30,
        "Forgetting": 30,
        "Forgetting_max": 30,
        "New": 75,
    }
    assert ScoreMatrix.from_dict(json.loads(json.dumps(matrix.to_dict()))).to_dict() == matrix.to_dict()
    assert matrix.without("a").unscored == ["b", "d"]
    assert matrix.markdown().splitlines()[0] == "| after | a | c |"
    with pytest.raises(UserError, match="b has no test split"):
        matrix.set("b", "b", 1)


@pytest.mark.parametrize(
    "tasks, unscored, causes",
    [
        (["a", "b"], ["a", "b"], {"AP": "AP needs a task with a test split, this run has none"}),
        (["a", "b"], ["a"], {"BWT": "BWT needs a task with a test split before the last task, this run has none"}),
    ],
)
def test_metrics_without_a_scored_task_say_so(tasks, unscored, causes):
    matrix = ScoreMatrix(tasks, unscored=unscored)
    for j, after in enumerate(tasks):
        for task in matrix.scored(j):
            matrix.set(after, task, 50)
    assert matrix.undefined().items() >= causes.items()


def test_the_references_likelihood_is_kept_carried_and_written_only_where_it_was_measured():
    matrix = ScoreMatrix(["a", "b", "c"])
    matrix.set("a", "a", 50, nll=1.25)
    assert "nlls" in matrix.to_dict()
    matrix.copy("b", "a", "a")
    matrix.set("b", "b", 20)
    read = ScoreMatrix.from_dict(json.loads(json.dumps(matrix.to_dict())))
    for held in (matrix, read, read.without("c")):
        assert (held.nll("a", "a"), held.nll("b", "a"), held.nll("b", "b")) == (1.25, 1.25, None)
    matrix.set("a", "a", 50)
    assert matrix.nll("a", "a") is None
    for wrong in (-0.5, math.inf, math.nan):
        with pytest.raises(UserError, match="finite"):
            matrix.set("a", "a", 50, nll=wrong)
    damaged = read.to_dict() | {"nlls": [[1.0], [1.0, 2.0], [1.0]]}
    with pytest.raises(UserError, match="nlls has rows of length"):
        ScoreMatrix.from_dict(damaged)
