"""An MLP, a decoder layer, and a training step and generation of a whole LLaVA, on random weights that all share."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from lilora_kernels import freeze
from lilora_kernels.layers.lilora import set_task

from .compare import Wrong, peak_bytes, poisoned, removed, saved_bytes
from .problems import SCALING
from .timing import Machine, Times, figures, measure, spread

PARTS = ("MLP", "decoder layer", "training step", "generate")
MLP_LINEARS = ["gate_proj", "up_proj", "down_proj"]
LAYER_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", *MLP_LINEARS]
LLAVA_LINEARS = r".*language_model.*\.mlp\.(gate_proj|up_proj|down_proj)"
DROPOUT = 0.05


@dataclass(frozen=True)
class Size:
    """A LLaVA, its adapters, and a batch in which every sample may belong to another task."""

    hidden: int
    intermediate: int
    heads: int
    layers: int
    vocabulary: int
    vision: tuple[int, int, int, int, int]  # hidden, layers, heads, image, patch
    rank: int
    sub_rank: int
    tasks: int
    samples: int
    tokens: int
    new_tokens: int
    dtype: torch.dtype

    def describe(self) -> dict:
        return {
            "hidden": self.hidden,
            "intermediate": self.intermediate,
            "layers": self.layers,
            "R": self.rank,
            "S": self.sub_rank,
            "samples": self.samples,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @property
    def image_tokens(self) -> int:
        return (self.vision[3] // self.vision[4]) ** 2


LLAVA_7B = Size(4096, 11008, 32, 32, 32064, (1024, 24, 16, 336, 14), 128, 64, 8, 8, 1024, 32, torch.bfloat16)
ROOMY = 120 << 30  # bytes of a GPU that holds the whole batch; a smaller one gets a quarter of it
SMALL = Size(1024, 2752, 8, 2, 4096, (256, 2, 4, 56, 14), 64, 32, 8, 8, 48, 16, torch.float32)
TINY = Size(32, 48, 2, 2, 64, (16, 1, 2, 8, 4), 8, 4, 2, 2, 8, 2, torch.float32)


def llava_7b(memory: int) -> Size:
    """LLaVA-1.5-7B with a batch for a GPU of so many bytes: 80 GB hold weights, adapters and two samples' activations."""
    return LLAVA_7B if memory >= ROOMY else replace(LLAVA_7B, samples=2, tasks=2)


# --- the models -------------------------------------------------------------------------------------------------------


def llama_config(size: Size):
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        vocab_size=size.vocabulary,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )


class DecoderLayer(nn.Module):
    """transformers' layer with its rotary embedding, [B, L, hidden] -> [B, L, hidden]."""

    def __init__(self, size: Size) -> None:
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

        super().__init__()
        config = llama_config(size)
        config._attn_implementation = "sdpa"
        self.layer, self.rotary = LlamaDecoderLayer(config, 0), LlamaRotaryEmbedding(config)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        return self.layer(x, position_embeddings=self.rotary(x, positions))


def frozen(part: str, size: Size, device: torch.device) -> nn.Module:
    """The base model of a part, on random weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(size.dtype)
    try:
        with device:
            if part == "MLP":
                from transformers.models.llama.modeling_llama import LlamaMLP

                model = LlamaMLP(llama_config(size))
            elif part == "decoder layer":
                model = DecoderLayer(size)
            else:
                model = llava(size)
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False)


def llava(size: Size) -> nn.Module:
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    hidden, layers, heads, image, patch = size.vision
    vision = CLIPVisionConfig(
        hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, num_attention_heads=heads,
        image_size=image, patch_size=patch,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=llama_config(size), image_token_index=size.vocabulary - 1)
    return LlavaForConditionalGeneration(config)


def task_names(size: Size) -> list[str]:
    return [f"task{t}" for t in range(size.tasks)]


def adapted(base: nn.Module, kind: str, part: str, size: Size, p: float) -> nn.Module:
    """The base with an adapter for each task, as PEFT makes it: `ours` LiLoRA, `peft` and `peft_default` LoRA.

    Shares the base's weights. All adapter parameters are random: fresh adapters compute nothing.
    """
    import peft

    import lilora

    targets = {"MLP": MLP_LINEARS, "decoder layer": LAYER_LINEARS}.get(part, LLAVA_LINEARS)
    if kind == "ours":
        config = lilora.LiLoRAConfig(
            r=size.rank, sub_rank=size.sub_rank, alpha=SCALING * size.rank, dropout=p, target_modules=targets,
            train_a="always", train_b0="always",
        )  # fmt: skip
    else:
        config = peft.LoraConfig(r=size.rank, lora_alpha=SCALING * size.rank, lora_dropout=p, target_modules=targets)
    shared = {id(t): t for t in (*base.parameters(), *base.buffers())}
    wide = kind == "peft_default"
    first, *others = task_names(size)
    model = peft.get_peft_model(copy.deepcopy(base, shared), config, adapter_name=first, autocast_adapter_dtype=wide)
    for name in others:
        model.add_adapter(name, config, autocast_adapter_dtype=wide)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lilora_" in name or "lora_" in name:
                task_factor = "lilora_U" in name or "lilora_V" in name  # of a size that shows whose it is
                parameter.normal_(std=(1 if task_factor else 0.25) * parameter.shape[-1] ** -0.5)
    return model


def delta(layer: nn.Module, task: str) -> Tensor:
    """What an adapter adds to its base weight, in fp64, from its parameters alone."""
    if hasattr(layer, "lilora_A"):
        f = torch.sigmoid(layer.lilora_fusion[task].double())
        m = f * layer.lilora_B[task].double() + (1 - f) * (
            layer.lilora_U[task].double() @ layer.lilora_V[task].double()
        )
        return SCALING * m @ layer.lilora_A[task].double()
    return SCALING * layer.lora_B[task].weight.double() @ layer.lora_A[task].weight.double()


@dataclass(frozen=True)
class Variant:
    """A model and what its calls get besides the batch: `task_ids` or `adapter_names`; `tasks` says the same in numbers."""

    model: nn.Module
    tasks: list[int]
    more: dict


def variant(base: nn.Module, name: str, part: str, size: Size, p: float, mixed: bool) -> Variant:
    """`ours`, `peft` or `peft_default`; with `mixed` every sample in another task, by adapter_names for PEFT, ours frozen."""
    model = adapted(base, name, part, size, p)
    if not mixed:
        return Variant(model, [0] * size.samples, {})
    tasks = [i % size.tasks for i in range(size.samples)]
    if name == "ours":
        freeze(model)  # as it is served; training ends it
        device = next(model.parameters()).device
        return Variant(model, tasks, {"task_ids": torch.tensor(tasks, dtype=torch.int32, device=device)})
    return Variant(model, tasks, {"adapter_names": [task_names(size)[t] for t in tasks]})


# --- the gate ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def gate(base: nn.Module, variants: dict[str, Variant], output: Callable, size: Size) -> dict[str, float]:
    """RMS error of the first and the last sample against fp64 weights with the sample's adapter merged into them.

    At most twice the frozen model's own error in this dtype: its rounding is what any adapted model has as well.
    `output(model, more)` is a tensor with a row per sample.
    """
    device = next(base.parameters()).device
    wide = copy.deepcopy(base).double()
    samples = (0, size.samples - 1)

    def off(got: Tensor, want: Tensor) -> float:
        return ((got.double() - want).pow(2).mean() / want.pow(2).mean()).sqrt().item()

    with poisoned(device):
        got = output(base, {})
    want = output(wide, {})
    errors = {"base": max(off(got[i], want[i]) for i in samples)}
    for name, variant in variants.items():
        with poisoned(device):
            got = output(variant.model.eval(), variant.more)
        found = []
        for i in samples:
            task = task_names(size)[variant.tasks[i]]
            for path, layer in variant.model.base_model.model.named_modules():
                if hasattr(layer, "base_layer"):
                    merged = layer.base_layer.weight.double() + delta(layer, task)
                    wide.get_submodule(path).weight.copy_(merged)
            found.append(off(got[i], output(wide, {})[i]))
        errors[name] = max(found)
        if not errors[name] <= 2 * errors["base"] + 1e-6:
            raise Wrong(
                f"{name} is off by {errors[name]:.1e}, the frozen model by {errors['base']:.1e}; no figure is taken"
            )
    return errors


def gate_of_llava(part: str, size: Size, machine: Machine, p: float, mixed: dict[str, bool]) -> dict[str, float]:
    """The errors of a LLaVA's variants, each mixed or not, by the gate of one with two layers in either tower.

    All layers in fp64 do not fit a GPU beside the model; these models are gone when this returns.
    """
    hidden, layers, *rest = size.vision
    shallow = replace(size, layers=min(size.layers, 2), vision=(hidden, min(layers, 2), *rest))
    base = frozen(part, shallow, machine.device).eval()
    variants = {
        name: variant(base, name.removesuffix("_names"), part, shallow, p, mixed=each) for name, each in mixed.items()
    }
    return gate(base, variants, last_logits(batch(shallow, machine)), shallow)


# --- the measurements -------------------------------------------------------------------------------------------------


def time_part(part: str, size: Size, machine: Machine, seconds: float | None = None) -> Iterator[dict]:
    """Rows of one part; in a mixed batch every sample belongs to another task."""
    base = frozen(part, size, machine.device).eval()
    if part == "training step":
        yield from time_steps(base, size, machine, seconds)
    elif part == "generate":
        yield from time_generation(base, size, machine, seconds)
    else:
        yield from time_training_of_layers(part, base, size, machine, seconds)
        yield from time_decoding_of_layers(part, base, size, machine, seconds)


def kinds(size: Size) -> list[str]:
    return ["ours", "peft"] if size.dtype == torch.float32 else ["ours", "peft", "peft_default"]


def rows(
    part: str,
    size: Size,
    times: Times,
    segments: list[str],
    errors: dict[str, float],
    variants: dict[str, Variant],
    **more,
) -> Iterator[dict]:
    for name in times:
        for segment in segments:
            yield {
                "case": part,
                **size.describe(),
                "T": len(set(variants[name].tasks)) if name in variants else 1,
                **more,
                "implementation": name,
                "direction": segment,
                **figures(times[name][segment], times["base"][segment]),
                **removed(times, name, segment, size.tasks),
                "host_us": spread(times[name]["host"], 1)["median"],
                "rounds": len(times[name]["host"]),
                "times_us": times[name][segment],
                "rms_error": float(f"{errors[name.removesuffix('_split')]:.2e}"),
            }


def bound(run: Callable, name: str) -> Callable:
    return lambda turn, mark: run(name, mark)


def learning(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def time_training_of_layers(part: str, base: nn.Module, size: Size, machine: Machine, seconds) -> Iterator[dict]:
    """Forward and backward of one task, with the gradient of x and of every adapter parameter."""
    variants = {kind: variant(base, kind, part, size, DROPOUT, mixed=False) for kind in kinds(size)}
    x = torch.randn(size.samples, size.tokens, size.hidden, dtype=size.dtype, device=machine.device)
    errors = gate(base, variants, lambda model, more: model(x.to(dtype_of(model)), **more), size)
    models = {"base": base} | {name: variant.model.train() for name, variant in variants.items()}
    x.requires_grad_()
    dy = torch.randn_like(x)

    def run(name: str, mark: Callable[[], None]) -> None:
        model = models[name]
        y = model(x)
        mark()
        torch.autograd.grad(y, [x, *learning(model)], dy)
        mark()

    times = measure(machine, {name: bound(run, name) for name in models}, ["forward", "backward"], seconds=seconds)
    for found in times.values():
        found["both"] = [sum(pair) for pair in zip(found["forward"], found["backward"], strict=True)]
    about = {"training": True, "p": DROPOUT, "tokens": size.tokens}
    for row in rows(part, size, times, ["forward", "backward", "both"], errors, variants, **about):
        if row["direction"] == "both":
            model = models[row["implementation"]]
            row["saved_bytes"] = saved_bytes(partial(model, x), list(model.parameters()))
            row["peak_bytes"] = peak_bytes(machine, lambda: run(row["implementation"], lambda: None))  # noqa: B023
        yield row


def dtype_of(model: nn.Module) -> torch.dtype:
    """Of the base: PEFT's adapters may be wider."""
    return next(p.dtype for name, p in model.named_parameters() if "lora" not in name)


def time_decoding_of_layers(part: str, base: nn.Module, size: Size, machine: Machine, seconds) -> Iterator[dict]:
    """A token of every sample."""
    variants = {
        "ours": variant(base, "ours", part, size, 0.0, mixed=True),
        "peft_names": variant(base, "peft", part, size, 0.0, mixed=True),
    }
    x = torch.randn(size.samples, 1, size.hidden, dtype=size.dtype, device=machine.device)

    def output(model: nn.Module, more: dict) -> Tensor:
        return model(x.to(dtype_of(model)), **more)

    errors = gate(base, variants, output, size)
    calls = {"base": (base, {})} | {name: (v.model, v.more) for name, v in variants.items()}

    def run(name: str, mark: Callable[[], None]) -> None:
        model, more = calls[name]
        model(x, **more)
        mark()

    with torch.no_grad():
        times = measure(machine, {name: bound(run, name) for name in calls}, ["forward"], seconds=seconds)
    yield from rows(part, size, times, ["forward"], errors, variants, training=False, p=0.0, tokens=1)


def batch(size: Size, machine: Machine) -> dict[str, Tensor]:
    """Every sample with one image, then text."""
    ids = torch.randint(3, size.vocabulary - 1, (size.samples, size.tokens), device=machine.device)
    ids[:, 1 : 1 + size.image_tokens] = size.vocabulary - 1
    edge = size.vision[3]
    images = torch.randn(size.samples, 3, edge, edge, dtype=size.dtype, device=machine.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": images}


def last_logits(inputs: dict[str, Tensor]) -> Callable:
    def output(model: nn.Module, more: dict) -> Tensor:
        images = inputs["pixel_values"].to(dtype_of(model))
        return model(**(inputs | {"pixel_values": images}), **more, logits_to_keep=1).logits[:, -1]

    return output


def time_steps(base: nn.Module, size: Size, machine: Machine, seconds: float | None) -> Iterator[dict]:
    """Forward, backward and AdamW; PEFT trains one adapter on all samples, or (split) an adapter after another."""
    part = "training step"
    base.enable_input_require_grads()  # before the copies: all go back to the embeddings
    mixed = {kind: kind == "ours" for kind in kinds(size)}
    errors = gate_of_llava(part, size, machine, DROPOUT, mixed)
    variants = {kind: variant(base, kind, part, size, DROPOUT, mixed=each) for kind, each in mixed.items()}
    inputs = batch(size, machine)
    set_task(variants["ours"].model, *task_names(size))
    models = {"base": base} | {name: v.model.train() for name, v in variants.items()}
    models["peft_split"] = models["peft"]
    tasks = {"peft_split": list(range(size.tasks))}
    optimizers = {}
    for name, model in models.items():
        adapters = [p for n, p in model.named_parameters() if "lilora_" in n or "lora_" in n]
        optimizers[name] = torch.optim.AdamW(adapters, lr=1e-4) if adapters else None

    def loss(name: str, rows: slice = slice(None)) -> Tensor:
        share = {key: value[rows] for key, value in inputs.items()}
        more = variants[name].more if name in variants else {}
        return models[name](**share, labels=share["input_ids"], **more).loss

    def run(name: str, mark: Callable[[], None]) -> None:
        optimizer = optimizers[name]
        for task in tasks.get(name, [None]):
            if task is None:
                loss(name).backward()
            else:
                models[name].set_adapter(task_names(size)[task])
                loss(name, slice(task, None, size.tasks)).backward()
        if tasks.get(name):
            models[name].set_adapter(task_names(size)[0])
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        mark()

    times = measure(machine, {name: bound(run, name) for name in models}, ["step"], seconds=seconds)
    about = {"training": True, "p": DROPOUT, "tokens": size.tokens}
    for row in rows(part, size, times, ["step"], errors, variants, **about):
        name = row["implementation"]
        if name == "peft_split":
            row["T"] = size.tasks
        else:
            row["saved_bytes"] = saved_bytes(partial(loss, name), list(models[name].parameters()))
        row["peak_bytes"] = peak_bytes(machine, lambda: run(name, lambda: None))  # noqa: B023
        yield row


def time_generation(base: nn.Module, size: Size, machine: Machine, seconds: float | None) -> Iterator[dict]:
    """Greedy, prompt with image and a number of new tokens for every sample."""
    part = "generate"
    errors = gate_of_llava(part, size, machine, 0.0, {"ours": True, "peft_names": True})
    variants = {
        "ours": variant(base, "ours", part, size, 0.0, mixed=True),
        "peft_names": variant(base, "peft", part, size, 0.0, mixed=True),
    }
    inputs = batch(size, machine)
    calls = {"base": (base, {})} | {name: (v.model, v.more) for name, v in variants.items()}
    length = {"max_new_tokens": size.new_tokens, "min_new_tokens": size.new_tokens, "do_sample": False}

    for model, _ in calls.values():
        model.eval()

    def run(name: str, mark: Callable[[], None]) -> None:
        model, more = calls[name]
        model.generate(**inputs, **length, **more)
        mark()

    times = measure(machine, {name: bound(run, name) for name in calls}, ["generate"], seconds=seconds)
    about = {"training": False, "p": 0.0, "tokens": size.tokens, "new_tokens": size.new_tokens}
    for row in rows(part, size, times, ["generate"], errors, variants, **about):
        row["tokens_per_s"] = round(1e6 * size.samples * size.new_tokens / row["us"]["median"], 1)
        yield row
