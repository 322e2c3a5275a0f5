"""Tiny models with LiLoRA adapters, and what the tests of PEFT's habits look at in them."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from lilora import LiLoRAConfig
from lilora.families import target_modules
from lilora.peft.layer import adapted_layers

VOCAB, IMAGE = 40, 39
MLP = ["gate_proj", "up_proj", "down_proj"]
QUIET = [  # warnings of what these tests do on purpose
    pytest.mark.filterwarnings("ignore:Adapter name:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
    pytest.mark.filterwarnings("ignore:. was active:UserWarning"),
]
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


# --- base models and their inputs ---------------------------------------------------------------------------------------


def llama(**changes):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT | changes)).double().eval()


def llava():
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **TEXT},
        vision_config={"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, **vision},
        image_token_id=IMAGE,
    )
    return transformers.LlavaForConditionalGeneration(config).double().eval()


class MultiLayerPerceptron(nn.Module):
    """A model that transformers does not know."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(7, 9), nn.Linear(9, 9), nn.Linear(9, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def mlp():
    return MultiLayerPerceptron().double().eval()


def ids(samples=3, length=5):
    return torch.randint(2, VOCAB - 1, (samples, length))


def llava_batch(images):
    """Prompts whose number of images is given for each sample; four image tokens each."""
    rows = []
    for count in images:
        rows.append(torch.cat([torch.full((4 * count,), IMAGE), torch.randint(2, IMAGE, (12 - 4 * count,))]))
    return {"input_ids": torch.stack(rows), "pixel_values": torch.randn(sum(images), 3, 8, 8, dtype=torch.float64)}


# --- adapters -----------------------------------------------------------------------------------------------------------


def settings(preset="frozen", **changes):
    small = {"r": 6, "sub_rank": 3, "alpha": 9.0, "dropout": 0.0, "target_modules": list(MLP)}
    return LiLoRAConfig.preset(preset, **small | changes)


def randomise(model):
    for parameter in [p for name, p in model.named_parameters() if "lilora_" in name]:
        parameter.data.normal_(std=0.3)


def adapted(tasks=("a", "b"), base=None, **changes):
    """A model with random tasks: not at the initialisation, where every task is the base model."""
    model = get_peft_model(llama() if base is None else base, settings(**changes), adapter_name=tasks[0])
    for task in tasks[1:]:
        model.add_adapter(task, settings(**changes))
    randomise(model)
    return model.eval()


@dataclass(frozen=True)
class Case:
    """A base model, what of it is adapted and saved beside the adapters, and with which settings."""

    base: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Tensor]]  # three samples
    targets: list[str] | str
    head: str
    settings: dict = field(default_factory=dict)

    def config(self, **changes) -> LiLoRAConfig:
        return settings(**{"target_modules": self.targets, **self.settings, **changes})

    def adapted(self, tasks=("a", "b"), base=None, **changes):
        return adapted(
            tasks, self.base() if base is None else base, target_modules=self.targets, **self.settings, **changes
        )

    def learns(self, later: bool) -> tuple[str, ...]:
        """Which shared factors learn with the first task, or with a later one."""
        policies = self.config()
        named = {"A": policies.train_a, "B0": policies.train_b0}
        return tuple(key for key, policy in named.items() if policy == "always" or (policy == "first" and not later))


MODELS = {
    "mlp": Case(mlp, lambda: {"x": torch.randn(3, 7, dtype=torch.float64)}, ["first", "second"], "head"),
    "llama": Case(llama, lambda: {"input_ids": ids()}, MLP, "lm_head"),
    "llava": Case(llava, lambda: llava_batch((2, 0, 1)), target_modules("llava", projector=True), "lm_head"),
}
SETTINGS = {
    "frozen": {"preset": "frozen"},
    "released": {"preset": "released"},
    "paper": {"preset": "paper"},
    "plain": {"preset": "frozen", "fusion": False},
}
ROWS = [
    ("mlp", "released"),
    ("mlp", "paper"),
    ("llama", "frozen"),
    ("llama", "paper"),
    ("llama", "plain"),
    ("llava", "frozen"),
]
CASES = {f"{model}-{name}": replace(MODELS[model], settings=SETTINGS[name]) for model, name in ROWS}


# --- what a model does --------------------------------------------------------------------------------------------------


def output(model, batch, **kwargs) -> Tensor:
    with torch.no_grad():
        y = model(**batch, **kwargs)
    return y if isinstance(y, Tensor) else y.logits


def sample(batch, i):
    """Sample i of a batch alone: images are packed one sample after the other."""
    one = {name: value[i : i + 1] for name, value in batch.items() if name != "pixel_values"}
    if "pixel_values" in batch:
        counts = (batch["input_ids"] == IMAGE).sum(1) // 4
        start, count = int(counts[:i].sum()), int(counts[i])
        one |= {"pixel_values": batch["pixel_values"][start : start + count]} if count else {}
    return one


def logits(model, x, **kwargs):
    return output(model, {"input_ids": x}, **kwargs)


def of_task(model, task, x, **kwargs):
    model.set_adapter(task)
    return output(model, x if isinstance(x, dict) else {"input_ids": x}, **kwargs)


def train(model, x, steps=3, **kwargs):
    """Steps of AdamW on every parameter that learns; on the language model's loss where the batch is only ids."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        if isinstance(x, dict):
            y = model(**x, **kwargs)
            (y if isinstance(y, Tensor) else y.logits).square().mean().backward()
        else:
            model(input_ids=x, labels=x, **kwargs).loss.backward()
        optimizer.step()
    model.eval()


def learning(model):
    """What requires gradients, as (layer, A, B0 or task); other parameters by name."""
    found = set()
    for path, layer in adapted_layers(model).items():
        for task in layer.tasks:
            for key, shared in (("A", layer.lilora_A), ("B0", layer.lilora_B)):
                found |= {(path, key)} if shared[task].requires_grad else set()
            own = [p.requires_grad for p in layer._own(task)]
            assert len(set(own)) == 1
            found |= {(path, task)} if own[0] else set()
    return found | {name for name, p in model.named_parameters() if p.requires_grad and "lilora_" not in name}


def expected_learning(model, *what):
    return {(path, key) for path in adapted_layers(model) for key in what}


def state_of(model):
    """All that a refused change must leave as it was."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    tasks = inner.__dict__.get("lilora_tasks")
    return {
        "values": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "learning": {name: p.requires_grad for name, p in model.named_parameters()},
        "modules": {name: type(module) for name, module in model.named_modules()},
        "attributes": set(inner.__dict__),
        "tasks": None if tasks is None else list(tasks.names),
        "configs": list(getattr(model, "peft_config", {})),
        "active": {name: layer.active for name, layer in adapted_layers(model).items()},
    }


# --- assertions ---------------------------------------------------------------------------------------------------------


def assert_close(got, expected, rel=1e-10):
    torch.testing.assert_close(got, expected, rtol=0, atol=rel * expected.abs().max().item())


def assert_tied(model, tasks):
    layers = adapted_layers(model)
    assert layers
    for layer in layers.values():
        assert layer.tasks == list(tasks)
        for shared in (layer.lilora_A, layer.lilora_B):
            assert len(shared) == len(tasks)
            assert len({id(parameter) for parameter in shared.values()}) == 1
        if len(layer.active) == 1:
            assert layer._slot[0] is layer.lilora_A[tasks[0]]
            assert layer._slot[1] is layer.lilora_B[tasks[0]]


def assert_unchanged(model, before):
    after = state_of(model)
    values, old = after.pop("values"), before.pop("values")
    assert list(values) == list(old)
    assert all(torch.equal(values[name], old[name]) for name in old)
    assert after == before


def one_sentence(caught):
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
