"""The tables of the suites, from the files that their runs have left."""

import json
from collections.abc import Iterable
from contextlib import suppress

import matplotlib
import numpy as np

from lilora.continual.tuning import SEED
from lilora.errors import UserError
from lilora.reports.figures import memory, summary
from lilora.reports.plotting import PLOT_STYLE, png
from lilora.reports.runs import MethodRuns, Run, Spread, by_method

from .suite import Suite

SCORES = ("New", "AP", "Forgetting")


def scores(suite: Suite, labels: Iterable[str] | None = None) -> dict[str, MethodRuns]:
    """The runs of a suite that have left their files, by label; FileNotFoundError while there are none.

    Raises UserError for runs of one label with different options.
    """
    found = []
    for label in labels or suite.runs:
        files = [file for seed in suite.seeds if (file := suite.file(label, seed)).exists()]
        if not files:
            continue
        if any(
            json.loads(file.read_text())["options"] != json.loads(files[0].read_text())["options"] for file in files
        ):
            raise UserError(
                f"bench/results/{suite.name}: the runs of {label} have different options; run the older again"
            )
        found.append(label)
    if not found:
        raise FileNotFoundError(2, "no runs", f"bench/results/{suite.name}")
    orders: dict[tuple[str, ...], list[Run]] = {}
    for run in suite.finished(found):
        orders.setdefault(tuple(run.matrix.tasks), []).append(run)
    methods = {method.name: method for runs in orders.values() for method in by_method(runs)}
    return {label: methods[label] for label in found}


def spreads(method: MethodRuns) -> list[str]:
    """Mean and deviation of the scores that the tables show of a method."""
    return [str(method.metrics[name]) for name in SCORES]


def made_on(suite: Suite, labels: Iterable[str]) -> str:
    """The machines that the runs were made on."""
    files = (suite.file(label, seed) for label in labels for seed in suite.seeds)
    return ", ".join(
        dict.fromkeys(json.loads(file.read_text())["environment"]["device"] for file in files if file.exists())
    )


def per_task(method: MethodRuns) -> str:
    return f"{method.params_per_task:,}" if method.params_per_task else "none"


def suite_table(name: str, command: str, more: str = "", picture: bool = False) -> str:
    """Methods of a suite, mean and deviation over seeds, each at its learning rate."""
    suite = Suite.read(name)
    methods = scores(suite)
    with_nll = any(method.nlls() for method in methods.values())
    columns = ["rate", *SCORES, *["nats per token"] * with_nll, "parameters per task", "seeds"]
    lines = [f"| method | {' | '.join(columns)} |", "|---|" + "--:|" * len(columns)]
    for label, method in methods.items():
        rate = method.runs[0].extra["train"]["learning_rate"]
        nlls = method.nlls()
        likelihood = ([f"{nlls[1]:.2f}"] if nlls else ["n/a"]) if with_nll else []
        cells = [f"{rate:g}", *spreads(method), *likelihood, per_task(method), str(len(method.runs))]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    first = next(iter(methods.values()))
    likelihood = "; nats per token: how unlikely the references are after the last task" if with_nll else ""
    rates = ""
    if all("lr" not in suite.options | options for options in suite.runs.values()):
        found = {label: suite.rate_of.get(label, label) for label in methods}
        others = ", ".join(f"{label} that of {of}" for label, of in found.items() if label != of)
        rates = (
            f" Each method has its own rate, the best of {len(suite.rates)} by `lilora tune` on seed {SEED}, scored "
            f"{tuned_on(suite, dict.fromkeys(found.values()))}{others and f'; {others}'}."
        )
    lines += [
        "",
        f"Mean and standard deviation over seeds, in points; New: right after training, AP: after the last task{likelihood}."
        f"{rates} Tasks in order: {', '.join(first.tasks)}. {more}From `bench/results/{name}`, written by `{command}` on "
        f"{made_on(suite, methods)}.",
    ]
    if picture:
        with matplotlib.rc_context(PLOT_STYLE):
            (suite.results / "summary.png").write_bytes(png(summary(list(methods.values()))))
        lines += ["", f"![scores](../bench/results/{name}/summary.png)"]
    return "\n".join(lines)


TUNED_ON = {"test": "on the test splits", "validation": "on samples held out of the training"}


def tuned_on(suite: Suite, labels: Iterable[str]) -> str:
    """What `lilora tune` has scored to find the rates of these labels; files of earlier versions do not say: the test splits."""
    by_samples: dict[str, list[str]] = {}
    for label in labels:
        samples = json.loads(suite.tuning(label).read_text()).get("scored_on", "test")
        by_samples.setdefault(samples, []).append(label)
    if len(by_samples) == 1:
        return TUNED_ON[next(iter(by_samples))]
    return ", ".join(f"{TUNED_ON[samples]} ({', '.join(own)})" for samples, own in by_samples.items())


ONE_LORA = "`lora` is one LoRA for all tasks, `dirlora` one per task. "


def digits() -> str:
    """Methods of the digits suite, each at its own learning rate."""
    return suite_table("digits", "make experiment", ONE_LORA, True)


def one_rate() -> str:
    """Methods of the digits suite, all at one learning rate."""
    return suite_table("digits-one-rate", "python -m bench.suite digits-one-rate", ONE_LORA, True)


def long() -> str:
    """Methods of the long digits suite: scores, and what inference keeps beside the base model after 4, 8 and 12 tasks."""
    suite, stages = Suite.read("digits-long"), [3, 7, 11]
    methods = scores(suite, [label for label in suite.runs if label not in CHANGES or label in ("lilora", "pclr")])
    lines = [
        "| method | task given | New | AP | Forgetting | thousands of parameters after 4, 8, 12 tasks | ranks of a linear |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for label, method in methods.items():
        sizes = method.runs[0].extra["sizes"]
        parameters = ", ".join(f"{sizes['parameters'][stage] / 1e3:.0f}" for stage in stages)
        ranks = ", ".join(str(sizes["ranks"][stage]) for stage in stages)
        given = "yes" if label in ("lilora", "dirlora") else "no"
        lines.append(f"| {label} | {given} | {' | '.join(spreads(method))} | {parameters} | {ranks} |")
    seeds = len(methods["pclr"].runs)
    pclr, lora = (methods[name].metrics["Forgetting"].mean for name in ("pclr", "lora"))
    with matplotlib.rc_context(PLOT_STYLE):
        (suite.results / "memory.png").write_bytes(png(memory(list(methods.values()))))
    lines += [
        "",
        f"Mean and standard deviation over {seeds} seeds, in points. Tasks in order: {', '.join(methods['pclr'].tasks)}. PCLR "
        f"forgets {pclr / lora:.0%} of what one LoRA for all tasks forgets. From `bench/results/digits-long`, written by "
        f"`make long` on {made_on(suite, methods)}.",
        "",
        "![memory](../bench/results/digits-long/memory.png)",
    ]
    return "\n".join(lines)


def wide() -> str:
    """Methods of the wide digits suite, and which ranks of tasks that were trained apart are redundant."""
    suite = Suite.read("digits-wide")
    more = "PCLR's pool is full after four tasks and is compressed before each of the last four. "
    return f"{suite_table('digits-wide', 'make wide', more, True)}\n\n{redundancy(suite)}"


Numbers = dict[str, dict[str, Spread]]


def analysed(suite: Suite, label: str) -> Numbers:
    """What `lilora analyze` found: {"redundant" | "overlap" | "expected" | "cka": {"A" | "B": percent}}, means over pairs of
    tasks and linears, spread over runs. Raises FileNotFoundError while there is no run.
    """
    found = [analysis for seed in suite.seeds if (analysis := suite.analysis(label, seed)) is not None]
    if not found:
        raise FileNotFoundError(2, "no runs", f"bench/results/{suite.name}")

    def spread(name: str, key: str) -> Spread:
        pairs = 100 * np.array([analysis[name][key] for analysis in found], dtype=float)  # [run, task, task]
        return Spread.of(list(pairs[:, ~np.eye(pairs.shape[1], dtype=bool)].mean(1)))

    return {name: {key: spread(name, key) for key in "AB"} for name in ("redundant", "overlap", "expected", "cka")}


STARTS = {"dirlora": "each task its own start", "dirlora-same-start": "one start for all tasks"}


def analyses(suite: Suite) -> dict[str, Numbers]:
    """`analysed` of every label that has runs."""
    found = {}
    for label in suite.analyse:
        with suppress(FileNotFoundError):
            found[label] = analysed(suite, label)
    return found


def redundancy(suite: Suite) -> str:
    """The same as a table; empty while there is no run."""
    found = analyses(suite)
    if not found:
        return ""
    columns = " | ".join(f"{key}, {STARTS.get(label, label)}" for label in found for key in "AB")
    lines = [f"| ranks of one task beside another's | {columns} |", "|---|" + "--:|" * 2 * len(found)]
    for title, name in (
        ("redundant, %", "redundant"), ("overlap, %", "overlap"), ("overlap by chance, %", "expected"), ("CKA, %", "cka")
    ):  # fmt: skip
        cells = (numbers[name][key] for numbers in found.values() for key in "AB")
        lines.append(f"| {title} | {' | '.join(f'{x.mean:.1f}' if name == 'expected' else str(x) for x in cells)} |")
    runs = sum(suite.analysis(label, seed) is not None for label in found for seed in suite.seeds)
    said = f"Of {', '.join(found)}, {runs} run{'s' * (runs > 1)}; means over pairs of tasks and linears, by `lilora analyze`."
    return "\n".join([*lines, "", said])


def real_text() -> str:
    """Methods of the suite on a pretrained language model."""
    table, ranks = suite_table("real-text", "make real-text", "", True), redundancy(Suite.read("real-text"))
    return f"{table}\n\n{ranks}" if ranks else table


def real() -> str:
    """Methods of the suite of pictures and text on the same model."""
    return suite_table("real", "make real")


def probes() -> str:
    """What a linear model reads from the features of that model's tower and of its teacher, and what its answers cost."""
    folder = Suite.read("real").results
    found, nats = (json.loads((folder / name).read_text()) for name in ("probes.json", "likelihood.json"))
    order = sorted(found, key=lambda task: found[task]["teacher"] - found[task]["tower"])
    lines = [f"| features | {' | '.join(order)} |", "|---|" + "--:|" * len(order)]
    for title, name in (("EfficientNet-Lite0", "teacher"), ("the tower", "tower")):
        lines.append(f"| {title} | {' | '.join(f'{found[task][name]:.1f}' for task in order)} |")
    close = [task for task in order if found[task]["teacher"] - found[task]["tower"] <= 5]
    behind = (f"{task} by {found[task]['teacher'] - found[task]['tower']:.0f}" for task in order if task not in close)
    far = " and on ".join(behind)
    lines += [
        "",
        f"Within five points of its teacher on {', '.join(close)}{far and '; behind on '}{far}. An answer about a test "
        f"picture costs the model {nats['right']:.2f} nats a token, the same answer about another picture of its kind "
        f"{nats['wrong']:.2f}. From `bench/results/real/probes.json` and `likelihood.json`, which the build writes.",
    ]
    return "\n".join(lines)


def real_all() -> str:
    """The same with all of its tasks."""
    return suite_table("real-all", "make real-all")


CHANGES = {
    "pclr": "as above; once the cap is reached a task has 28, 24, 22, 20, 18, 16 new ranks",
    "pclr-no-integration": "no distillation after compression",
    "pclr-constant": "32 new ranks a task throughout",
    "pclr-late": "16 new ranks a task once the cap is reached",
    "pclr-released": "the released code's choices (`--preset released`) but for its schedule, which is for eight tasks; the "
    "switch acts after every task, and gradients are clipped",
    "pclr-reversed": "tasks in reversed order",
    "lilora": "as above: A and B0 frozen after the first task, r 64, sub-rank 26",
    "lilora-paper": "`--preset paper`: A and B0 train on, held by the stability loss",
    "lilora-no-stability": "the same without the stability loss",
    "lilora-no-fusion": "no trained fusion of B0 and UᵢVᵢ",
    "lilora-r32": "r 32",
    "lilora-r128": "r 128",
    "lilora-sub13": "sub-rank 13",
    "lilora-sub52": "sub-rank 52",
    "lilora-reversed": "tasks in reversed order",
}


def ablations() -> str:
    """PCLR and LiLoRA on the long digits suite, one choice changed at a time."""
    methods = scores(Suite.read("digits-long"), CHANGES)
    lines = [
        "| run | changed | seeds | New | AP | Forgetting | thousands of parameters after 12 tasks |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for label, method in methods.items():
        size = method.sizes["parameters"][-1] / 1e3
        cells = " | ".join(spreads(method))
        lines.append(f"| {label} | {CHANGES[label]} | {len(method.runs)} | {cells} | {size:.0f} |")
    lines += ["", "As above. From `bench/results/digits-long`, written by `make long`."]
    return "\n".join(lines)
