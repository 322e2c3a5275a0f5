"""What the papers claim, beside what the suites have measured: the table of docs/results.md."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from lilora.reports.runs import MethodRuns, Spread

from .suite import Suite
from .suite_tables import Numbers, analyses, scores

# Suites, and what each calls LiLoRA's default, most telling first.
FROZEN = {
    "real-text": "lilora-frozen",
    "digits": "lilora-frozen",
    "digits-one-rate": "lilora-frozen",
    "digits-wide": "lilora-frozen",
    "digits-long": "lilora",
}
PAPER = {
    "real-text": ("lilora-paper", "lilora-paper-no-stability"),
    "digits": ("lilora-paper", "lilora-paper-no-stability"),
    "digits-long": ("lilora-paper", "lilora-no-stability"),
}


@dataclass(frozen=True)
class Claim:
    """measured(): (our figure, whether the claim holds in it); FileNotFoundError while `command` has not been run."""

    text: str
    command: str
    measured: Callable[[], tuple[str, str]]


def verdict(better: Spread, worse: Spread) -> str:
    """Whether one mean is above another by more than both deviations together."""
    apart = better.deviation + worse.deviation
    if math.isnan(apart):
        return "one seed, no verdict"
    if better.mean - worse.mean > apart:
        return "holds"
    return "does not hold" if worse.mean - better.mean > apart else "within the spread"


def runs_of(suite: str, *labels: str) -> list[MethodRuns] | None:
    """The runs of all these labels, None while one has none."""
    try:
        found = scores(Suite.read(suite))
    except FileNotFoundError:
        return None
    return [found[label] for label in labels] if set(labels) <= found.keys() else None


def seeds(methods: list[MethodRuns]) -> str:
    count = min(len(method.runs) for method in methods)
    return f"{count} seed{'s' * (count > 1)}"


def in_suites(labels: dict[str, tuple[str, ...]], row: Callable[..., tuple[str, str]]) -> tuple[str, str]:
    """`row` of every suite that has runs of these labels."""
    found = {suite: methods for suite, own in labels.items() if (methods := runs_of(suite, *own))}
    if not found:
        raise FileNotFoundError
    figures, verdicts = zip(*(row(*methods) for methods in found.values()), strict=True)
    said = (f"{suite}, {seeds(found[suite])}: {figure}" for suite, figure in zip(found, figures, strict=True))
    return "; ".join(said), "; ".join(
        f"{suite}: {word}" if len(found) > 1 else word for suite, word in zip(found, verdicts, strict=True)
    )


def near_a_lora_per_task() -> tuple[str, str]:
    def row(lilora: MethodRuns, dirlora: MethodRuns) -> tuple[str, str]:
        ours, theirs = (method.metrics["AP"] for method in (lilora, dirlora))
        share = lilora.params_per_task / dirlora.params_per_task
        word = {"holds": "does not hold", "one seed, no verdict": "one seed, no verdict"}.get(
            verdict(theirs, ours), "holds"
        )
        return f"AP {ours} and {theirs}, at {share:.0%} of the parameters of a task", word

    return in_suites({suite: (label, "dirlora") for suite, label in FROZEN.items()}, row)


def stability_helps() -> tuple[str, str]:
    def row(with_loss: MethodRuns, without: MethodRuns) -> tuple[str, str]:
        ours, theirs = (method.metrics["AP"] for method in (with_loss, without))
        return f"AP {ours} with it, {theirs} without", verdict(ours, theirs)

    return in_suites(PAPER, row)


def order_of_pclr() -> tuple[str, str]:
    labels = ("lora", "pclr-no-integration", "pclr-constant", "pclr")
    methods = runs_of("digits-long", *labels)
    if methods is None:
        raise FileNotFoundError
    forgetting = [method.metrics["Forgetting"] for method in methods]
    words = [verdict(worse, better) for worse, better in pairwise(forgetting)]
    figures = ", ".join(f"{label} {spread}" for label, spread in zip(labels, forgetting, strict=True))
    failed = [f"{labels[i]} > {labels[i + 1]} {word}" for i, word in enumerate(words) if word != "holds"]
    return f"digits-long, {seeds(methods)}: Forgetting {figures}", "holds, but for " + ", ".join(
        failed
    ) if failed else "holds"


def flat_memory() -> tuple[str, str]:
    methods = runs_of("digits-long", "pclr", "dirlora")
    if methods is None:
        raise FileNotFoundError
    (pclr, dirlora) = ([method.sizes["parameters"][at] for at in (7, 11)] for method in methods)
    return (
        f"digits-long: thousands of parameters after 8 and 12 tasks {pclr[0] / 1e3:.0f} and {pclr[1] / 1e3:.0f}; a LoRA per task "
        f"{dirlora[0] / 1e3:.0f} and {dirlora[1] / 1e3:.0f}",
        "holds" if pclr[1] <= 1.02 * pclr[0] else "does not hold",
    )


def in_analyses(row: Callable[[dict[str, Numbers]], tuple[str, str]]) -> tuple[str, str]:
    """`row` of what every suite has analysed, by label."""
    figures, verdicts = [], []
    for name in ("real-text", "digits-wide"):
        found = analyses(Suite.read(name))
        if "dirlora" in found:
            figure, word = row(found)
            figures.append(f"{name}: {figure}")
            verdicts.append(f"{name}: {word}")
    if not figures:
        raise FileNotFoundError
    return "; ".join(figures), "; ".join(verdicts)


def alike_across_tasks() -> tuple[str, str]:
    """A start that all tasks share is alike before any training, so the verdict is of starts of their own."""

    def row(found: dict[str, Numbers]) -> tuple[str, str]:
        own, same = found["dirlora"], found.get("dirlora-same-start")
        figure = (
            f"overlap of A {own['overlap']['A']} % and of B {own['overlap']['B']} % (by chance {own['expected']['A'].mean:.1f} "
            f"and {own['expected']['B'].mean:.1f}) where every task draws its own start"
        )
        if same is not None:
            figure += f", {same['overlap']['A']} and {same['overlap']['B']} % with one start for all"
        return figure, verdict(own["overlap"]["A"], own["overlap"]["B"])

    return in_analyses(row)


TENTH = 10.0  # percent: fewer ranks would not pay for a compression


def redundancy_of_ranks() -> tuple[str, str]:
    def row(found: dict[str, Numbers]) -> tuple[str, str]:
        share = found["dirlora"]["redundant"]
        least = min(share.values(), key=lambda spread: spread.mean)
        return f"{share['A']} % of A's ranks, {share['B']} % of B's", verdict(least, Spread(TENTH, 0.0))

    return in_analyses(row)


def needs_a_pretrained_clip() -> tuple[str, str]:
    return (
        "none: no package has a pretrained CLIP, and what a tiny one can do before training is chance",
        "cannot be shown here",
    )


CLAIMS = (
    Claim("LiLoRA is near a LoRA per task at about 30 % of its parameters", "make real-text", near_a_lora_per_task),
    Claim("LiLoRA's stability loss helps while B0 trains on", "make real-text", stability_helps),
    Claim("PCLR forgets least as a whole: LoRA >> no integration >> no schedule > PCLR", "make long", order_of_pclr),
    Claim("PCLR's memory stays flat at its cap", "make long", flat_memory),
    Claim("A tenth and more of the ranks of tasks that were trained apart are redundant", "make wide", redundancy_of_ranks),
    Claim("A of tasks that were trained apart are alike, more than their B", "make wide", alike_across_tasks),
    Claim("DAC keeps zero-shot transfer", "", needs_a_pretrained_clip),
)  # fmt: skip


def claims() -> str:
    """One row for each claim."""
    lines = ["| claim | here | verdict |", "|---|---|---|"]
    for claim in CLAIMS:
        try:
            figure, word = claim.measured()
        except FileNotFoundError:
            figure, word = f"not run yet: `{claim.command}`", ""
        lines.append(f"| {claim.text} | {figure} | {word} |")
    return "\n".join(
        [
            *lines,
            "",
            "Means and standard deviations over seeds. A difference counts if it exceeds both deviations; one seed has none.",
        ]
    )
