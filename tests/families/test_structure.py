"""Which linear layers get adapters follows from the structure of a model, whatever its family."""

import re
import warnings

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from support.families import randomise
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

import lilora
from lilora.bank.export import export_lora
from lilora.errors import UserError
from lilora.families import linear_layers, pattern_of, register_family, target_modules
from lilora_kernels import LiLoRALinear

NOT_BUILT_FROM_DEFAULTS = {
    "aya_vision", "chameleon", "cohere_compass", "deepseek_ocr2", "diffusion_gemma", "emu3", "evolla", "fast_vlm", "gemma3n",
    "granite4_vision", "hunyuan_vl", "perception_lm", "qwen4_exp",
}  # fmt: skip
ATTENTION_ALONE = {"qwen3_vl_moe", "qwen3_omni_moe_thinker", "inkling2", "inkling_mm_model", "nemotron_h_omni"}


def small(config):
    """At most four layers in every part: what lies in them is the same."""
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        for name in ("num_hidden_layers", "num_layers", "depth", "encoder_layers", "decoder_layers"):
            if isinstance(getattr(part, name, None), int) and getattr(part, name) > 4:
                setattr(part, name, 4)
        if getattr(part, "layer_types", None):
            part.layer_types = part.layer_types[:4]
    return config


def test_every_family_of_transformers_that_sees_images_has_linear_layers_to_adapt():
    built, without, attention_alone = 0, [], set()
    for model_type in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        if model_type in NOT_BUILT_FROM_DEFAULTS:
            continue
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            model = transformers.AutoModelForImageTextToText.from_config(small(CONFIG_MAPPING[model_type]()))
        built += 1
        found, more = linear_layers(model), linear_layers(model, attention=True)
        if not found:
            without.append(model_type)
        assert set(found) <= set(more)
        if found == more:
            attention_alone.add(model_type)
        for name in more:
            assert not re.search(r"vision|visual|image|router|lm_head|\.gate$|experts?\.\d", name), (model_type, name)
    assert built == len(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - len(NOT_BUILT_FROM_DEFAULTS)
    assert without == []
    assert attention_alone == ATTENTION_ALONE


def test_a_pattern_matches_its_names_and_no_others():
    names = ["a.layers.0.mlp.up", "a.layers.11.mlp.up", "a.layers.0.mlp.down", "b.fc1", "head"]
    pattern = pattern_of(names)
    assert pattern == r"a\.layers\.\d+\.mlp\.(up|down)|b\.fc1|head"
    assert all(re.fullmatch(pattern, name) for name in names)
    assert not any(re.fullmatch(pattern, name) for name in ("a.layers.0.mlp.gate", "a.layers.x.mlp.up", "ahead"))


class Elsewhere(nn.Module):
    """A model that transformers does not know."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn": nn.Linear(8, 8), "ff": nn.Linear(8, 8)}) for _ in range(2))
        self.bridge, self.head = nn.Linear(8, 8), nn.Linear(8, 8)


def test_a_model_from_elsewhere_and_what_its_author_registers(monkeypatch):
    model = Elsewhere()
    assert target_modules(model) == r"(.*\.)?(blocks\.\d+\.ff)"
    assert target_modules(model, attention=True) == r"(.*\.)?(blocks\.\d+\.(attn|ff))"
    with pytest.raises(
        UserError,
        match=r"projector of model type 'Elsewhere' .*lilora.register_family\(\.\.\., projector=\.\.\.\) does",
    ):
        target_modules(model, projector=True)
    monkeypatch.setattr("lilora.families._FAMILIES", {})
    register_family("Elsewhere", mlp="head", attention=r"blocks\.\d+\.attn", projector="bridge")
    assert target_modules(model) == r"(.*\.)?(head)"
    assert target_modules(model, projector=True, attention=True) == r"(.*\.)?(head|blocks\.\d+\.attn|bridge)"
    with pytest.raises(UserError, match=r"register_family\('other'\): mlp is '\(', which is no regular expression"):
        register_family("other", mlp="(")


@pytest.mark.parametrize(
    "model, sentence",
    [
        ("no such type", "is unknown to transformers; pass the model, or target_modules"),
        (
            nn.Sequential(nn.Linear(4, 4)),
            "has no linear layers in the blocks of its language model; pass target_modules",
        ),
    ],
)
def test_a_model_without_targets_is_one_sentence(model, sentence):
    with pytest.raises(UserError, match=sentence) as refused:
        target_modules(model)
    assert "\n" not in str(refused.value)


# --- text alone ---------------------------------------------------------------------------------------------------------

SIZES = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
BERT = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
TEXT = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES, **GPT2)),
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, **BERT, num_labels=3)),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=40,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    ),
}
TASKS = ("a", "b", None)


def adapted(name):
    torch.manual_seed(0)
    model = TEXT[name]().double().eval()
    config = lilora.LiLoRAConfig(
        r=4, sub_rank=2, alpha=8, dropout=0.0, target_modules=target_modules(model, attention=True)
    )
    model = get_peft_model(model, config, adapter_name="a", autocast_adapter_dtype=False)
    model.add_adapter("b", config)
    randomise(model)
    return model.eval()


def inputs_of(name, rows=slice(None)):
    ids = torch.randint(3, 40, (3, 7), generator=torch.Generator().manual_seed(1))[rows]
    more = {"decoder_input_ids": ids[:, :4]} if name == "t5" else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}


@pytest.mark.parametrize("name", TEXT)
def test_a_mixed_batch_of_text_is_that_of_single_tasks(name):
    model = adapted(name)
    with torch.no_grad():
        mixed = model(**inputs_of(name), task_ids=list(TASKS)).logits
        for i, task in enumerate(TASKS):
            alone = model(**inputs_of(name, slice(i, i + 1)), task_ids=[task]).logits
            torch.testing.assert_close(mixed[i : i + 1], alone, rtol=0, atol=1e-12)
            other = model(**inputs_of(name, slice(i, i + 1)), task_ids=[TASKS[i - 1]]).logits
            assert (other - alone).abs().max() > 1e-3


@pytest.mark.parametrize("name", TEXT)
def test_merged_and_exported_text_models_compute_the_same(name, tmp_path):
    model = adapted(name)
    with torch.no_grad():
        wanted = model(**inputs_of(name), task_ids=["b"] * 3).logits
        export_lora(model, "b", tmp_path / "b")
        model.set_adapter("b")
        torch.testing.assert_close(model.merge_and_unload()(**inputs_of(name)).logits, wanted, rtol=0, atol=1e-10)
        torch.manual_seed(0)
        with warnings.catch_warnings(action="ignore"):  # PEFT says that it sets fan_in_fan_out for Conv1D
            plain = PeftModel.from_pretrained(TEXT[name]().double().eval(), tmp_path / "b")
        torch.testing.assert_close(plain(**inputs_of(name)).logits, wanted, rtol=0, atol=1e-5)


def test_a_conv1d_is_a_base_like_another():
    base = transformers.pytorch_utils.Conv1D(12, 8)  # [K, N] = [8, 12]
    layer = LiLoRALinear(base, r=4, sub_rank=2, dropout=0.0)
    layer.add_task("a")
    for kind in (layer.lilora_A, layer.lilora_B, layer.lilora_U, layer.lilora_V):
        nn.init.normal_(kind["a"])
    x, weight = torch.randn(3, 8), base.weight.clone()
    wanted = layer(x)
    assert (wanted - base(x)).abs().max() > 0.1
    layer.merge("a")
    torch.testing.assert_close(layer(x), wanted)
    layer.unmerge()
    torch.testing.assert_close(base.weight, weight)


def test_heads_of_several_tasks_train_in_one_batch_as_each_alone():
    """A classifier for every task, in modules_to_save: its rows, and its gradients, are those of its samples."""
    torch.manual_seed(0)
    config = lilora.LiLoRAConfig(r=4, dropout=0.0, task_type="SEQ_CLS", train_a="never", train_b0="never")
    model = get_peft_model(TEXT["bert"]().double(), config, adapter_name="a", autocast_adapter_dtype=False)
    model.add_adapter("b", config)
    randomise(model)
    head = model.base_model.model.classifier
    for copy in head.modules_to_save.values():
        nn.init.normal_(copy.weight)
    inputs, labels = inputs_of("bert"), torch.tensor([0, 2, 1])
    with pytest.raises(ValueError, match="the batch has samples of task 'b', and \\['a'\\] train"):
        model(**inputs, task_ids=["a", "b", "a"])
    model.base_model.set_adapter(["a", "b"])
    logits = model(**inputs, task_ids=["a", "b", "a"]).logits
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    mixed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for task, rows in (("a", [0, 2]), ("b", [1])):
        model.set_adapter(task)
        alone = model(**{name: x[rows] for name, x in inputs.items()}).logits
        torch.testing.assert_close(alone, logits[rows].detach(), rtol=0, atol=1e-12)
        torch.nn.functional.cross_entropy(alone, labels[rows], reduction="sum").backward()
    assert {f"base_model.model.classifier.modules_to_save.{task}.weight" for task in "ab"} <= mixed.keys()
    for name, p in model.named_parameters():
        if name in mixed:
            torch.testing.assert_close(mixed[name], p.grad, rtol=0, atol=1e-12)
