"""What a run of `bench.gpu_evidence` found, in one table for a terminal: python -m bench.gpu_table RESULTS.JSON

What matters most comes last, where a terminal or a log that keeps the end still has it. A cell is a median ratio of paired
times, or WRONG for an implementation that was wrong or broke off; - where there is no figure: results.json says why.
"""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

PRINTED = 10_000  # characters of its end that bench.gpu_evidence prints
SHAPE = ("M", "K", "N", "T", "p")
Rows = list[dict]


def table(content: dict) -> str:
    stages = {name: stage.get("results", []) for name, stage in content["stages"].items()}
    linear = {each: only(stages.get("3", []), "linear", each) for each in ("both", "forward", "backward")}
    decode = only(stages.get("5", []), "decode")
    parts = [
        matrix("models, time / base", stages.get("7", []), "ratio_to_base", direction_of, ("case", "T", "tokens")),
        matrix("decode in a graph, time / PEFT", decode, "ratio_to_peft"),
        *(matrix(f"linear {each}, time / base", linear[each], "ratio_to_base") for each in ("backward", "forward")),
        matrix("each launch, % of its floor", only(stages.get("3", []), "launches"), "percent_of_floor", job),
        matrix("addmm_ in place, time / base", stages.get("2", []), "ratio_to_base", addmm),
        matrix("delta, time / by_phase", only(stages.get("4", []), "delta"), "ratio_to_by_phase", direction_of),
        matrix("decode in a graph, time / base", decode, "ratio_to_base"),
        matrix("linear both, time / PEFT", linear["both"], "ratio_to_peft"),
        matrix("linear both, time / base", linear["both"], "ratio_to_base"),
        ceilings(stages.get("1", []), content.get("under_load")),
        correctness(content["stages"]),
    ]
    return "\n".join(part for part in parts if part)


def only(rows: Rows, case: str, direction: str | None = None) -> Rows:
    """The rows of a case; those without a figure belong to every direction."""
    return [
        row for row in rows if row["case"] == case and row.get("direction") in (None, direction or row.get("direction"))
    ]


def correctness(stages: dict) -> str:
    """Tests passed of each backend, memory checkers, and every stage that did not end well."""
    backends: dict[str, list[int]] = {}
    checkers = []
    for row in stages.get("0", {}).get("results", []):
        for name, counts in row.get("backends", {}).items():
            sums = backends.setdefault(name, [0, 0])
            sums[0] += counts["passed"]
            sums[1] += counts["tests"]
        if "tests" not in row:
            checkers.append(f"{row['case']} {'ok' if row.get('exit_code') == 0 else 'FAILED'}")
    calls = {}
    for row in stages.get("first", {}).get("results", []):
        state = "FAILED" if "error" in row else "unavailable" if "unavailable" in row else "ok"
        calls[row["implementation"]] = state if calls.get(row["implementation"]) != "FAILED" else "FAILED"
    lines = ["first call: " + (", ".join(f"{name} {state}" for name, state in calls.items()) or "nothing ran")]
    if backends or checkers:
        tests = [f"{name} {passed} of {count}" for name, (passed, count) in sorted(backends.items())]
        lines.append("tests passed: " + ", ".join(tests + checkers))
    for name, stage in stages.items():
        if stage["status"] != "ok":
            lines.append(f"stage {name}: {stage['status']}")
            errors = [row for row in stage.get("results", []) if "error" in row]
            lines += [f"  {row['case']} {row.get('implementation', '')}: {row['error'][:110]}" for row in errors[:4]]
    return "\n".join(lines)


def ceilings(rows: Rows, load: dict | None) -> str:
    found = [row for row in rows if "copy_gb_per_s" in row]
    text = (
        f"ceilings: copy {found[0]['copy_gb_per_s']} GB/s, product {found[0]['matmul_tflop_per_s']} TFLOP/s"
        if found
        else ""
    )
    if load and load.get("busy"):
        clock, power = load.get("clocks.sm", {}), load.get("power.draw", {})
        text += f"; under load SM {clock.get('least')}..{clock.get('most')} MHz, {power.get('most')} W at most"
        text += f", throttled: {load.get('throttled') or 'never'}"
    return text


def addmm(row: dict) -> str:
    return f"{row.get('direction', '')} {row['implementation']}"


def job(row: dict) -> str:
    return f"{row['direction']} {row['job']}" if "job" in row else row.get("implementation", "")


def direction_of(row: dict) -> str:
    return f"{row['implementation']} {row['direction'][:3]}" if "direction" in row else row.get("implementation", "")


def matrix(
    title: str,
    rows: Rows,
    figure: str,
    column: Callable[[dict], str] = lambda row: row.get("implementation", ""),
    shape: Iterable[str] = SHAPE,
) -> str:
    """A line for each shape and a column for each implementation that has a figure anywhere, or was wrong."""
    shape = tuple(shape)
    cells: dict[tuple, dict[str, str]] = {}
    for row in rows:
        value = row.get(figure)
        if value is not None:
            text = f"{value['median']:.3f}" if isinstance(value, dict) else f"{value:.0f}"
        elif "error" in row:
            text = "WRONG"
        else:
            continue
        cells.setdefault(tuple(str(row.get(key, "")) for key in shape), {})[column(row)] = text
    names = list(dict.fromkeys(name for line in cells.values() for name in line if name))
    if not names:
        return ""
    heads = [name.replace("ours_", "").replace("_", " ") for name in names]
    lines = [[*shape, *heads]] + [[*key, *(line.get(name, "-") for name in names)] for key, line in cells.items()]
    widths = [max(len(line[at]) for line in lines) for at in range(len(lines[0]))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([f"\n{title}", *text])


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())))
