"""PCLR's queries: of words and of images, by the vision tower's structure."""

import pytest
import torch
import transformers
from support import families
from support.clip_llava import IMAGE, batch
from support.family_configs import FAMILIES
from support.pclr import learned, pclr
from torch.nn.functional import normalize

from lilora.errors import UserError
from lilora.families import without_memory
from lilora.methods import make_method
from lilora.methods.pclr.queries import PoolTasks, attach_pools, query_source


def test_queries_are_the_mean_of_the_prompts_words_and_of_the_images_class_tokens():
    method, images = pclr(), [1, 0, 2]
    inputs = batch(images)
    inputs["attention_mask"][1, :3] = 0
    query = method.pool_tasks.queries(method.model, inputs)
    embedding = method.model.get_input_embeddings().weight
    tower = method.model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 0]
    pictures = iter(tower)
    for i, count in enumerate(images):
        words = [
            embedding[token]
            for token, attended, label in zip(
                *(inputs[n][i] for n in ("input_ids", "attention_mask", "labels")), strict=True
            )
            if attended and label == -100 and token != IMAGE
        ]
        torch.testing.assert_close(query.text[i], normalize(torch.stack(words).mean(0), dim=0))
        seen = [normalize(next(pictures), dim=0) for _ in range(count)]
        wanted = normalize(torch.stack(seen).mean(0), dim=0) if seen else torch.zeros(16)
        torch.testing.assert_close(query.vision[i], wanted)


@pytest.mark.parametrize("name", ["gemma4", "lfm2_vl", "idefics2"])
def test_padding_of_images_has_no_part_in_their_queries(name):
    model = families.base(name)
    tasks = PoolTasks(query_source(model))
    attach_pools(model, tasks)
    inputs = families.batch(name, FAMILIES[name].batches[0]).inputs()
    pixels = inputs["pixel_values"]
    noise = torch.randn_like(pixels)
    if name == "idefics2":  # the last columns of patches, and tiles that are not there
        tiles = pixels.flatten(2).any(2)[..., None, None]
        there = inputs["pixel_attention_mask"] & tiles
        there[..., 8:] = False
        inputs["pixel_attention_mask"], there, noise = there, there.unsqueeze(2), noise * tiles.unsqueeze(2)
    elif name == "gemma4":
        there = (inputs["image_position_ids"] >= 0).all(-1, keepdim=True)
    else:
        there = inputs["pixel_attention_mask"].bool().unsqueeze(-1)
    assert not there.all()
    seen = tasks.queries(model, inputs).vision
    torch.testing.assert_close(tasks.queries(model, inputs | {"pixel_values": pixels + noise * ~there}).vision, seen)
    assert (tasks.queries(model, inputs | {"pixel_values": pixels + noise * there}).vision - seen).abs().max() > 1e-2


@pytest.mark.parametrize("vision_query", ["tokens", "pooled"])
def test_the_vision_query_that_the_settings_name(vision_query):
    method, inputs = pclr(vision_query=vision_query), batch([1, 0, 1])
    out = method.model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
    wanted = out.pooler_output if vision_query == "pooled" else out.hidden_states[-2][:, 0]
    got = method.pool_tasks.queries(method.model, inputs).vision
    torch.testing.assert_close(
        got, torch.stack([normalize(wanted[0], dim=0), torch.zeros(16), normalize(wanted[1], dim=0)])
    )
    with torch.no_grad():
        method.model(**inputs)
    assert torch.equal(method.pool_tasks.last.query().vision, got)


def test_a_tower_without_pooled_output_is_refused():
    model = families.base("qwen2_5_vl")
    tasks = PoolTasks(query_source(model, "pooled"))
    attach_pools(model, tasks)
    with pytest.raises(UserError, match="Qwen2_5_VLModel has no pooled output for each image; leave out vision_query"):
        tasks.queries(model, families.batch("qwen2_5_vl", FAMILIES["qwen2_5_vl"].batches[0]).inputs())


def test_the_tower_of_models_of_full_size():
    """Of many blocks, and of stages of blocks."""
    qwen = without_memory(transformers.Qwen2_5_VLConfig())
    vision = query_source(qwen).vision
    assert vision.module is qwen.model.visual.blocks[-2]
    assert (vision.feature, vision.width) == ("mean", qwen.config.vision_config.hidden_size)
    florence = without_memory(transformers.Florence2Config())
    vision = query_source(florence).vision
    assert vision.module is florence.model.vision_tower
    assert (vision.feature, vision.width) == ("mean", florence.config.vision_config.embed_dim[-1])


def test_images_that_the_tower_has_not_seen_are_refused():
    method, inputs = learned(1), batch()
    inputs["pixel_values_videos"] = inputs.pop("pixel_values")[:, None]
    context = method.pool_tasks.context_of(method.model, None, (), inputs)
    with pytest.raises(ValueError, match="pass images with the prompt, not pixel_values_videos"):
        context.query()


def test_a_forward_sees_the_queries_of_its_own_batch():
    method, inputs = learned(1), batch([1, 0, 1])
    with torch.no_grad():
        method.model(**inputs)
    seen, wanted = method.pool_tasks.last.query(), method.pool_tasks.queries(method.model, inputs)
    assert torch.equal(seen.text, wanted.text)
    assert torch.equal(seen.vision, wanted.vision)


def test_a_model_without_a_vision_tower_is_refused():
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=40
    )
    with pytest.raises(UserError, match="LlamaForCausalLM has no vision tower"):
        make_method("pclr", transformers.LlamaForCausalLM(config), {"target_modules": ".*up_proj"})
