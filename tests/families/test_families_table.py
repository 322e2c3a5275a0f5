"""README's table of families shows the outcome of every cell of the matrix, and no other cell."""

import json
from pathlib import Path

from test_families_matrix import CELLS, REFUSED

ROOT = Path(__file__).parents[2]


def test_the_committed_outcomes_are_those_of_the_matrix():
    recorded = json.loads((ROOT / "bench" / "results" / "families.json").read_text())["families"]
    cells = {(family, behaviour): outcome for family, row in recorded.items() for behaviour, outcome in row.items()}
    wanted = {cell: f"refused: {REFUSED[cell]}" if cell in REFUSED else "passed" for cell in CELLS}
    assert cells == wanted, "run `make families`, which records the outcome of every cell"
