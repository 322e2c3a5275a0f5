"""What a layer costs the host: python -m bench.host [--backends eager triton cuda] [--int8] [--callgrind] [--out FOLDER]

Microseconds of CPU time of one small linear (64 -> 64, R 16, S 8), where Python and torch's own dispatch are all there is to
see: that of a call of a model of eight, divided by eight, for a model of ours settles its batch once for all layers. Thread
time, the minimum over blocks of calls, all implementations alternating in one process. Of ours with the CPU kernels, with
the eager backend, and with the others named, whose launches then cost nothing (host_stub.py). With --int8 the bases are
torchao's. With --callgrind thousands of instructions instead, counted by valgrind in minutes. A generation's time, all that
the model does in it included, is divided by its adapted linears and tokens. With --out, host.json and host.png go there.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilora_kernels import LiLoRALinear, attach, backend, freeze, set_task

from . import callgrind, host_stub
from .environment import environment

WIDTH, R, S = 64, 16, 8
LAYERS = 8
CALLS, BLOCKS = 10, 60
TARGETS = ["gate_proj", "up_proj", "down_proj"]
GENERATED, TOKENS, GENERATIONS = 96, 12, 6  # adapted linears, new tokens and repetitions of a generation
TASKS = (1, 8, 64, 512)
DELETED = 1000


INT8 = False  # whether the bases are quantised


def bases() -> nn.Module:
    made = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))).requires_grad_(False)
    if INT8:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(made, Int8WeightOnlyConfig())
    return made


def ours(tasks: int = 1, deleted: int = 0) -> nn.Module:
    layers = [LiLoRALinear(base, r=R, sub_rank=S, dropout=0.0) for base in bases()]
    for layer in layers:
        for t in range(deleted):
            layer.add_task(f"deleted{t}")
            layer.delete_task(f"deleted{t}")
        for t in range(tasks):
            layer.add_task(f"t{t}")
    model = nn.Sequential(*layers)
    attach(model)
    return model


def peft_lora(tasks: int = 1) -> nn.Module:
    config, model = peft.LoraConfig(r=R, target_modules=[str(i) for i in range(LAYERS)]), bases()
    for t in range(tasks):
        model = peft.inject_adapter_in_model(config, model, f"t{t}")
    return model


class Formula(nn.Module):
    """LiLoRA's formula in torch operations and nothing else: the least that its gradients cost where autograd records them."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        shapes = (R, WIDTH), (WIDTH, R), (WIDTH, S), (S, R), (1,)
        self.a, self.b0, self.u, self.v, self.fusion = (nn.Parameter(torch.randn(shape)) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        m = torch.lerp(self.u @ self.v, self.b0, torch.sigmoid(self.fusion))
        return self.base(x) + F.linear(F.linear(x, self.a), m) * 2.0


def formula() -> nn.Module:
    return nn.Sequential(*(Formula(base) for base in bases()))


class Function(torch.autograd.Function):
    """What any function with a gradient of its own costs: y = x W^T, of seven tensors."""

    @staticmethod
    def forward(ctx, x, weight, *others):
        ctx.save_for_backward(x, weight, *others)
        return x @ weight.T

    @staticmethod
    def backward(ctx, dy):
        x, weight, *others = ctx.saved_tensors
        return dy @ weight, dy.T @ x, *(None for _ in others)


def forward_of(model: nn.Module, x: Tensor, **options) -> Callable[[], object]:
    def run():
        with torch.no_grad():
            model(x, **options)

    return run


def step_of(model: nn.Module, x: Tensor, dy: Tensor, **options) -> Callable[[], object]:
    inputs = [x, *(p for p in model.parameters() if p.requires_grad)]
    return lambda: torch.autograd.grad(model(x, **options), inputs, dy)


def count(tasks: int) -> str:
    return f"{tasks} task{'s' * (tasks > 1)}"


def situations() -> dict[str, dict[str, Callable[[], object]]]:
    """For each situation the implementations by name."""
    one, batch = torch.randn(1, 1, WIDTH), torch.randn(8, 1, WIDTH)
    x, dy = torch.randn(8, 1, WIDTH, requires_grad=True), torch.randn(8, 1, WIDTH)
    weight = torch.randn(WIDTH, WIDTH, requires_grad=True)
    more = [torch.randn(4) for _ in range(5)]

    def ids(tasks: int, first: int = 0) -> Tensor:
        return torch.tensor([first + t % tasks for t in range(len(batch))], dtype=torch.int32)

    linear, lora, learner, lora_learner, plain = bases(), peft_lora(), ours().train(), peft_lora().train(), formula()
    mixed = {f"ours, {count(t)}": forward_of(ours(t).eval(), batch, task_ids=ids(t)) for t in TASKS}
    after = forward_of(ours(8, DELETED).eval(), batch, task_ids=ids(8, DELETED))
    served = {}
    for t in TASKS:
        model = ours(t).eval()
        freeze(model)
        served[f"ours, {count(t)}"] = forward_of(model, batch, task_ids=ids(t))
    both = ours(8).train()
    set_task(both, *(f"t{t}" for t in range(8)))

    several, names = peft_lora(8).eval(), [f"t{t}" for t in range(8)]

    @torch.no_grad()
    def by_names():
        y = batch
        for layer in several:
            y = layer(y, adapter_names=names)

    def functions():
        y = x[:, 0]
        for _ in range(LAYERS):
            y = Function.apply(y, weight, *more)
        torch.autograd.grad(y, [x, weight], dy[:, 0])

    return {
        "forward, one task": {
            "F.linear": forward_of(linear, one),
            "PEFT LoRA": forward_of(lora.eval(), one),
            "ours": forward_of(ours().eval(), one),
        },
        "forward, 8 rows of one task": {
            "PEFT LoRA": forward_of(lora.eval(), batch),
            "ours": forward_of(ours().eval(), batch),
        },
        "forward, 8 rows of several tasks": {
            "PEFT LoRA, adapter_names of 8": by_names,
            **mixed,
            f"ours, 8 tasks after {DELETED} deleted": after,
        },
        "forward, 8 rows of several tasks, frozen": served,
        "training forward": {
            "PEFT LoRA": lambda: lora_learner(x),
            "the formula alone": lambda: plain(x),
            "ours": lambda: learner(x),
        },
        "training forward and backward": {
            "autograd.Function": functions,
            "PEFT LoRA": step_of(lora_learner, x, dy),
            "the formula alone": step_of(plain, x, dy),
            "ours": step_of(learner, x, dy),
            "ours, 8 rows of 8 tasks": step_of(both, x, dy, task_ids=ids(8)),
        },
    }


def generations() -> dict[str, dict[str, Callable[[], object]]]:
    """Greedy decoding by a Llama of 96 adapted linears, as narrow as the others here: one prompt, and eight of eight tasks."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=GENERATED // len(TARGETS), num_attention_heads=2,
        vocab_size=128, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip

    def llama() -> nn.Module:
        return transformers.LlamaForCausalLM(config).requires_grad_(False).eval()

    def with_lora(tasks: int) -> nn.Module:
        lora = peft.LoraConfig(r=R, target_modules=TARGETS)
        model = peft.get_peft_model(llama(), lora, adapter_name="t0")
        for t in range(1, tasks):
            model.add_adapter(f"t{t}", lora)
        return model.eval()

    def with_ours(tasks: int) -> nn.Module:
        model = llama()
        for block in model.model.layers:
            for name in TARGETS:
                layer = LiLoRALinear(getattr(block.mlp, name), r=R, sub_rank=S, dropout=0.0)
                setattr(block.mlp, name, layer)
                for t in range(tasks):
                    layer.add_task(f"t{t}")
        attach(model)
        freeze(model)
        return model.eval()

    def run(model: nn.Module, samples: int, **options) -> Callable[[], object]:
        prompt = torch.randint(1, 128, (samples, 8))
        return lambda: model.generate(input_ids=prompt, max_new_tokens=TOKENS, do_sample=False, **options)

    names = [f"t{t}" for t in range(8)]
    return {
        "generate, one task": {
            "no adapter": run(llama(), 1),
            "PEFT LoRA": run(with_lora(1), 1),
            "ours": run(with_ours(1), 1),
        },
        "generate, 8 samples of 8 tasks": {
            "PEFT LoRA, adapter_names of 8": run(with_lora(8), 8, adapter_names=names),
            "ours": run(with_ours(8), 8, task_ids=names),
        },
    }


def measure(
    runs: dict[tuple[str, str], Callable[[], object]], calls: int, blocks: int, layers: int = LAYERS
) -> dict[tuple[str, str], float]:
    """Microseconds of this thread for a layer in a call of each, the least over the blocks."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(blocks):
        for name, run in runs.items():
            start = time.thread_time_ns()
            for _ in range(calls):
                run()
            best[name] = min(best[name], (time.thread_time_ns() - start) / calls / layers / 1e3)
    return best


def rows(backends: list[str], calls: int = CALLS, blocks: int = BLOCKS, unit: str = "us") -> list[dict]:
    for name in backends:
        host_stub.INSTALL[name]()
    runs = {(s, n): run for s, of in situations().items() for n, run in of.items()}
    for name in backends:  # with models of their own: a layer settles its calls for one backend
        torch.set_default_dtype(torch.float16 if name == "cuda" else torch.float32)  # the CUDA kernels take no fp32
        for s, of in situations().items():
            ours_by = {f"{n}, {name}": host_stub.through(name, run) for n, run in of.items() if n.startswith("ours")}
            runs |= {(s, n): run for n, run in ours_by.items()}
    torch.set_default_dtype(torch.float32)
    order = list(dict.fromkeys(s for s, _ in runs))
    runs = dict(sorted(runs.items(), key=lambda run: order.index(run[0][0])))
    with backend("cpu"):
        if unit == "us":
            found = measure(runs, calls, blocks)
            decoding = {(s, n): run for s, of in generations().items() for n, run in of.items()}
            found |= measure(decoding, 1, GENERATIONS, GENERATED * TOKENS)
        else:
            found = {name: count / LAYERS for name, count in callgrind.instructions(runs).items()}
    base = {s: cost for (s, n), cost in found.items() if n.startswith("PEFT LoRA")}
    return [
        {"situation": s, "implementation": n, unit: round(cost, 1)}
        | ({"ratio": round(cost / base[s], 2)} if s in base else {})
        for (s, n), cost in found.items()
    ]


def plot(found: list[dict], unit: str, path: Path) -> None:
    import matplotlib.pyplot as plt

    groups = {
        s: [row for row in found if row["situation"] == s] for s in dict.fromkeys(row["situation"] for row in found)
    }
    figure, axes = plt.subplots(
        len(groups), 1, figsize=(9, 0.28 * len(found) + 3), layout="constrained", sharex=True,
        height_ratios=[len(group) for group in groups.values()],
    )  # fmt: skip
    for axis, (situation, group) in zip(axes, groups.items(), strict=True):
        names = [row["implementation"] for row in group]
        colours = ["#1f77b4" if name.startswith("ours") else "#bbbbbb" for name in names]
        bars = axis.barh(names, [row[unit] for row in group], color=colours)
        axis.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
        axis.invert_yaxis()
        axis.set_title(situation, fontsize=9, loc="left")
    axes[-1].set_xlabel(f"{unit} of one thread, each layer and call")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where host.json goes")
    parser.add_argument("--backends", nargs="*", choices=host_stub.INSTALL, default=["eager", "triton"])
    parser.add_argument("--int8", action="store_true", help="bases quantised by torchao")
    parser.add_argument("--callgrind", action="store_true", help="count instructions")
    options = parser.parse_args()
    global INT8
    INT8 = options.int8
    if options.callgrind and callgrind.FOLDER not in os.environ:
        raise SystemExit(callgrind.again("bench.host"))
    torch.set_num_threads(1)
    unit = "kinstr" if options.callgrind else "us"
    found = rows(options.backends, unit=unit)
    for row in found:
        ratio = f"{row['ratio']:6.2f} x PEFT's" if "ratio" in row else ""
        print(f"{row[unit]:9.1f} {unit}  {row['situation']:42} {row['implementation']:40} {ratio}")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        content = {
            "environment": environment("python -m bench.host", on_gpu=False),
            "int8": INT8,
            "calls": CALLS,
            "blocks": BLOCKS,
            "results": found,
        }
        (options.out / "host.json").write_text(json.dumps(content, indent=1) + "\n")
        plot(found, unit, options.out / "host.png")


if __name__ == "__main__":
    main()
