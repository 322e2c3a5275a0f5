"""The counts of launches and bytes: what is counted, and that the composed plan stays near the floor."""

import json
from pathlib import Path

import pytest
import torch

from bench import plans

RESULTS = Path(plans.__file__).parent / "results/plans"


def test_the_counter_counts_what_computes_and_its_bytes():
    x, w = torch.empty(8, 4, device="meta"), torch.empty(6, 4, device="meta")
    with plans.Counter() as seen:
        y = torch.mm(x, w.T)
        y.addmm_(x, w.T)
        torch.empty_like(y)
    assert seen.launches == 2
    assert seen.bytes == 4 * ((32 + 24 + 48) + (48 + 32 + 24 + 48))


@pytest.fixture(scope="module")
def rows():
    return list(plans.rows())


def test_the_committed_table_is_what_the_script_counts(rows):
    assert json.loads((RESULTS / "plans.json").read_text()) == rows


def test_the_composed_plan_stays_near_the_floor(rows):
    found = [row for row in rows if row["plan"] == "composed"]
    assert len(found) == 18
    assert max(row[f"{direction}_ratio"] for row in found for direction in plans.DIRECTIONS) <= 3.3
    assert max(row["forward_launches"] for row in found) <= 13
    assert max(row["backward_launches"] for row in found) <= 36
