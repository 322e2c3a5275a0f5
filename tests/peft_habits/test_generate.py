"""Generation that does not run through the adapted model's own generate and forward alone."""

import pytest
import torch
from peft import get_peft_model
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
)

import lilora

IMAGE = 39
TOKENS = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
OPT = TOKENS | {
    "model_type": "opt",
    "hidden_size": 16,
    "ffn_dim": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "word_embed_proj_dim": 16,
    "max_position_embeddings": 64,
}
T5 = TOKENS | {"model_type": "t5", "d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 1, "num_heads": 2}
ENCODER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = ENCODER | {"image_size": 8, "patch_size": 4}
QFORMER = ENCODER | {"encoder_hidden_size": 16, "vocab_size": 40}
GREEDY = {"max_new_tokens": 5, "do_sample": False}


def adapted(model, target):
    """The model with the tasks a and b, all weights large enough that tasks choose other tokens."""
    config = lilora.LiLoRAConfig(r=4, sub_rank=2, target_modules=target)
    model = get_peft_model(model.double(), config, adapter_name="a", autocast_adapter_dtype=False)
    model.add_adapter("b", config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=1.0 if "lilora_" in name else 0.5)
    return model.eval()


def alone(model, task, inputs, options):
    if task is None:
        with model.disable_adapter():
            return model.generate(**inputs, **GREEDY, **options)
    model.set_adapter(task)
    return model.generate(**inputs, **GREEDY, **options)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2, "num_return_sequences": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize(
    "config, kind, text, target",
    [
        (Blip2Config, Blip2ForConditionalGeneration, OPT, r".*language_model.*\.fc[12]"),
        (Blip2Config, Blip2ForConditionalGeneration, T5 | {"decoder_start_token_id": 0}, r".*language_model.*\.w[io]"),
        (InstructBlipConfig, InstructBlipForConditionalGeneration, OPT, r".*language_model.*\.fc[12]"),
    ],
    ids=["blip2-opt", "blip2-t5", "instructblip-opt"],
)
def test_models_that_let_a_part_generate(config, kind, text, target, options):
    model = kind(
        config(
            text_config=text, vision_config=VISION, qformer_config=QFORMER, num_query_tokens=4, image_token_index=IMAGE
        )
    )
    model, names = adapted(model, target), ["a", "b", None]
    ids = torch.randint(3, 30, (3, 8))
    ids[:, :4] = IMAGE
    inputs = {"input_ids": ids, "pixel_values": torch.randn(3, 3, 8, 8).double()}
    if config is InstructBlipConfig:
        inputs["qformer_input_ids"] = torch.randint(3, 30, (3, 5))
    got = model.generate(**inputs, task_ids=names, **GREEDY, **options)
    wanted = [
        alone(model, task, {key: value[i : i + 1] for key, value in inputs.items()}, options)
        for i, task in enumerate(names)
    ]
    assert torch.equal(got, torch.cat(wanted))
    assert not torch.equal(wanted[0], wanted[1])
    model.set_adapter("a")
    base = model.unload()
    assert "forward" not in base.language_model.__dict__


def test_assisted_and_looked_up_tokens_are_those_of_the_task():
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model, assistant = (LlamaForCausalLM(LlamaConfig(**TOKENS, **shape)).eval() for _ in range(2))
    model, ids = adapted(model, ["gate_proj", "down_proj"]), torch.randint(3, 30, (1, 6))
    wanted = {task: alone(model, task, {"input_ids": ids}, {}) for task in ("b", "a")}
    assert not torch.equal(wanted["a"], wanted["b"])
    for help_ in ({"assistant_model": assistant.double()}, {"assistant_model": model}, {"prompt_lookup_num_tokens": 2}):
        assert torch.equal(model.generate(input_ids=ids, task_ids=["b"], **help_, **GREEDY), wanted["b"])
