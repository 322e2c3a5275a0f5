"""What all plots share: colours, markers, the look of axes and of the cells of a matrix."""

import io
import math

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#4D4D4D", "#F0E442"]  # Okabe-Ito
MARKERS = "osD^vPX*"
PLOT_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "savefig.dpi": 150,
    "text.parse_math": False,  # a label is no formula
}


def cell_colours(score: float) -> tuple[str, str]:
    """Background and text colour of a matrix cell; a missing one is grey."""
    if math.isnan(score):
        return "#d9d9d9", "#000000"
    red, green, blue, _ = colour = matplotlib.colormaps["viridis"](score / 100)
    luminance = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2  # WCAG: black reads better above 0.18
    return matplotlib.colors.to_hex(colour), "#000000" if luminance > 0.18 else "#ffffff"


def png(figure: Figure) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()


def draw_matrix(axes: Axes, tasks: list[str], rows: list[list[tuple[str, float] | None]]) -> None:
    """Cells given as (text, score in points), None for an empty one; a row and a column per task."""
    size = len(tasks)
    axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5))
    for j, row in enumerate(rows):
        for i, cell in enumerate(row):
            if cell is None:
                continue
            background, colour = cell_colours(cell[1])
            axes.add_patch(
                matplotlib.patches.Rectangle((i - 0.5, j - 0.5), 1, 1, facecolor=background, edgecolor="white")
            )
            axes.text(i, j, cell[0], ha="center", va="center", color=colour, in_layout=False)
    axes.set_xticks(range(size), tasks, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(size), tasks)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def draw_scale(figure: Figure, axes: Axes | list[Axes]) -> None:
    """What the colours of a matrix's cells mean."""
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, 100), "viridis")
    figure.colorbar(scale, ax=axes, shrink=0.8).outline.set_visible(False)


def line_style(index: int) -> dict[str, object]:
    """How the lines of the method of this number look: 24 of them look different."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": ("-", "--", ":")[index // len(COLOURS) % 3],
        "linewidth": 1.8,
    }
