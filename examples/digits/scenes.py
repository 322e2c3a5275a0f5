"""Pictures of handwritten digits, and questions about them: the tasks, and the generic mix of the base model.

A picture is a black canvas of 32 x 32 pixels, four rows of four cells; a cell is empty or holds one of scikit-learn's
8 x 8 handwritten digits in one of four inks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

try:
    from sklearn.datasets import load_digits
except ModuleNotFoundError:
    raise SystemExit("the digits suite draws on scikit-learn's images; run pip install scikit-learn") from None

CELL, GRID = 8, 4
SIZE = CELL * GRID
CELLS = [f"{row}{column}" for row in "abcd" for column in "1234"]
INKS = {"red": (255, 64, 64), "green": (64, 255, 64), "blue": (96, 96, 255), "white": (255, 255, 255)}
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
ORDINALS = ["first", "second", "third", "fourth"]

Rng = np.random.Generator


@dataclass(frozen=True)
class Digit:
    """One digit of a picture: its value, ink and cell, and the 8 x 8 strokes in 0..1 that were drawn."""

    value: int
    ink: str
    row: int
    column: int
    strokes: np.ndarray

    @property
    def word(self) -> str:
        return WORDS[self.value]

    @property
    def cell(self) -> str:
        return CELLS[self.row * GRID + self.column]

    @property
    def box(self) -> str:
        """x0 y0 x1 y1 in pixels."""
        x, y = self.column * CELL, self.row * CELL
        return f"{x} {y} {x + CELL} {y + CELL}"


@dataclass(frozen=True)
class Pool:
    """The handwritten digits that pictures of one split are made of."""

    strokes: np.ndarray  # [n, 8, 8] in 0..1
    values: np.ndarray  # [n]

    def scene(self, rng: Rng, values: list[int], inks: list[str] | None = None) -> list[Digit]:
        """Digits of these values in different cells, in reading order."""
        cells = np.sort(rng.choice(GRID * GRID, len(values), replace=False))
        inks = inks or rng.choice(list(INKS), len(values)).tolist()
        return [
            Digit(
                v, ink, int(cell) // GRID, int(cell) % GRID, self.strokes[rng.choice(np.flatnonzero(self.values == v))]
            )
            for v, ink, cell in zip(values, inks, cells, strict=True)
        ]


def pools() -> tuple[Pool, Pool]:
    """The training and the test digits: every fifth of the 1,797 is for tests."""
    data = load_digits()
    test = np.arange(len(data.target)) % 5 == 0
    return tuple(Pool(data.images[part] / 16, data.target[part]) for part in (~test, test))


def draw(scene: list[Digit]) -> np.ndarray:
    """The picture of a scene, [32, 32, 3] uint8."""
    canvas = np.zeros((SIZE, SIZE, 3), np.uint8)
    for d in scene:
        y, x = d.row * CELL, d.column * CELL
        canvas[y : y + CELL, x : x + CELL] = np.round(d.strokes[..., None] * INKS[d.ink])
    return canvas


def _values(rng: Rng, n: int, distinct: bool = False) -> list[int]:
    return rng.choice(10, n, replace=not distinct).tolist()


Example = tuple[list[Digit], str, str]  # scene, question, answer
Task = Callable[[Pool, Rng], Example]


def _two(pool: Pool, rng: Rng) -> list[Digit]:
    """Two digits that differ in value and in ink."""
    inks = rng.choice(list(INKS), 2, replace=False).tolist()
    return pool.scene(rng, _values(rng, 2, distinct=True), inks)


def name(pool: Pool, rng: Rng) -> Example:
    scene = pool.scene(rng, _values(rng, 1))
    return scene, "Which number is written here?", scene[0].word


def count(pool: Pool, rng: Rng) -> Example:
    scene = pool.scene(rng, _values(rng, int(rng.integers(1, 7))))
    return scene, "How many numbers are there?", WORDS[len(scene)]


def parity(pool: Pool, rng: Rng) -> Example:
    scene = pool.scene(rng, _values(rng, 1))
    return scene, "Is this number even?", "no" if scene[0].value % 2 else "yes"


def compare(pool: Pool, rng: Rng) -> Example:
    scene = _two(pool, rng)
    return scene, "Which colour has the greater number?", max(scene, key=lambda d: d.value).ink


def locate(pool: Pool, rng: Rng) -> Example:
    scene = pool.scene(rng, _values(rng, 1))
    return scene, "Give the box around the number.", scene[0].box


def caption(pool: Pool, rng: Rng) -> Example:
    scene = pool.scene(rng, _values(rng, 2))
    return scene, "Describe the picture.", " and ".join(f"a {d.ink} {d.word}" for d in scene)


TASKS: dict[str, Task] = {f.__name__: f for f in (name, count, parity, compare, locate, caption)}


# Six more for the long suite. Most take pictures like those of an earlier task and its very answers, but for another
# question: what was learned for the one is wrong for the other.


def successor(pool: Pool, rng: Rng) -> Example:
    scene = pool.scene(rng, [int(rng.integers(9))])
    return scene, "What comes next when counting up?", WORDS[scene[0].value + 1]


def tally(pool: Pool, rng: Rng) -> Example:
    red, other = int(rng.integers(5)), int(rng.integers(1, 3))
    inks = ["red"] * red + rng.choice([ink for ink in INKS if ink != "red"], other).tolist()
    scene = pool.scene(rng, _values(rng, len(inks)), rng.permutation(inks).tolist())
    return scene, "Tally only red digits.", WORDS[red]


def upper(pool: Pool, rng: Rng) -> Example:
    scene = pool.scene(rng, _values(rng, 1))
    return scene, "Does it lie in the upper half?", "yes" if scene[0].row < GRID // 2 else "no"


def smaller(pool: Pool, rng: Rng) -> Example:
    scene = _two(pool, rng)
    return scene, "Name the ink of the lesser digit.", min(scene, key=lambda d: d.value).ink


def row(pool: Pool, rng: Rng) -> Example:
    scene = pool.scene(rng, _values(rng, 1))
    return scene, "On what line from the top does it stand?", ORDINALS[scene[0].row]


def greatest(pool: Pool, rng: Rng) -> Example:
    scene = pool.scene(rng, _values(rng, 2, distinct=True))
    return scene, "State the highest value shown.", str(max(d.value for d in scene))


LONG_TASKS = TASKS | {f.__name__: f for f in (successor, tally, upper, smaller, row, greatest)}


def _scene(pool: Pool, rng: Rng) -> list[Digit]:
    return pool.scene(rng, _values(rng, int(rng.integers(1, 5))))


def list_digits(pool: Pool, rng: Rng) -> Example:
    scene = _scene(pool, rng)
    return scene, "list digits", " ".join(str(d.value) for d in scene)


def list_inks(pool: Pool, rng: Rng) -> Example:
    scene = _scene(pool, rng)
    return scene, "list inks", " ".join(d.ink for d in scene)


def list_cells(pool: Pool, rng: Rng) -> Example:
    scene = _scene(pool, rng)
    return scene, "list cells", " ".join(d.cell for d in scene)


def look_up(pool: Pool, rng: Rng) -> Example:
    scene = _scene(pool, rng)
    d = scene[rng.integers(len(scene))]
    return scene, f"read {d.cell}", f"{d.ink} {d.value}"


def spell(pool: Pool, rng: Rng) -> Example:
    value = int(rng.integers(10))
    return ([], f"spell {value}", WORDS[value]) if rng.integers(2) else ([], f"numeral {WORDS[value]}", str(value))


def order(pool: Pool, rng: Rng) -> Example:
    a, b = _values(rng, 2, distinct=True)
    return [], f"maximum {a} {b}", str(max(a, b))


def corners(pool: Pool, rng: Rng) -> Example:
    d = pool.scene(rng, [0])[0]
    return [], f"corners {d.cell}", d.box


# What the base model is taught, and how often.
GENERIC: dict[Task, float] = {
    list_digits: 2,
    list_inks: 1,
    list_cells: 1,
    look_up: 1.5,
    order: 0.5,
    spell: 0.3,
    corners: 0.3,
}
