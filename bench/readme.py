"""Writes the tables of README.md from the committed results, between its `<!-- name -->` marks: `python -m bench.readme`."""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"


def digits() -> str:
    """Methods of the digits suite, mean and deviation over seeds."""
    content = json.loads((RESULTS / "digits" / "metrics.json").read_text())
    runs = content["runs"]
    per_lora = next(run["params_per_task"] for run in runs if run["method"] == "dirlora")
    names = ("New", "AP", "Forgetting")
    lines = [
        f"| method | {' | '.join(names)} | parameters per task |",
        "|---|" + "--:|" * (len(names) + 1),
    ]
    for method, metrics in content["methods"].items():
        own = [run for run in runs if run["method"] == method]
        cells = [f"{metrics[n]['mean']:.1f} ± {metrics[n]['deviation']:.1f}" for n in names]
        params = own[0]["params_per_task"]
        share = f"{params:,} ({100 * params / per_lora:.0f} %)" if params else "none"
        lines.append(f"| {method} | {' | '.join(cells)} | {share} |")
    seeds = len({run["seed"] for run in runs})
    tasks = ", ".join(content["tasks"])
    lines += [
        "",
        f"Mean and standard deviation over {seeds} seeds, in points; New: right after learning, AP: after the last task. "
        f"Tasks in order: {tasks}. `lora` is one LoRA for all tasks, `dirlora` one per task. From "
        f"`bench/results/digits/metrics.json`, written by `make experiment` on {content['environment']['device']}.",
        "",
        "![scores](bench/results/digits/summary.png)",
    ]
    return "\n".join(lines)


def linear() -> str:
    """Ratios of the adapted linear to PEFT's, and bytes saved for backward."""
    content = json.loads((RESULTS / "cpu" / "linear.json").read_text())
    lines = [
        "| case | ours / PEFT | p20 .. p80 | ours / base | saved for backward, MiB: ours, PEFT |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, case in content["cases"].items():
        ratio = case["ratio_to_peft"]
        over_base = case["ms"]["ours"]["median"] / case["ms"]["base"]["median"]
        saved = case.get("saved_bytes")
        mib = "" if saved is None else f"{saved['ours'] / 2**20:.2f}, {saved['peft'] / 2**20:.2f}"
        ours = ratio["ours"]
        lines.append(
            f"| {name} | {ours['median']:.3f} | {ours['p20']:.3f} .. {ours['p80']:.3f} | {over_base:.3f} | {mib} |"
        )
    env = content["environment"]
    lines += [
        "",
        f"2048 -> 5504, r 128, sub-rank 64, 8 samples of 64 tokens, fp32; {env['cpu']}, {env['threads']} threads, torch "
        f"{env['torch']}, peft {env['peft']}; medians of alternating pairs. From `bench/results/cpu/linear.json`, written by "
        "`make bench`.",
    ]
    return "\n".join(lines)


def params() -> str:
    """Parameter accounting of LLaVA-1.5-7B, counted on the meta device."""
    from lilora.params import account

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


def updated(text: str) -> str:
    """README with every marked table written anew; a table without results yet stays empty."""
    for table in (digits, linear, params):
        mark = table.__name__
        try:
            body = f"\n{table()}\n"
        except FileNotFoundError as missing:
            print(f"{mark}: no results yet ({missing.filename})", file=sys.stderr)
            continue
        pattern = rf"(<!-- {mark} -->)\n.*?(<!-- /{mark} -->)"
        text = re.sub(pattern, lambda m, body=body: f"{m[1]}{body}{m[2]}", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(updated(readme.read_text()))
