"""Writes the tables of README.md and docs/ from the committed results, between `<!-- name -->` marks.

`python -m bench.readme`
"""

import json
import re
import sys
from contextlib import suppress
from pathlib import Path

from .claims import claims
from .report import RESULTS, TITLES, folders, interval, kind, load, only, peer_row, percent, shape
from .routing import routing
from .smollm2 import table as speeds
from .suite import Suite
from .suite_tables import ablations, digits, long, one_rate, probes, real, real_all, real_text, scores, wide

ROOT = Path(__file__).parent.parent


def cpu() -> str:
    """The CPU's comparisons with PEFT, and how costs grow."""
    folder = RESULTS / "cpu"
    environment, rows = load(folder)
    lines = decoding(rows) + HEADER + [line_of(row, rows) for row in headlines(rows)]
    grown, bank = growth(rows)
    lines += [
        "",
        "PEFT: `adapter_names` where a batch is mixed in inference, one adapter for all rows in training, for it trains no "
        "mixed batch. Level: p20 and p80 lie on both sides of 1. Saved: memory held between forward and backward. "
        "64 rows of 64 tasks take "
        f"{grown['ours']:.2f} times as long as 64 rows of one task, with PEFT {grown['peft_names']:.2f} times. A bank of 64 "
        f"tasks: {bank['ours']['bytes_on_disk'] / bank['peft']['bytes_on_disk']:.0%} of the size of 64 LoRAs, loaded in "
        f"{bank['ours']['us']['median'] / bank['peft']['us']['median']:.0%} of the time.",
        "",
        "![growth](../bench/results/cpu/growth.png)",
        "",
        f"{environment['device']}, torch {environment['torch']}, peft {environment['peft']}; every result was held against fp64 "
        "before it was timed. Every peer and figure: [RESULTS.md](../bench/results/cpu/RESULTS.md), written by "
        "`make cpu-evidence`.",
    ]
    return "\n".join(lines)


def growth(rows: list[dict]) -> tuple[dict[str, float], dict[str, dict]]:
    """Of ours and PEFT: the time of 64 rows of 64 tasks over that of 64 rows of one; the row of a bank of 64 tasks."""
    first, last = (only(rows, case="mixed batch over tasks", T=t) for t in (1, 64))
    grown = {
        name: only(last, implementation=name)[0]["us"]["median"] / only(first, implementation=name)[0]["us"]["median"]
        for name in ("ours", "peft_names")
    }
    bank = {name: only(rows, case="bank over tasks", T=64, implementation=name)[0] for name in ("ours", "peft")}
    return grown, bank


def decoding(rows: list[dict]) -> list[str]:
    """One row each of eight tasks against the frozen layer by F.linear, by our kernels, and by whatever computes it fastest."""
    lines = []
    for row in only(rows, implementation="ours", training=False, M=8, T=8):
        bases = {name: ratio["median"] for name, ratio in row["ratio_to_peers"].items() if name.startswith("base")}
        if "base_streamed" not in bases:
            continue
        bases["base"] = row["ratio_to_base"]["median"]
        fastest = max(bases, key=bases.get)
        lines.append(
            f"| {row['case']}: {shape(row)} | {bases['base']:.2f} | {bases['base_streamed']:.2f} | {bases[fastest]:.2f}, "
            f"{TITLES[fastest].removeprefix('frozen base, ')} | {row['gb_per_s']:.1f} | {row['percent_of_read']:.0f} % |"
        )
    header = [
        "| decoding 8 rows of 8 tasks | ours / frozen layer, F.linear | ours / frozen layer, our kernels | "
        "ours / fastest frozen layer | GB/s | of the read rate |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    return [*header, *lines, "", "![decoding](../bench/results/cpu/decode.png)", ""] if lines else []


HEADER = [
    "| case | ours / base | PEFT / base | ours / PEFT, p20 .. p80 | PEFT's overhead removed | saved: ours, PEFT |",
    "|---|--:|--:|--:|--:|--:|",
]


SHOWN_ROWS = {"float32": (8, 512), "bfloat16": (8, 64, 512, 8192)}


def host() -> str:
    """What a layer costs the host."""
    content = json.loads((RESULTS / "host" / "host.json").read_text())
    lines = ["| us of one thread, each layer and call | | | x PEFT's |", "|---|---|--:|--:|"]
    flat = {}
    for row in content["results"]:
        if "of several tasks" in row["situation"] and row["implementation"].startswith("ours"):
            if not row["implementation"].endswith((", eager", ", triton")):
                flat.setdefault(row["situation"], []).append(f"{row['us']:.0f}")
            if not row["implementation"].startswith("ours, 8 tasks") or "deleted" in row["implementation"]:
                continue
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
        lines.append(f"| {row['situation']} | {row['implementation']} | {row['us']:.0f} | {ratio} |")
    environment = content["environment"]
    mixed, frozen = (", ".join(found) for found in flat.values())
    lines += [
        "",
        "A linear of 64 x 64 with r 16, sub-rank 8, in a model of eight: what Python and dispatch cost, whatever the size. "
        "ours: the backend cpu; triton: its launches cost nothing here. "
        "Eight rows of a model that has 1, 8, 64 and 512 "
        f"tasks, and 8 after 1000 were deleted: {mixed}; frozen, of 1, 8, 64 and 512: {frozen}. "
        "A generation's time is divided by its 96 adapted linears and its tokens, all else that it does included. "
        "From `bench/results/host/host.json`, written by `python -m bench.host --out bench/results/host` on "
        f"{environment['device']} (load {environment['load']}) with torch "
        f"{environment['torch']}.",
        "",
        "![host](../bench/results/host/host.png)",
    ]
    return "\n".join(lines)


def smollm2() -> str:
    """Tokens per second of a real language model."""
    content = json.loads((RESULTS / "smollm2" / "smollm2.json").read_text())
    environment, row = content["environment"], content["results"][0]
    lines = [
        *speeds(content["results"]),
        "",
        f"SmolLM2-135M in fp32, {row['T']} tasks of r {row['R']} and sub-rank {row['S']} on its MLPs, {row['new_tokens']} greedy "
        f"tokens after prompts of {row['tokens']}; medians with p20 and p80, ratios within rounds. First ours had to give the "
        "eager backend's tokens, for every prompt those of its task alone. From `bench/results/smollm2/smollm2.json`, written by "
        f"`make smollm2` on {environment['device']} (load {environment['load']}) with torch {environment['torch']} and peft "
        f"{environment['peft']}.",
        "",
        "![tokens per second](../bench/results/smollm2/smollm2.png)",
    ]
    return "\n".join(lines)


def headlines(rows: list[dict]) -> list[dict]:
    """Inference by its forward, training by forward and backward together, of gate and up projections and whole models."""
    found = []
    for row in rows:
        directions = ("both", "step") if row.get("training") else ("forward", "generate")
        if row.get("implementation") != "ours" or "against" not in row or row["direction"] not in directions:
            continue
        if row["case"] in ("linear", "linear, gate_up", "decode") and row["M"] not in SHOWN_ROWS[row["dtype"]]:
            continue
        if row["case"] not in ("linear, down", "linear, attention", "mixed batch over tasks"):
            found.append(row)
    return found


def line_of(ours: dict, rows: list[dict]) -> str:
    """Ours against what it is measured against, of one case."""
    theirs = peer_row(ours, ours["against"], rows)
    ratio = ours["ratio_to_peft"]
    level = ratio["p20"] <= 1 <= ratio["p80"]
    share = "level" if level else percent(ours["overhead_removed"])
    saved = [f"{row['saved_bytes'] / 2**20:.1f}" for row in (ours, theirs) if "saved_bytes" in row]
    mixed = f", {ours['T']} tasks" if ours["T"] > 1 else ""
    name = f"{kind(ours)}{mixed}: {shape(ours)}"
    return (
        f"| {name} | {ours['ratio_to_base']['median']:.2f} | {theirs['ratio_to_base']['median']:.2f} | "
        f"{ratio['median']:.2f}, {ratio['p20']:.2f} .. {ratio['p80']:.2f} | {share} | "
        f"{', '.join(saved) + ' MiB' if len(saved) == 2 else ''} |"
    )


def gpu_folders() -> list[Path]:
    return [folder for folder in folders() if load(folder)[0]["driver"] is not None]


def gpu() -> str:
    """Whatever GPUs have left results."""
    found = gpu_folders()
    if not found:
        return (
            "No GPU result is claimed here: none has been measured yet; the tests run the Triton kernels in Triton's interpreter "
            "and the CUDA kernels on an emulated device. On a machine with a GPU (torch, triton, pytest and peft installed), "
            "`make gpu-evidence` runs the measurements and `tests/gpu`, and leaves `evidence/results.json`; laid into "
            "`bench/results/<device>/`, `make readme` shows it."
        )
    lines = []
    for folder in found:
        environment, rows = load(folder)
        lines += [f"{environment['device']}, commit {environment['commit']}:", ""]
        lines += HEADER + [line_of(row, rows) for row in headlines(rows)]
        lines += ["", f"Every figure: [RESULTS.md](../bench/results/{folder.name}/RESULTS.md).", ""]
    return "\n".join(lines)


def params() -> str:
    """Parameter accounting of LLaVA-1.5-7B, counted on the meta device."""
    from lilora.reports.params import account

    totals = account("llava-1.5-7b", projector=True).to_dict(6)
    mib = totals["mib_bf16"]
    return "\n".join(
        [
            "| LLaVA-1.5-7B, bf16, six tasks | per task, MiB | in all, MiB |",
            "|---|--:|--:|",
            f"| a LoRA per task, r 128 | {mib['lora_per_task']:.1f} | {mib['total']['dirlora']:.1f} |",
            f"| LiLoRA, r 128, sub-rank 64 | {mib['per_task']:.1f} | {mib['total']['lilora']:.1f} |",
            "",
            "From `lilora params`, which counts on the meta device without weights.",
        ]
    )


def families() -> str:
    """What works with which family of models, families with equal outcomes in one row; see `families_table`."""
    behaviours, rows, content = recorded_families()
    groups: dict[tuple[str, ...], list[str]] = {}
    for family, outcomes in rows.items():
        cells = tuple(mark(outcomes[name]) if name in outcomes else "–" for name in behaviours)
        groups.setdefault(cells, []).append(family)
    lines = [f"| `model_type` | {' | '.join(behaviours)} |", "|---|" + ":-:|" * len(behaviours)]
    lines += [f"| {', '.join(names)} | {' | '.join(cells)} |" for cells, names in groups.items()]
    structure = content["structure"]
    return "\n".join(
        [
            *lines,
            "",
            f"{legend(content)} no: refused with a sentence, which [the whole table](families-table.md) has; –: there is no "
            f"such thing. Of transformers' {structure['types']} model types that read images and text, {structure['built']} are "
            f"built from their default config, and {structure['found']} of these have linear layers that are found by structure.",
        ]
    )


def families_table() -> str:
    """Every family and behaviour, why something is refused, and what is known of other families by their structure."""
    behaviours, rows, content = recorded_families()
    reasons: list[str] = []

    def cell(outcome: str) -> str:
        if not outcome.startswith("refused: "):
            return mark(outcome)
        reason = outcome.removeprefix("refused: ")
        if reason not in reasons:
            reasons.append(reason)
        return f"no ({reasons.index(reason) + 1})"

    lines = [f"| `model_type` | {' | '.join(behaviours)} |", "|---|" + ":-:|" * len(behaviours)]
    for family, outcomes in rows.items():
        cells = (cell(outcomes[name]) if name in outcomes else "–" for name in behaviours)
        lines.append(f"| {family} | {' | '.join(cells)} |")
    structure = content["structure"]
    return "\n".join(
        [
            *lines,
            "",
            *[f"({i}) Refused: {reason}.  " for i, reason in enumerate(reasons, 1)],
            "",
            legend(content),
            "",
            f"Of transformers' {structure['types']} model types that read images and text, {structure['built']} are built from "
            f"their default config; {structure['found']} of these have linear layers that are found by structure.",
            "",
            "| model types | |",
            "|---|---|",
            f"| {', '.join(structure['attention alone'])} | their MLPs are routed experts alone: attention is adapted |",
            f"| {', '.join(structure['not built'])} | not built from a default config: pass the model, or a config of yours |",
        ]
    )


def recorded_families() -> tuple[list[str], dict[str, dict[str, str]], dict]:
    """Behaviours, the outcome of each for every family, and all that tests/families recorded."""
    content = json.loads((RESULTS / "families.json").read_text())
    rows = content["families"]
    return list(dict.fromkeys(name for outcomes in rows.values() for name in outcomes)), rows, content


def mark(outcome: str) -> str:
    return "no" if outcome.startswith("refused: ") else {"passed": "✓"}.get(outcome, outcome)


def legend(content: dict) -> str:
    environment = content["environment"]
    return (
        "Each cell is a test on a tiny model of the family, in fp64. mixed batch: samples of several tasks with no, one and "
        "several images, row for row what each sample gives alone with its task, and gradients that add up; projector: the same "
        "with adapters in projector and attention; towers: the same rows with adapters in every linear layer; export: as a plain "
        "LoRA that PEFT loads; compile: the language model in one graph for training, whatever the tasks; pclr: a pool of ranks "
        "that chooses for every sample of a batch by its own words and images. From "
        "`bench/results/families.json`, written by `make families` with "
        f"transformers {environment['transformers']}, peft {environment['peft']} and torch {environment['torch']}. "
        "A refusal of rows that a layer sees is one of mixed batches: those of one task work. Adapters in mllama's "
        "cross-attention are such a case too."
    )


SHOWN_SUITES = (
    (
        "digits-one-rate",
        "AP on six tasks at one learning rate, task given: lilora",
        "lilora-frozen",
        {"dirlora": "a LoRA per task", "lora": "one LoRA"},
    ),
    ("digits-long", "AP on twelve tasks, no task given: pclr", "pclr", {"lora": "one LoRA"}),
    ("real-text", "AP on five tasks of text, SmolLM2-135M: lilora, preset paper", "lilora-paper", {"lora": "one LoRA"}),
)


def small() -> str:
    """README's one table: a line for each thing measured, ours beside what it was measured against; the CPU's speed first."""
    environment, rows = load(RESULTS / "cpu")
    ours = only(rows, implementation="ours")
    decode = {"case": "linear, gate_up", "M": 8, "K": 4096, "T": 8, "dtype": "float32", "direction": "forward"}
    lines = [f"| {environment['device']} | ours | compared with |", "|---|--:|---|"]

    def line(what: str, value: str, against: str) -> None:
        lines.append(f"| {what} | {value} | {against} |")

    (row,) = only(ours, **decode)
    bases = [ratio for name, ratio in row["ratio_to_peers"].items() if name.startswith("base")]
    fastest = max([row["ratio_to_base"], *bases], key=lambda ratio: ratio["median"])
    line(
        "decode 8 rows of 8 tasks, 4096 -> 11008, r 128: time",
        interval(row["ratio_to_peft"], 2),
        "1, PEFT's adapter_names",
    )
    line("the same", interval(fastest, 2), "1, the frozen layer alone, by the fastest kernels found")
    (row,) = only(ours, case="generate")
    line("generate with a small LLaVA, 8 tasks: time", interval(row["ratio_to_peft"], 2), "1, PEFT's adapter_names")
    (row,) = only(ours, case="training step")
    line(
        "training step of it, 8 tasks: time", interval(row["ratio_to_peft"], 2), "1, PEFT with one adapter for all rows"
    )
    grown, bank = growth(rows)
    line("64 rows of 64 tasks over 64 rows of one: time", f"{grown['ours']:.2f}", f"{grown['peft_names']:.2f}, PEFT")
    line(
        "a bank of 64 tasks: size",
        f"{bank['ours']['bytes_on_disk'] / bank['peft']['bytes_on_disk']:.2f}",
        "1, 64 LoRAs",
    )
    found = only(json.loads((RESULTS / "smollm2" / "smollm2.json").read_text())["results"], samples=8)
    speed = {row["implementation"]: row["speed"]["median"] for row in found}
    against = f"{speed['peft_names']:.1f}, PEFT's adapter_names; {speed['base']:.1f}, the frozen model"
    line("SmolLM2-135M, 8 prompts of 8 tasks: tokens / s", f"{speed['ours']:.1f}", against)
    for suite, what, ours, others in SHOWN_SUITES:
        with suppress(FileNotFoundError):  # not run yet
            methods = scores(Suite.read(suite))
            found = {label: f"{method.metrics['AP'].mean:.1f}" for label, method in methods.items()}
            least = min(len(methods[label].runs) for label in (ours, *others))
            what += f"; {least} seed{'s' * (least > 1)}"
            line(what, found[ours], "; ".join(f"{found[label]}, {title}" for label, title in others.items()))
    lines += [
        "",
        f"Medians (p20 .. p80) with torch {environment['torch']} and peft {environment['peft']}; AP: mean score after the last "
        f"task. {'' if gpu_folders() else 'No GPU result is claimed. '}[Results](docs/results.md) has every table, "
        "what is slower than its peers, and the command that makes each.",
    ]
    return "\n".join(lines)


def updated(page: str, text: str) -> str:
    """A page with every marked table written anew; a table without results yet stays empty."""
    for table in PAGES[page]:
        mark = table.__name__
        try:
            body = f"\n{table()}\n"
        except FileNotFoundError as missing:
            print(f"{mark}: no results yet ({missing.filename})", file=sys.stderr)
            continue
        pattern = rf"(<!-- {mark} -->)\n.*?(<!-- /{mark} -->)"
        text = re.sub(pattern, lambda m, body=body: f"{m[1]}{body}{m[2]}", text, flags=re.DOTALL)
    return text


PAGES = {
    "README.md": (small,),
    "docs/results.md": (
        claims,
        one_rate,
        digits,
        long,
        ablations,
        wide,
        real_text,
        real,
        real_all,
        probes,
        routing,
        params,
        cpu,
        smollm2,
        host,
        gpu,
    ),
    "docs/families.md": (families,),
    "docs/families-table.md": (families_table,),
}


if __name__ == "__main__":
    for page in PAGES:
        path = ROOT / page
        path.write_text(updated(page, path.read_text()))
