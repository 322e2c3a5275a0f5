"""What all plots share: how methods look, matrices of cells, labels that leave each other room."""

import io
import math
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle
from matplotlib.path import Path as Outline
from matplotlib.ticker import MaxNLocator

# Found by a search for the largest least distance in CIELAB as seen with protanopia, deuteranopia and tritanopia, among
# colours with a contrast of at least 3 to white; farthest first.
COLOURS = (
    "#336688",
    "#dd7700",
    "#bb55ff",
    "#664433",
    "#1100aa",
    "#660044",
    "#aa8855",
    "#8800ff",
    "#993300",
    "#ff44cc",
    "#779988",
    "#552288",
)
MARKERS = "osD^vPX*<>ph"
DASHES = ("solid", "dashed", "dotted", "dashdot")
HATCHES = ("", "////", "....", "xxxx")  # of bars, where lines have dashes
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
CHARACTER = 0.085  # inches that one takes at font size 10, on average
CROWDED = 16  # more tasks than this get smaller cells


class MethodStyle(NamedTuple):
    """How a method looks; 48 of them differ, twelve in colour alone and the others in marker and dash, too."""

    colour: str
    marker: str
    dash: str
    hatch: str

    @classmethod
    def of(cls, index: int) -> "MethodStyle":
        around = index // len(COLOURS) % len(DASHES)
        marker = MARKERS[(index + around) % len(MARKERS)]
        return cls(COLOURS[index % len(COLOURS)], marker, DASHES[around], HATCHES[around])

    def line(self) -> dict[str, object]:
        """Arguments of `Axes.plot`."""
        return {"color": self.colour, "marker": self.marker, "linestyle": self.dash, "linewidth": 1.8}

    def svg(self) -> str:
        """The line as a picture of 36 by 12 pixels, for the text of a page; says nothing to a screen reader."""
        gaps = {"solid": "", "dashed": "5 2", "dotted": "2 2", "dashdot": "6 2 2 2"}[self.dash]
        style = MarkerStyle(self.marker)
        outline = style.get_path().transformed(style.get_transform().scale(9, -9).translate(18, 6))
        return (
            f'<svg class="swatch" aria-hidden="true" width="36" height="12"><path d="M1 6H35" stroke="{self.colour}" '
            f'stroke-width="2" stroke-dasharray="{gaps}"/><path d="{_svg_path(outline)}" fill="{self.colour}"/></svg>'
        )


def _svg_path(outline: Outline) -> str:
    letters = {
        Outline.MOVETO: "M",
        Outline.LINETO: "L",
        Outline.CURVE3: "Q",
        Outline.CURVE4: "C",
        Outline.CLOSEPOLY: "Z",
    }
    return "".join(
        letters[code] + ("" if code == Outline.CLOSEPOLY else " ".join(f"{x:.1f}" for x in points))
        for points, code in outline.iter_segments()
    )


def cell_colours(score: float) -> tuple[str, str]:
    """Background and text colour of a matrix cell; a missing one is grey."""
    if math.isnan(score):
        return "#d9d9d9", "#000000"
    red, green, blue, _ = colour = matplotlib.colormaps["viridis"](score / 100)
    luminance = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2  # WCAG: black reads better above 0.18
    return matplotlib.colors.to_hex(colour), "#000000" if luminance > 0.18 else "#ffffff"


def png(figure: Figure) -> bytes:
    """As `Figure.savefig` writes it, which draws a figure with a layout twice."""
    data = io.BytesIO()
    figure.set_dpi(matplotlib.rcParams["savefig.dpi"])
    FigureCanvasAgg(figure).print_png(data)
    return data.getvalue()


def shortened(name: str, limit: int = 24) -> str:
    """`name` with its middle left out, where it is longer than `limit` characters: names often differ at their ends."""
    if len(name) <= limit:
        return name
    return f"{name[: limit // 2]}…{name[len(name) - (limit - 1) // 2 :]}"


def matrix_size(rows: int, columns: int) -> tuple[float, float]:
    """Inches that the cells of a matrix take, width and height; more than CROWDED tasks get smaller ones."""
    width, height = (0.75, 0.5) if max(rows, columns) <= CROWDED else (0.44, 0.26)
    return width * columns, height * rows


def draw_matrix(axes: Axes, rows: list[str], columns: list[str], cells: list[list[tuple[str, float] | None]]) -> None:
    """Cells given as (text, score in points), None for an empty one, in axes of about `matrix_size` inches."""
    font = _font(max(len(rows), len(columns)))
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    for j, row in enumerate(cells):
        for i, cell in enumerate(row):
            if cell is None:
                continue
            background, colour = cell_colours(cell[1])
            square = matplotlib.patches.Rectangle((i - 0.5, j - 0.5), 1, 1, facecolor=background, edgecolor="white")
            axes.add_artist(square)  # add_patch, slower, would also widen the limits
            axes.text(i, j, cell[0], ha="center", va="center", color=colour, fontsize=font, in_layout=False)
    name_ticks(axes, columns)
    axes.set_yticks(range(len(rows)), [shortened(name) for name in rows], fontsize=font)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def name_ticks(axes: Axes, names: list[str]) -> None:
    """Names below the x axis at 0, 1, ..., slanted."""
    ticks, font = [shortened(name) for name in names], _font(len(names))
    axes.set_xticks(range(len(names)), ticks, rotation=35, ha="right", rotation_mode="anchor", fontsize=font)


def _font(tasks: int) -> float:
    return 10 if tasks <= CROWDED else 7


def draw_scale(figure: Figure, axes: Axes | np.ndarray) -> None:
    """What the colours of a matrix's cells mean."""
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, 100), "viridis")
    figure.colorbar(scale, ax=axes, shrink=0.8, aspect=40).outline.set_visible(False)


def whole_ticks(axes: Axes, most: int = 6) -> None:
    """At most so many ticks on the x axis, at whole numbers."""
    axes.xaxis.set_major_locator(MaxNLocator(most, integer=True, min_n_ticks=1))


def panels_of(titles: list[str], legend: list[str], **shared: object) -> tuple[Figure, np.ndarray]:
    """A figure with a panel per title, and room for a legend of these labels above them."""
    columns = min(3 if len(titles) <= CROWDED else 4, len(titles))
    rows = math.ceil(len(titles) / columns)
    width = max(9.3 / 3 if columns < 4 else 9.6 / 4, 4.5 / columns)
    size = (width * columns, 2.0 * rows + 0.5 + legend_height(width * columns, legend))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, **shared).flatten()
    for axes, title in zip(panels, titles, strict=False):
        axes.set_title(shortened(title, int((width - 0.5) / CHARACTER)))
        axes.grid(axis="y", color="0.88")
    for axes in panels[len(titles) :]:
        axes.set_visible(False)
    return figure, panels[: len(titles)]


def _legend_columns(width: float, labels: list[str]) -> int:
    longest = max((len(shortened(label)) for label in labels), default=0)
    return max(1, min(len(labels), int(width / (0.75 + CHARACTER * longest))))


def legend_height(width: float, labels: list[str]) -> float:
    """Inches of a legend of these labels above a figure of this width in inches."""
    return 0.1 + 0.22 * math.ceil(len(labels) / _legend_columns(width, labels))


def draw_legend(figure: Figure, axes: Axes) -> None:
    """A legend of the lines of `axes` above the figure."""
    handles, labels = axes.get_legend_handles_labels()
    columns = _legend_columns(figure.get_figwidth(), labels)
    names = [shortened(label) for label in labels]
    figure.legend(handles, names, loc="outside upper left", ncols=columns, frameon=False)
