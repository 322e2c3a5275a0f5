"""The table of the papers' claims: a verdict is of the figures, and a row says so where there are none."""

import math

import pytest

from bench import claims
from lilora.reports.runs import Spread


@pytest.mark.parametrize(
    "better, worse, word",
    [
        ((90.0, 2.0), (85.0, 2.0), "holds"),
        ((90.0, 2.0), (86.5, 2.0), "within the spread"),
        ((85.0, 2.0), (90.0, 2.0), "does not hold"),
        ((90.0, math.nan), (10.0, 1.0), "one seed, no verdict"),
    ],
)
def test_a_verdict_is_of_means_and_deviations(better, worse, word):
    assert claims.verdict(Spread(*better), Spread(*worse)) == word


def test_a_claim_without_runs_names_its_command(monkeypatch):
    monkeypatch.setattr(claims, "runs_of", lambda *_: None)
    rows = claims.claims().splitlines()
    assert "| not run yet: `make long` |  |" in next(row for row in rows if "memory stays flat" in row)
    assert "| not run yet: `make real-text` |  |" in next(row for row in rows if "stability loss" in row)


@pytest.fixture
def analysed(monkeypatch):
    """Let a suite have analysed this, a number for A and one for B."""

    def have(spread=1.0, **of_dirlora):
        numbers = {
            name: {key: Spread(x, spread) for key, x in zip("AB", pair, strict=True)}
            for name, pair in of_dirlora.items()
        }
        monkeypatch.setattr(claims, "analyses", lambda suite: {"dirlora": numbers} if suite.name == "real-text" else {})

    return have


@pytest.mark.parametrize(
    "overlap, spread, word",
    [((60, 10), 1.0, "holds"), ((10, 60), 1.0, "does not hold"), ((10, 9), 1.0, "within the spread"),
     ((60, 10), math.nan, "one seed, no verdict")],
)  # fmt: skip
def test_a_are_alike_if_more_than_b(overlap, spread, word, analysed):
    analysed(spread, overlap=overlap, expected=(2, 1))
    assert claims.alike_across_tasks()[1] == f"real-text: {word}"


@pytest.mark.parametrize(
    "redundant, spread, word",
    [((30, 20), 1.0, "holds"), ((30, 2), 1.0, "does not hold"), ((30, 10.5), 1.0, "within the spread"),
     ((30, 20), math.nan, "one seed, no verdict")],
)  # fmt: skip
def test_ranks_are_redundant_if_a_tenth_of_a_and_of_b_are(redundant, spread, word, analysed):
    analysed(spread, redundant=redundant)
    assert claims.redundancy_of_ranks()[1] == f"real-text: {word}"


def test_a_start_that_all_share_is_no_verdict(analysed, monkeypatch):
    own, same = ({"overlap": {"A": Spread(x, 0.5), "B": Spread(7, 1)}} for x in (3, 99))
    own["expected"] = {"A": Spread(2, 0), "B": Spread(1, 0)}
    found = {"dirlora": own, "dirlora-same-start": same}
    monkeypatch.setattr(claims, "analyses", lambda suite: found if suite.name == "real-text" else {})
    figure, word = claims.alike_across_tasks()
    assert word == "real-text: does not hold"
    assert figure.endswith("99.0 ± 0.5 and 7.0 ± 1.0 % with one start for all")
