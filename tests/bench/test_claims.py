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
