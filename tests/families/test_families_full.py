"""Presets on models of full size, on the meta device: exactly the wanted linears; parameters counted by the command."""

import json
import re
from collections import Counter
from functools import cache

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from lilora.errors import UserError
from lilora.families import target_modules

LLAVA = ["multi_modal_projector.linear_1", "multi_modal_projector.linear_2"]
QWEN = ["visual.merger.mlp.0", "visual.merger.mlp.2"]
IDEFICS = ["connector.modality_projection.proj"]
# Layers of the default config's language model; its projector; linears of the vision tower with the name of an MLP's.
FULL = {
    "llava": (32, LLAVA, 0),
    "llava (Pixtral)": (32, LLAVA, 3 * 24),
    "llava_next": (32, LLAVA, 0),
    "llava_onevision": (32, LLAVA, 0),
    "qwen2_vl": (80, QWEN, 0),
    "qwen2_5_vl": (80, QWEN, 3 * 32),
    "qwen3_vl": (
        32,
        [
            f"visual.{part}.linear_fc{i}"
            for part in ("merger", *(f"deepstack_merger_list.{i}" for i in range(3)))
            for i in (1, 2)
        ],
        0,
    ),
    "internvl": (32, LLAVA, 0),
    "idefics3": (32, IDEFICS, 0),
    "smolvlm": (32, IDEFICS, 0),
    "paligemma": (18, ["multi_modal_projector.linear"], 0),
    "mistral3": (40, ["multi_modal_projector.patch_merger.merging_layer", *LLAVA], 3 * 24),
    "glm4v": (40, [f"visual.merger.{part}proj" for part in ("", "gate_", "up_", "down_")], 3 * 24),
    "gemma3": (26, None, 0),
}


@cache
def full(name):
    model_type, *tower = name.split(" ")
    parts = {"vision_config": {"model_type": "pixtral"}, "text_config": {"model_type": "mistral"}} if tower else {}
    config = CONFIG_MAPPING[model_type](**parts)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize("model_type", FULL)
def test_presets_hit_exactly_the_wanted_linears(model_type):
    layers, projector, lookalikes = FULL[model_type]
    model, config = full(model_type), full(model_type).config
    found = linears(model)
    part = "text_model" if model_type in ("idefics3", "smolvlm") else "language_model"
    kinds = ("gate_up", "down") if model_type == "glm4v" else ("gate", "up", "down")
    mlp = {f"model.{part}.layers.{i}.mlp.{kind}_proj" for i in range(layers) for kind in kinds}
    attention = {f"model.{part}.layers.{i}.self_attn.{kind}_proj" for i in range(layers) for kind in "qkvo"}

    def hits(source, prefix="", **options):
        pattern = target_modules(source, **options)
        return {name for name, _ in model.named_modules() if re.fullmatch(pattern, prefix + name)}

    assert hits(model) == hits(model, prefix="base_model.model.") == mlp
    assert target_modules(config.model_type) == target_modules(model)
    assert hits(model, attention=True) == mlp | attention
    assert mlp | attention <= found.keys()
    kinds = Counter(re.sub(r".*\.", "", name) for name in found.keys() - mlp if "merger" not in name)
    assert sum(kinds[f"{kind}_proj"] for kind in ("gate", "up", "down")) == lookalikes
    if projector is None:
        with pytest.raises(UserError, match=r"its weight is a raw Parameter and no linear layer; leave it out"):
            hits(config, projector=True)
        return
    between = {f"model.{name}" for name in projector}
    assert between <= found.keys()
    assert hits(model, projector=True) == mlp | between
    assert hits(config, projector=True, attention=True) == mlp | attention | between


@pytest.mark.parametrize("model_type, dense, shared", [("qwen3_vl_moe", 0, 0), ("glm4v_moe", 1, 45)])
def test_of_routed_experts_the_layers_beside_them_are_adapted_and_attention_where_there_are_none(
    model_type, dense, shared
):
    model = full(model_type)
    pattern = target_modules(model.config)
    found = {name for name, _ in model.named_modules() if re.fullmatch(pattern, name)}
    layers = model.config.text_config.num_hidden_layers
    wanted = {"mlp": 3 * dense, "mlp.shared_experts": 3 * shared} if shared else {"self_attn": 4 * layers}
    assert Counter(re.findall(r"layers\.\d+\.(.*)\.", name)[0] for name in found) == Counter(wanted)
    assert any(p.dim() == 3 and "experts" in name for name, p in model.named_parameters())


@pytest.mark.parametrize("model_type", FULL)
def test_the_command_counts_parameters_by_the_config_alone(model_type, tmp_path, lilora):
    layers, projector, _ = FULL[model_type]
    full(model_type).config.save_pretrained(tmp_path)
    options = [] if projector else ["--no-projector"]
    code, out, err = lilora("params", "--model", tmp_path, "--json", *options)
    assert code == 0, err
    counted = json.loads(out)
    assert counted["linears"] == layers * (2 if model_type == "glm4v" else 3) + len(projector or ())
    assert counted["base"] == sum(p.numel() for p in full(model_type).parameters())
    if projector is None:
        code, _, err = lilora("params", "--model", tmp_path, "--projector")
        assert code == 2
        assert "no linear layer" in err
