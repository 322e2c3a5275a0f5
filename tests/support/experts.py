"""Tiny models with routed experts in fp64."""

import torch
import transformers
from peft import get_peft_model

import lilora

TASKS = ["a", "b", "c"]
TEXT = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "num_experts_per_tok": 2,
}  # fmt: skip
MODELS = {
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**TEXT, num_experts=4, moe_intermediate_size=12),
    "mixtral": lambda: transformers.MixtralConfig(**TEXT, num_local_experts=4),
    "gpt_oss": lambda: transformers.GptOssConfig(**TEXT, num_local_experts=4),
}


def plain(module: torch.nn.Module) -> torch.nn.Module:
    """With experts that run in fp64, which torch's grouped product does not take."""
    for part in module.modules():
        if hasattr(part, "config"):
            part.config._experts_implementation = "eager"
    return module


@torch.no_grad()
def base(name: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    torch.manual_seed(0)
    model = plain(transformers.AutoModelForCausalLM.from_config(MODELS[name]()).to(dtype).eval())
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


def settings(**changes) -> lilora.LiLoRAConfig:
    small = {"r": 6, "sub_rank": 3, "alpha": 9.0, "dropout": 0.0, "experts": True, "expert_r": 4, "expert_sub_rank": 2}
    return lilora.LiLoRAConfig(**{**small, **changes})


@torch.no_grad()
def randomise(model: torch.nn.Module, std: float = 0.4) -> None:
    for name, parameter in model.named_parameters():
        if ".lilora_" in name:
            parameter.normal_(std=std)


def adapted(name: str, tasks=TASKS, model=None, **changes):
    model = base(name) if model is None else model
    model = get_peft_model(model, settings(**changes), adapter_name=tasks[0], autocast_adapter_dtype=False)
    for task in tasks[1:]:
        model.add_adapter(task, settings(**changes))
    torch.manual_seed(1)
    randomise(model)
    return model.eval()


def ids(samples: int = 4, length: int = 7) -> torch.Tensor:
    return torch.randint(3, 40, (samples, length), generator=torch.Generator().manual_seed(2))
