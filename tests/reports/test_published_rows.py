"""Metrics of published rows from the scores that were published with them."""

import numpy as np
import pytest

from lilora.reports.scores import ScoreMatrix


def matrix_of(scores, unseen=False):
    """Of scores [stage, task]; those before a task's training count with `unseen` alone."""
    names = [f"t{i}" for i in range(len(scores))]
    matrix = ScoreMatrix(names, unseen)
    for j, after in enumerate(names):
        for task in matrix.scored(j):
            matrix.set(after, task, scores[j][names.index(task)])
    return matrix


# mtil/results/t3_1.npy and t3_7.npy of github.com/Thunderbeee/ZSCL, to one digit, without the column of CIFAR-10; the rows
# "Continual Learning" and "ZSCL" of table 3 of arXiv 2303.06628.
MTIL = {
    "finetuning": (
        """62.6 67.1 43.0 30.8 46.0 46.2 64.2 43.1 69.3 26.6 51.8
        15.7 93.4 49.0 31.3 36.2 32.9 60.5 48.0 65.8 15.8 51.2
        24.4 90.4 88.8 34.1 36.3 32.5 57.8 46.3 73.3 22.9 54.6
        26.0 89.6 78.9 76.9 24.0 34.6 60.9 49.1 70.1 23.4 52.5
        22.7 88.1 70.6 69.0 98.8 28.8 49.2 41.4 60.0 21.9 46.6
        22.9 88.1 70.8 69.7 98.5 96.1 53.7 39.0 64.6 22.6 48.3
        27.4 90.2 76.7 72.5 98.0 89.3 92.1 41.8 73.5 35.8 57.1
        2.3 33.9 4.9 20.0 21.8 11.1 7.9 99.6 10.2 2.4 18.0
        17.9 80.6 43.9 51.3 74.1 62.0 80.6 99.6 93.3 13.2 39.4
        27.3 85.4 57.2 61.8 89.6 65.8 82.5 99.5 93.2 87.6 46.2
        31.0 89.3 65.8 67.3 88.9 71.1 85.6 99.6 92.9 77.3 81.1""",
        {"Transfer": 44.6, "Avg": 55.9, "Last": 77.3},
    ),
    "zscl": (
        """55.1 86.0 66.3 44.9 49.2 70.6 88.3 53.6 87.4 61.3 65.7
        48.9 94.2 68.6 44.7 50.4 67.0 87.6 55.2 85.0 61.0 65.9
        47.1 93.1 86.2 46.5 50.1 68.8 87.7 63.4 87.6 60.6 67.4
        47.0 93.8 85.0 76.2 51.7 69.9 87.8 65.9 88.4 61.2 67.2
        46.1 92.8 84.0 75.0 97.8 69.1 87.1 67.6 88.0 60.3 67.1
        43.8 92.5 83.2 73.5 97.2 96.3 87.1 63.3 86.5 58.8 66.9
        44.3 92.2 82.9 71.2 96.8 93.8 92.2 63.5 87.3 60.3 67.9
        41.9 91.9 80.5 67.8 95.3 89.5 91.9 99.0 84.4 58.4 66.5
        41.6 91.8 81.3 68.2 95.7 90.7 92.0 98.8 95.3 58.9 66.4
        39.8 91.9 81.8 68.9 95.7 91.6 91.8 98.8 94.5 85.8 67.3
        40.6 92.2 81.3 70.5 94.8 90.5 91.9 98.7 93.9 85.3 80.2""",
        {"Transfer": 68.1, "Avg": 75.4, "Last": 83.6},
    ),
}


@pytest.mark.parametrize("row", MTIL)
def test_transfer_avg_and_last_of_published_matrices(row):
    text, published = MTIL[row]
    scores = np.array(text.split(), dtype=float).reshape(11, 11)
    metrics = matrix_of(scores, unseen=True).metrics()
    assert {name: metrics[name] for name in published} == pytest.approx(published, abs=0.06)  # all rounded to 0.1


def ends(last, new):
    """A matrix with these scores after the last task and right after a task's own training; nothing else counts here."""
    scores = np.zeros((len(last), len(last)))
    np.fill_diagonal(scores, new)
    scores[-1] = last
    return matrix_of(scores)


def test_forgetting_of_lora_on_coin():
    """Scores from arXiv 2403.08350 (LLaVA, LoRA); 28.74, 61.36 and 37.29 are what PCLR's paper makes of them."""
    new = [82.45, 49.99, 96.05, 56.40, 55.45, 31.27, 62.20, 57.08]
    last = [21.26, 28.74, 10.25, 36.78, 32.45, 0.83, 42.50, 57.08]
    metrics = ends(last, new).metrics()
    assert (metrics["AP"], metrics["New"]) == pytest.approx((28.74, 61.36), abs=0.006)
    assert metrics["Forgetting"] == pytest.approx(37.29, abs=0.006)
    assert metrics["BWT"] == -metrics["Forgetting"]
    assert -metrics["Forgetting"] * 7 / 8 == pytest.approx(-32.62, abs=0.006), "CoIN's own BWT is over all eight tasks"


def of_means(last, new):
    """A matrix of this last row whose mean of New is `new`: every task but the last has lost the same."""
    last = np.array(last)
    lost = (new - last.mean()) * len(last) / (len(last) - 1)
    return ends(last, [*(last[:-1] + lost), last[-1]])


# README of github.com/ECNU-SII/Continual-NExT, LLaVA-7B: scores after the last of 15 tasks | Avg, Forgetting, New.
NEXT = {
    "lora": "53.99 92.23 47.23 44.86 4.36 67.84 17.16 16.47 47.7 33.8 18.04 50.98 69.52 89.46 22.27 | 45.06 11.62 55.91",
    "ewc": "55.16 91.73 47.17 49.3 4.38 82.03 16.71 16.88 51.73 35.41 19 50.92 69.92 89.51 24.17 | 46.93 9.72 56.01",
    "moelora": "56 91.36 48.76 48.9 3.82 82.19 17.77 16.33 59.51 34.17 18.52 49.04 67.65 88.28 22.59 | 46.99 8.06 54.51",
}


@pytest.mark.parametrize("method", NEXT)
def test_forgetting_on_continual_next(method):
    last, means = (np.array(part.split(), dtype=float) for part in NEXT[method].split("|"))
    metrics = of_means(last, means[2]).metrics()
    assert metrics["AP"] == pytest.approx(means[0], abs=0.006)
    assert metrics["Forgetting"] == pytest.approx(means[1], abs=0.012)  # of means with two digits
    assert metrics["New"] == pytest.approx(means[2])


def test_forgetting_of_pclr_on_coin():
    """62.19, 3.39 and 65.16 in PCLR's paper (LLaVA-7B, eight tasks)."""
    assert of_means([62.19] * 8, 65.16).metrics()["Forgetting"] == pytest.approx(3.39, abs=0.012)
