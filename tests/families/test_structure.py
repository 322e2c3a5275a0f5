"""Which linear layers get adapters follows from the structure of a model, whatever its family."""

import importlib.util
import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from peft import get_peft_model
from support.families import base, batch, randomise
from support.family_configs import NO_IMAGES
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

import lilora
from lilora.errors import UserError
from lilora.families import linear_layers, pattern_of, register_family, target_modules
from lilora_kernels import LiLoRALinear
from lilora_kernels.routing.context import AHEAD, TEXT
from lilora_kernels.routing.placement import places
from lilora_kernels.routing.vision_tokens import VisionTokens

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


def test_every_family_of_transformers_that_sees_images_has_linear_layers_to_adapt(record_property):
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
    types = len(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    assert built == types - len(NOT_BUILT_FROM_DEFAULTS)
    assert without == []
    assert attention_alone == ATTENTION_ALONE
    left_out = {"not built": sorted(NOT_BUILT_FROM_DEFAULTS), "attention alone": sorted(attention_alone)}
    record_property("structure", {"types": types, "built": built, "found": built - len(without)} | left_out)


def test_a_pattern_matches_its_names_and_no_others():
    names = ["a.layers.0.mlp.up", "a.layers.11.mlp.up", "a.layers.0.mlp.down", "b.0", "b.2", "head"]
    pattern = pattern_of(names)
    assert pattern == r"a\.layers\.\d+\.mlp\.(up|down)|b\.(0|2)|head"
    assert all(re.fullmatch(pattern, name) for name in names)
    assert not any(re.fullmatch(pattern, name) for name in ("a.layers.0.mlp.gate", "a.layers.x.mlp.up", "b.1", "ahead"))


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


@pytest.fixture(scope="module")
def outside():
    path = Path(__file__).parents[2] / "examples" / "outside_model.py"
    example = importlib.util.module_from_spec(importlib.util.spec_from_file_location("outside_model", path))
    example.__spec__.loader.exec_module(example)
    yield example
    register_family("sketch")


def test_the_example_of_a_model_class_from_outside(outside, capsys):
    outside.main()
    assert capsys.readouterr().out == "a mixed batch differs from single ones by 0e+00\n"
    model, inputs = outside.adapted(), outside.batch()
    assert places(model.get_base_model(), ["tower.0", "bridge", "language_model.lm_head"]) == {
        "tower.0": AHEAD, "bridge": AHEAD, "language_model.lm_head": TEXT,
    }  # fmt: skip
    one_less = inputs["sketches"][:2]
    with pytest.raises(ValueError, match=r"tower\.0, ahead of the language model, sees \[2, 4\] rows, which \[8, 4\]"):
        model(inputs["input_ids"], sketches=one_less, task_ids=["name", "count"])


@pytest.mark.parametrize(
    "numbers, sentence",
    [
        (lambda ids, inputs: [8], r"vision_tokens of model type 'sketch' returned \[8\]; it must return 2 numbers"),
        (lambda ids, inputs: VisionTokens([1, 2], None), None),
        (None, "is not below the model's decoder, and nothing tells whose"),
    ],
    ids=["too few", "other images", "not told"],
)
def test_what_is_told_of_images_is_followed_or_refused(outside, numbers, sentence):
    register_family("sketch", projector="bridge", vision_tokens=numbers)
    model, inputs = outside.adapted(), outside.batch()
    if sentence:
        with pytest.raises(ValueError, match=sentence):
            model(**inputs, task_ids=["name", "count"])
        return
    rows = []
    layer = model.get_base_model().bridge
    layer.register_forward_hook(
        lambda layer, args, y: rows.extend(layer.model_tasks.current.rows(args[0], layer.place).tolist())
    )
    model(**inputs, task_ids=["name", "count"])
    assert rows == [0] * 4 + [1] * 8


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
    model = get_peft_model(base("bert (classification)"), config, adapter_name="a", autocast_adapter_dtype=False)
    model.add_adapter("b", config)
    randomise(model)
    head = model.base_model.model.classifier
    for copy in head.modules_to_save.values():
        nn.init.normal_(copy.weight)
    inputs, labels = batch("bert (classification)", NO_IMAGES).inputs(), torch.tensor([0, 2, 1])
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


@pytest.mark.parametrize("name", ["aya_vision", "llama"])
def test_without_targets_the_mlps_of_any_decoder_are_adapted(name):
    model = get_peft_model(base(name), lilora.LiLoRAConfig(r=4, sub_rank=2))
    adapted = {name.split(".")[-1] for name, part in model.named_modules() if isinstance(part, LiLoRALinear)}
    assert adapted == {"gate_proj", "up_proj", "down_proj"}


def test_routed_experts_are_adapted_on_request():
    config = lilora.LiLoRAConfig(r=4, sub_rank=2, experts=True)
    names = (name for name, _ in get_peft_model(base("qwen3_moe"), config).named_parameters())
    assert any("experts" in name and "lilora" in name for name in names)
    with pytest.raises(UserError, match="leave it out of target_modules and give experts=True"):
        get_peft_model(base("qwen3_moe"), lilora.LiLoRAConfig(r=4, target_modules=r".*\.experts"))
