"""Results of a folder as RESULTS.md with every figure, and as plots: python -m bench.report [FOLDER ...]

Without folders: every folder of bench/results that has a results.json.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib.pyplot as plt

from .compare import REGISTRY
from .peers import OURS

RESULTS = Path(__file__).parent / "results"
TITLES = {name: peer.title for name, peer in REGISTRY.items()} | {
    "peft_split": "PEFT LoRA, a micro-batch per task",
}
COLOURS = {
    "base": "#888888",
    "ours": "#c8102e",
    **{name: plt.cm.Reds(0.75 - 0.6 * at / len(OURS)) for at, name in enumerate(OURS[1:])},
    "formula": "#9467bd",
    "formula_compiled": "#c5b0d5",
    "peft": "#1f77b4",
    "peft_names": "#17becf",
    "peft_default": "#aec7e8",
    "peft_compiled": "#6baed6",
    "grouped_mm": "#2ca02c",
    "merged": "#ff7f0e",
}
SHAPE = ("case", "M", "K", "N", "hidden", "layers", "tokens", "R", "S", "p", "dtype", "training")


def load(folder: Path) -> tuple[dict, list[dict]]:
    """(environment, rows) of results.json, written by `pytest bench/` or by stages on a GPU."""
    content = json.loads((folder / "results.json").read_text())
    if "pretended" in str(content["environment"]["device"]):
        raise SystemExit(f"{folder} has results of a rehearsal: its GPU was pretended, so they may not be shown")
    if "results" in content:
        return content["environment"], content["results"]
    stages = content["stages"].values()
    return content["environment"], [row for stage in stages for row in stage.get("results", [])]


def folders() -> list[Path]:
    return sorted(path.parent for path in RESULTS.glob("*/results.json"))


def only(rows: Iterable[dict], **wanted) -> list[dict]:
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def shape(row: dict) -> str:
    """M8192 4096->11008 T8 p0.05 bfloat16"""
    size = f"M{row['M']} {row['K']}->{row['N']}" if "K" in row else f"hidden {row.get('hidden', '')}"
    if "tokens" in row:
        size += f", {row['samples']} x {row['tokens']} tokens"
    elif "K" not in row and "M" in row:
        size += f", M{row['M']}"
    parts = [size, f"r{row['R']}" if "R" in row else "", f"p{row['p']}" if row.get("p") else "", row.get("dtype", "")]
    return " ".join(part for part in parts if part)


def kind(row: dict) -> str:
    mode = {True: ", training", False: ", inference"}.get(row.get("training"), "")
    return f"{row['case']}{mode}"


# --- RESULTS.md -------------------------------------------------------------------------------------------------------

COLUMNS: dict[str, Callable[[dict], str]] = {
    "implementation": lambda r: TITLES.get(r["implementation"], r["implementation"]),
    "T": lambda r: str(r.get("T", "")),
    "direction": lambda r: r.get("direction", ""),
    "us": lambda r: interval(r.get("us"), 0),
    "/ base": lambda r: interval(r.get("ratio_to_base"), 3),
    "/ PEFT": lambda r: interval(r.get("ratio_to_peft"), 3),
    "overhead removed": lambda r: percent(r.get("overhead_removed")),
    "% of floor": lambda r: number(r.get("percent_of_floor"), 0),
    "GB/s": lambda r: number(r.get("gb_per_s"), 1),
    "% of read": lambda r: number(r.get("percent_of_read"), 0),
    "TFLOP/s": lambda r: number(r.get("tflop_per_s"), 3),
    "saved MiB": lambda r: mib(r.get("saved_bytes")),
    "peak MiB": lambda r: mib(r.get("peak_bytes")),
    "on disk MiB": lambda r: mib(r.get("bytes_on_disk")),
    "tokens/s": lambda r: number(r.get("tokens_per_s"), 1),
    "error": lambda r: number_e(r.get("largest_error", r.get("rms_error"))),
}


def interval(spread: dict | None, digits: int) -> str:
    if spread is None:
        return ""
    return f"{spread['median']:.{digits}f} ({spread['p20']:.{digits}f} .. {spread['p80']:.{digits}f})"


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def number_e(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def mib(bytes_: int | None) -> str:
    return "" if bytes_ is None else f"{bytes_ / 2**20:.2f}"


def table(rows: list[dict], columns: Iterable[str] = COLUMNS) -> list[str]:
    """Markdown, without the columns that are empty in every row."""
    cells = {name: [COLUMNS[name](row) for row in rows] for name in columns}
    cells = {name: values for name, values in cells.items() if any(values)}
    aligned = ["---" if name in ("implementation", "direction") else "--:" for name in cells]
    lines = [f"| {' | '.join(cells)} |", f"|{'|'.join(aligned)}|"]
    return lines + [f"| {' | '.join(values)} |" for values in zip(*cells.values(), strict=True)]


LEVEL = 1.02  # median ratio up to which ours is ahead or level


def peer_row(ours: dict, name: str, rows: list[dict]) -> dict | None:
    """The figures of a peer in our cell; for a mixed batch PEFT may have trained one task."""
    same = {key: ours.get(key) for key in (*SHAPE, "direction")}
    close = [row for row in only(rows, implementation=name, **same) if "us" in row]
    other = close[0] if close and name == ours.get("against") else None
    return next((row for row in close if row.get("T") == ours.get("T")), other)


def over_peer(ours: dict, peer: dict) -> tuple[dict, str]:
    """Our time over a peer's, round by round; or, marked ~, the ratio of two medians with the widest interval."""
    name = peer["implementation"]
    paired = ours.get("ratio_to_peers", {}).get(name) or (ours.get("against") == name and ours["ratio_to_peft"])
    if paired:
        return paired, ""
    a, b = (row.get("ratio_to_base", row["us"]) for row in (ours, peer))
    return {at: a[at] / b[other] for at, other in (("median", "median"), ("p20", "p80"), ("p80", "p20"))}, "~ "


def losses(rows: list[dict]) -> list[str]:
    """The cells in which the formula in PyTorch or PEFT takes less time than ours."""
    count, lost = 0, []
    for ours in only(rows, implementation="ours"):
        for name in (name for name in TITLES if name.startswith(("formula", "peft")) and "us" in ours):
            if (peer := peer_row(ours, name, rows)) is None:
                continue
            ratio, mark = over_peer(ours, peer)
            count += 1
            if ratio["median"] > LEVEL:
                tasks = f" T{ours['T']}" if "T" in ours else ""
                cell = f"{kind(ours)}: {shape(ours)}{tasks}, {ours['direction']} | {TITLES[name]}"
                word = "unclear" if ratio["p20"] <= 1 <= ratio["p80"] else ""
                lost.append((word, -ratio["median"], f"| {cell} | {mark}{interval(ratio, 3)} | {word} |"))
    if not lost:
        return [f"In none of {count} cells does the formula in PyTorch or PEFT take less time than ours."]
    return [
        f"In {len(lost)} of {count} cells the formula in PyTorch or PEFT takes less time than ours, in "
        f"{sum(bool(each[0]) for each in lost)} of them unclearly so. A cell is a case, a direction and a peer; the ratio is "
        f"our time over the peer's, and ours is ahead or level up to a median of {LEVEL}. Unclear: p20 and p80 lie on both "
        "sides of 1. ~: no rounds of this pair were kept; it is the ratio of two medians with the widest interval.",
        "",
        "| cell | peer | ours / peer | |",
        "|---|---|--:|---|",
        *(line for *_, line in sorted(lost)),
    ]


def document(environment: dict, rows: list[dict]) -> str:
    """Where a peer is faster, then every figure, case by case; what could not run, with its reason."""
    lines = [f"# {environment['device']}", "", *losses(rows)]
    lines += ["", "Written by `python -m bench.report` from `results.json`.", ""]
    lines += [f"- {key}: {value}" for key, value in environment.items() if value not in (None, "", [])]
    lines += [
        "",
        "Times are medians with p20 and p80 of alternating rounds, ratios are taken round by round. Floor: the least time for "
        "the bytes and operations that have to be, at the copy and product rates measured in the same process. % of read: GB/s "
        "over the rate of reading alone, measured there too. Overhead removed: "
        "(PEFT - it) / (PEFT - base), PEFT by adapter_names in a mixed inference, else one adapter for all rows. Error: largest "
        "error of outputs and gradients against fp64, as a share of the largest value (whole models: RMS of the outputs).",
    ]
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for row in rows:
        if "implementation" in row:
            groups[kind(row), shape(row)].append(row)
    for (title, size), found in groups.items():
        lines += ["", f"## {title}: {size}", ""]
        timed = [row for row in found if "unavailable" not in row and "error" not in row]
        lines += table(timed) if timed else []
        reasons = {
            (row["implementation"], row.get("unavailable") or row.get("error")): row
            for row in found
            if row not in timed
        }
        lines += [""] if reasons else []
        lines += [f"- {TITLES.get(name, name)}: {reason}" for name, reason in reasons]
    return "\n".join(lines) + "\n"


# --- plots ------------------------------------------------------------------------------------------------------------


def bars(rows: list[dict], path: Path) -> None:
    """Ratio to the frozen base of every peer, for the cases with most peers."""
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for row in rows:
        compared = (
            "ratio_to_base" in row and row["implementation"] != "base" and row["case"].startswith(("linear", "decode"))
        )
        if compared and row["direction"] == ("both" if row["training"] else "forward"):
            groups[kind(row), shape(row), row["T"]].append(row)
    chosen = sorted(groups.items(), key=lambda group: -len(group[1]))[:6]
    if not chosen:
        return
    figure, axes = plt.subplots(2, 3, figsize=(15, 7), layout="constrained")
    for axis in axes.flat:
        axis.set_visible(False)
    for axis, ((title, size, tasks), found) in zip(axes.flat, chosen, strict=False):
        axis.set_visible(True)
        found = sorted(found, key=lambda row: -row["ratio_to_base"]["median"])
        names = [row["implementation"] for row in found]
        middle = [row["ratio_to_base"]["median"] for row in found]
        error = [
            [max(0, row["ratio_to_base"]["median"] - row["ratio_to_base"]["p20"]) for row in found],
            [max(0, row["ratio_to_base"]["p80"] - row["ratio_to_base"]["median"]) for row in found],
        ]
        axis.barh(names, middle, xerr=error, color=[COLOURS.get(name, "#bbbbbb") for name in names])
        axis.axvline(1, color="black", linewidth=1)
        axis.set_title(f"{title}\n{size}, T {tasks}", fontsize=9)
        axis.set_xlabel("time / frozen base")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def lines_of(axis, rows: list[dict], over: str, value: Callable[[dict], float | None], ylabel: str) -> None:
    series: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        found = value(row) if over in row else None
        if found is not None:
            series[row["implementation"]].append((row[over], found))
    for name, points in series.items():
        xs, ys = zip(*sorted(points), strict=True)
        axis.plot(xs, ys, marker="o", label=name, color=COLOURS.get(name))
    axis.set_xscale("log", base=2)
    axis.set_xlabel({"M": "rows M", "T": "tasks T"}[over])
    axis.set_ylabel(ylabel)
    axis.grid(alpha=0.3)
    if series:
        axis.legend(fontsize=8)


def ratio_of(row: dict) -> float | None:
    return row["ratio_to_base"]["median"] if "ratio_to_base" in row else None


def over_rows(rows: list[dict], path: Path) -> None:
    """Ratio to the base over M: inference of mixed batches, and training steps."""
    linear = [row for row in rows if row["case"].startswith("linear") and row.get("dtype") != "float16"]
    if not linear:
        return
    most = max(
        {(row["K"], row["N"], row["dtype"]) for row in linear},
        key=lambda k: len(only(linear, K=k[0], N=k[1], dtype=k[2])),
    )
    linear = only(linear, K=most[0], N=most[1], dtype=most[2])
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    cases = (
        (False, "forward", "inference, up to 8 tasks mixed"),
        (True, "both", "forward and backward, one task, dropout 0.05"),
    )
    for axis, (training, direction, title) in zip(axes, cases, strict=True):
        found = only(linear, training=training, direction=direction)
        found = only(found, T=1, p=0.05) if training else [row for row in found if row["T"] == min(row["M"], 8)]
        lines_of(axis, [row for row in found if row["implementation"] != "base"], "M", ratio_of, "time / frozen base")
        axis.set_title(f"{title}\n{most[0]} -> {most[1]}, {most[2]}", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def growth(rows: list[dict], path: Path) -> None:
    """How costs grow with tasks and rows."""
    if not only(rows, case="mixed batch over tasks"):
        return
    panels = [
        ("mixed batch over tasks", "T", lambda r: r["us"]["median"] / 1e3 if "us" in r else None, "ms, 64 rows"),
        ("evaluation over tasks", "T", lambda r: r["us"]["median"] / 1e6 if "us" in r else None, "s, 4 samples a task"),
        ("bank over tasks", "T", lambda r: r["bytes_on_disk"] / 2**20, "MiB on disk"),
        ("bank over tasks", "T", lambda r: r["us"]["median"] / 1e6, "s to load all"),
        ("memory of a step over rows", "M", lambda r: r["saved_bytes"] / 2**20, "MiB saved for backward"),
        ("memory of a step over rows", "M", lambda r: r["peak_bytes"] / 2**20, "MiB at most"),
    ]
    figure, axes = plt.subplots(2, 3, figsize=(15, 7.5), layout="constrained")
    for axis, (case, over, value, label) in zip(axes.T.flat, panels, strict=True):
        lines_of(axis, only(rows, case=case), over, value, label)
        axis.set_ylim(bottom=0)
        axis.set_title(case, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def roofline(rows: list[dict], path: Path) -> None:
    """Rate against operations per byte, under the ceilings that the floors of the rows mean."""
    found = [
        row
        for row in rows
        if row.get("flops") and row.get("floor_us") and row.get("implementation") in ("base", "ours")
    ]
    found = [row for row in found if row["direction"] in ("forward", "both")]
    if not found:
        return
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name in ("base", "ours"):
        own = only(found, implementation=name)
        axis.scatter(
            [row["flops"] / row["bytes"] for row in own], [row["flops"] / row["us"]["median"] / 1e6 for row in own],
            label=name, color=COLOURS[name], s=18, zorder=3,
        )  # fmt: skip
    for dtype in sorted({row["dtype"] for row in found}):
        own = only(found, dtype=dtype)
        points = sorted((row["flops"] / row["bytes"], row["flops"] / row["floor_us"] / 1e6) for row in own)
        axis.plot(*zip(*points, strict=True), linewidth=1, label=f"ceiling, {dtype}", zorder=1)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("operations per byte that have to be")
    axis.set_ylabel("TFLOP/s")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def decode_lines(rows: list[dict]) -> list[dict]:
    """The frozen layer by F.linear and by our kernels, ours with one task and with up to eight, of the shape measured first."""
    streamed = [row for row in only(rows, implementation="base_streamed") if "us" in row]
    if not streamed:
        return []
    same = {key: streamed[0][key] for key in ("case", "K", "N", "dtype", "training")}
    few = [row for row in only(rows, **same) if "us" in row and row["M"] <= max(other["M"] for other in streamed)]
    mixed = [row for row in few if row["T"] == min(row["M"], 8)]
    lines = [row for row in mixed if row["implementation"] in ("base", "base_streamed")]
    for name, found in (("ours, one task", only(few, T=1)), ("ours, up to 8 tasks", mixed)):
        lines += [row | {"implementation": name} for row in only(found, implementation="ours")]
    return lines


def decode(rows: list[dict], path: Path) -> None:
    """Time and share of the read rate over few rows."""
    lines = decode_lines(rows)
    if not lines:
        return
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    lines_of(axes[0], lines, "M", lambda row: row["us"]["median"] / 1e3, "ms")
    lines_of(axes[1], lines, "M", lambda row: row["percent_of_read"], "% of the rate of reading alone")
    for axis in axes:
        axis.set_ylim(bottom=0)
    figure.suptitle("{case}, {K} -> {N}, {dtype}".format(**lines[0]), fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


PLOTS = {"bars": bars, "rows": over_rows, "decode": decode, "growth": growth, "roofline": roofline}


def write(folder: Path) -> None:
    environment, rows = load(folder)
    (folder / "RESULTS.md").write_text(document(environment, rows))
    rows = [row for row in rows if "implementation" in row]
    for name, plot in PLOTS.items():
        plot(rows, folder / f"{name}.png")


if __name__ == "__main__":
    plt.switch_backend("agg")
    for folder in map(Path, sys.argv[1:]) if sys.argv[1:] else folders():
        write(folder)
        print(f"{folder}: RESULTS.md and plots are written")
