"""Plots that everybody can read: colours as colour-blind people see them, and labels that leave each other room."""

import itertools

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from lilora.reports import analysis_figures, figures
from lilora.reports.plotting import COLOURS, PLOT_STYLE, MethodStyle
from lilora.reports.runs import Run, by_method
from lilora.reports.scores import ScoreMatrix

# Of linear RGB, at full severity: Machado, Oliveira and Fernandes 2009.
VISIONS = {
    "normal": (np.eye(3), 30),
    "protanopia": (
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        24,
    ),
    "deuteranopia": (
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        24,
    ),
    "tritanopia": (
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
        20,
    ),
}
XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def linear(colours):
    rgb = np.array([matplotlib.colors.to_rgb(colour) for colour in colours])
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """CIELAB of linear RGB [n, 3], white D65."""
    x = np.clip(rgb, 0, 1) @ XYZ.T / np.array([0.95047, 1, 1.08883])
    f = np.where(x > 216 / 24389, np.cbrt(x), (24389 / 27 * x + 16) / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], -1)


@pytest.mark.parametrize("vision", VISIONS)
def test_twelve_colours_differ_however_they_are_seen(vision):
    """A distance of 2.3 in CIELAB is just noticed; these are ten times as far apart."""
    seen, least = VISIONS[vision]
    points = lab(linear(COLOURS) @ np.array(seen).T)
    for (i, a), (j, b) in itertools.combinations(enumerate(points), 2):
        assert np.linalg.norm(a - b) >= least, f"{COLOURS[i]} and {COLOURS[j]} look alike"


def test_every_colour_stands_out_from_white():
    luminance = linear(COLOURS) @ XYZ[1]
    assert (1.05 / (luminance + 0.05)).min() >= 3


def test_no_two_of_48_methods_look_the_same():
    styles = [MethodStyle.of(i) for i in range(48)]
    assert len(set(styles)) == 48
    for i, j in itertools.combinations(range(48), 2):
        a, b = styles[i], styles[j]
        assert a.colour != b.colour or (a.marker != b.marker and a.dash != b.dash and a.hatch != b.hatch)
    assert len({style.svg() for style in styles}) == 48


def rectangles(figure):
    """(text, corners [4, 2]) of everything that is written in a figure, in pixels; slanted text as it stands."""
    renderer, hidden, found = FigureCanvasAgg(figure).get_renderer(), set(), []
    figure.draw_without_rendering()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            drawn = axis._update_ticks() if axes.get_visible() else []
            hidden |= {label for tick in axis.majorTicks if tick not in drawn for label in (tick.label1, tick.label2)}
    for text in figure.findobj(Text):
        if not text.get_text().strip() or not text.get_visible() or text in hidden:
            continue
        if text.axes is not None and not text.axes.get_visible():
            continue
        box = flat = text.get_window_extent(renderer)
        if angle := text.get_rotation():
            text.set_rotation(0)
            flat = text.get_window_extent(renderer)
        turn = np.radians(angle)
        turned = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        half = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * (flat.width / 2, flat.height / 2)
        found.append((text.get_text(), half @ turned + ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2)))
    return found


def apart(a, b):
    """Whether a line parallel to a side of one of two rectangles divides them, a pixel of overlap allowed."""
    for corners in (a, b):
        for side in (corners[1] - corners[0], corners[3] - corners[0]):
            length = np.linalg.norm(side)
            p, q = a @ side / length, b @ side / length
            if p.max() <= q.min() + 1 or q.max() <= p.min() + 1:
                return True
    return False


def require_legible(figure):
    found = rectangles(figure)
    assert len(found) > 5
    width, height = figure.bbox.width, figure.bbox.height
    corners = np.array([points for _, points in found])  # [n, 4, 2]
    low, high = corners.min(1), corners.max(1)
    for (text, _), a, b in zip(found, low, high, strict=True):
        assert min(a) >= -1, f"{text!r} leaves the figure"
        assert b[0] <= width + 1, f"{text!r} leaves the figure"
        assert b[1] <= height + 1, f"{text!r} leaves the figure"
    for i, (text, own) in enumerate(found):
        near = np.flatnonzero(((low[i] < high) & (low < high[i])).all(1))
        for j in near[near > i]:
            assert apart(own, corners[j]), f"{text!r} and {found[j][0]!r} overprint"


def methods_of(size, count):
    tasks = [f"a-task-with-a-rather-long-name-{i}" for i in range(size)]
    rng, runs = np.random.default_rng(0), []
    for number in range(count):
        matrix = ScoreMatrix(tasks)
        for j, after in enumerate(tasks):
            for task in tasks[: j + 1]:
                matrix.set(after, task, 100 if rng.random() < 0.2 else rng.uniform(0, 100), rng.uniform())
        sizes = {"parameters": [1e6 * (i + 1) for i in range(size)], "ranks": [64] * size}
        losses = {task: {"train": [(10 * step, 1e4 / step) for step in range(1, 9)]} for task in tasks}
        name = f"method-{number}-with-a-long-label-of-its-own"
        runs.append(Run(name, 0, matrix, extra={"sizes": sizes}, losses=losses))
    return by_method(runs)


# Most tasks of a plot: above CROWDED, panels look the same whatever their number.
MOST = {"curves": 17, "losses": 17, "memory": 50, "summary": 50}


@pytest.mark.parametrize(
    "plot, size, count", [(plot, *of) for plot, most in MOST.items() for of in ((3, 2), (12, 14), (most, 14))]
)
def test_labels_of_a_plot_of_methods_leave_each_other_room(plot, size, count):
    with matplotlib.rc_context(PLOT_STYLE):
        require_legible(getattr(figures, plot)(methods_of(size, count)))


@pytest.mark.parametrize("size", [3, 16, 17, 50])
def test_labels_of_a_matrix_leave_each_other_room(size):
    (method,) = methods_of(size, 1)
    with matplotlib.rc_context(PLOT_STYLE):
        require_legible(figures.heatmap(method))
        if size < 50:
            require_legible(figures.routing({task: dict.fromkeys(method.tasks, 7) for task in method.tasks}))


@pytest.mark.parametrize("size", [3, 50])
def test_labels_of_an_analysis_leave_each_other_room(size):
    tasks = [f"a-task-with-a-rather-long-name-{i}" for i in range(size)]
    layers = [f"model.language_model.layers.{i}.mlp.{name}_proj" for name in ("gate", "up", "down") for i in range(4)]
    spans = {"row spaces of A": np.full(12, 30.0), "column spaces of B": np.full(12, 20.0)}
    shares = np.random.default_rng(0).uniform(size=(3, size, size))
    titles = ("redundant rows a of A", "redundant columns b of B", "redundant ranks b aᵀ")
    matrices = [(title, x, "12.3") for title, x in zip(titles, shares, strict=True)]
    drift = {factor: x[:, :1] * [1, 2, 3, 4] for factor, x in zip(("A", "B0"), shares, strict=False)}
    with matplotlib.rc_context(PLOT_STYLE):
        require_legible(analysis_figures.heatmaps(tasks, matrices[: 3 if size < 50 else 2]))
        require_legible(analysis_figures.depth(layers, spans, spans))
        require_legible(analysis_figures.drift_curves(tasks, drift))
