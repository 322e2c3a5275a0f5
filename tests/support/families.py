"""Tiny models of every family, and batches packed as the family's own processor packs them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
import transformers
from peft import get_peft_model
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedConfig

import lilora
from lilora.families import target_modules
from lilora_kernels import LiLoRALinear

TASKS = ["read", "count", "where"]
VOCABULARY, IMAGE, VIDEO, START = 40, 39, 38, 37  # text is below START

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
CLIP = TOWER | {"model_type": "clip_vision_model"}
SIGLIP = TOWER | {"model_type": "siglip_vision_model", "vision_use_head": False}
PIXTRAL = TOWER | {"model_type": "pixtral", "image_size": 32, "head_dim": 8}
VISUAL = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
GRID_TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START}
PINPOINTS = [[8, 16], [16, 8], [16, 16]]


# --- packing: pictures [per sample] -> (image tokens of each picture, the model's inputs) -----------------------------


@dataclass(frozen=True)
class Packing:
    """draw(kind): the picture of a kind (0, 1, 2), of random pixels. pack(pictures): tokens of each, and inputs."""

    draw: Callable[[int], dict[str, Tensor]]
    pack: Callable[[list[list[dict[str, Tensor]]]], tuple[list[list[int]], dict[str, Tensor]]]


def flat(pictures: list[list[dict]], key: str) -> list[Tensor]:
    return [picture[key] for sample in pictures for picture in sample]


def counted(pictures: list[list[dict]]) -> list[list[int]]:
    return [[picture["tokens"] for picture in sample] for sample in pictures]


def stacked(tokens: int, tiles: Sequence[int] = (1, 1, 1)) -> Packing:
    """[tiles, 3, 8, 8], every tile of the same number of tokens."""

    def draw(kind: int) -> dict:
        return {"tokens": tokens * tiles[kind], "pixels": torch.randn(tiles[kind], 3, 8, 8)}

    def pack(pictures: list[list[dict]]) -> tuple:
        pixels = flat(pictures, "pixels")
        return counted(pictures), {"pixel_values": torch.cat(pixels)} if pixels else {}

    return Packing(draw, pack)


# Height and width; tiles with the overview; tokens: the overview's 4, and the unpadded grid with a column of line ends.
ANYRES = [((16, 16), 5, 4 + 4 * 5), ((8, 8), 3, 4 + 2 * 3), ((8, 16), 3, 4 + 2 * 5)]


def anyres(together: bool) -> Packing:
    """[images, most tiles, 3, 8, 8] and image_sizes. together: pictures that share a sample are one tile each."""

    def draw(kind: int) -> dict:
        return {"kind": kind, "pixels": torch.randn(5, 3, 8, 8)}

    def pack(pictures: list[list[dict]]) -> tuple:
        tokens, tiles, sizes = [], [], []
        for sample in pictures:
            cut = [
                ANYRES[p["kind"]] if len(sample) == 1 or not together else (ANYRES[p["kind"]][0], 1, 5) for p in sample
            ]
            tokens.append([length for _, _, length in cut])
            sizes += [size for size, _, _ in cut]
            tiles += [
                torch.cat([p["pixels"][:n], torch.zeros(5 - n, 3, 8, 8)])
                for p, (_, n, _) in zip(sample, cut, strict=True)
            ]
        if not tiles:
            return tokens, {}
        inputs = {"pixel_values": torch.stack(tiles), "image_sizes": torch.tensor(sizes)}
        return tokens, inputs | ({"batch_num_images": torch.tensor([len(s) for s in pictures])} if together else {})

    return Packing(draw, pack)


def tiled() -> Packing:
    """[samples, most tiles, 3, 16, 16], padded with black tiles; 4 tokens a tile."""

    def draw(kind: int) -> dict:
        return {"tokens": 4 * (kind + 1), "pixels": torch.randn(kind + 1, 3, 16, 16)}

    def pack(pictures: list[list[dict]]) -> tuple:
        tiles = [torch.cat([torch.zeros(0, 3, 16, 16), *(p["pixels"] for p in sample)]) for sample in pictures]
        if not (most := max(map(len, tiles))):
            return counted(pictures), {}
        pixels = torch.stack([torch.cat([t, torch.zeros(most - len(t), 3, 16, 16)]) for t in tiles])
        return counted(pictures), {
            "pixel_values": pixels,
            "pixel_attention_mask": torch.ones(*pixels.shape[:2], 16, 16).bool(),
        }

    return Packing(draw, pack)


GRIDS = [(1, 4, 8), (1, 6, 4), (1, 4, 4)]


def gridded(kind_of_input: str = "image", frames: int = 1) -> Packing:
    """[sum of patches, K] and the grids; 4 patches a token. The patches of a token lie together."""

    def draw(kind: int) -> dict:
        _, height, width = GRIDS[kind]
        patches = frames * height * width
        grid = torch.tensor([frames, height, width])
        return {"tokens": patches // 4, "pixels": torch.randn(patches, 3 * 2 * 4 * 4), "grid": grid}

    def pack(pictures: list[list[dict]]) -> tuple:
        pixels = flat(pictures, "pixels")
        if not pixels:
            return counted(pictures), {}
        names = (
            ("pixel_values", "image_grid_thw")
            if kind_of_input == "image"
            else ("pixel_values_videos", "video_grid_thw")
        )
        return counted(pictures), dict(
            zip(names, (torch.cat(pixels), torch.stack(flat(pictures, "grid"))), strict=True)
        )

    return Packing(draw, pack)


SIZES = [(16, 8), (8, 8), (8, 24)]


def sized(unit: int) -> Packing:
    """[images, 3, most height, most width] and image_sizes; a token for every unit x unit pixels."""

    def draw(kind: int) -> dict:
        height, width = SIZES[kind]
        size = torch.tensor([height, width])
        return {"tokens": height * width // unit**2, "pixels": torch.randn(3, height, width), "size": size}

    def pack(pictures: list[list[dict]]) -> tuple:
        pixels = flat(pictures, "pixels")
        if not pixels:
            return counted(pictures), {}
        height, width = (max(p.shape[i] for p in pixels) for i in (1, 2))
        padded = [torch.nn.functional.pad(p, (0, width - p.shape[2], 0, height - p.shape[1])) for p in pixels]
        return counted(pictures), {
            "pixel_values": torch.stack(padded),
            "image_sizes": torch.stack(flat(pictures, "size")),
        }

    return Packing(draw, pack)


# --- families -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """A tiny config, how images are packed, and the token types that the model wants with input_ids [B, L]."""

    config: Callable[[], PreTrainedConfig]
    packing: Packing
    token_types: Callable[[Tensor], dict[str, Tensor]] = lambda ids: {}


def modalities(ids: Tensor) -> dict[str, Tensor]:
    """Text, image or video, for positions in three dimensions."""
    return {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}


def suffix(ids: Tensor) -> dict[str, Tensor]:
    """All but the last two tokens are a prefix, which attends in both directions."""
    return {"token_type_ids": (torch.arange(ids.shape[1]) >= ids.shape[1] - 2).long().expand_as(ids)}


def llava(
    text: str = "llama", vision: dict = CLIP, config: type = transformers.LlavaConfig, **options
) -> PreTrainedConfig:
    return config(text_config=TEXT | {"model_type": text}, vision_config=vision, image_token_index=IMAGE, **options)


def qwen(config: type, **vision) -> PreTrainedConfig:
    return config(text_config=TEXT | MROPE, vision_config=VISUAL | {"out_hidden_size": 16} | vision, **GRID_TOKENS)


def idefics(config: type) -> PreTrainedConfig:
    return config(
        text_config=TEXT | {"model_type": "llama"},
        vision_config=TOWER | {"image_size": 16},
        image_token_id=IMAGE,
        scale_factor=2,
    )


ANY = {"image_grid_pinpoints": PINPOINTS}
FULL = {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}
FAMILIES = {
    "llava": Family(llava, stacked(4)),
    "llava (Pixtral)": Family(partial(llava, "mistral", PIXTRAL, **FULL), sized(4)),
    "llava_next": Family(partial(llava, "mistral", config=transformers.LlavaNextConfig, **ANY), anyres(together=False)),
    "llava_onevision": Family(
        partial(llava, "qwen2", SIGLIP, transformers.LlavaOnevisionConfig, **ANY, **FULL), anyres(together=True)
    ),
    "qwen2_vl": Family(partial(qwen, transformers.Qwen2VLConfig, embed_dim=16, mlp_ratio=2), gridded(), modalities),
    "qwen2_5_vl": Family(
        partial(qwen, transformers.Qwen2_5_VLConfig, window_size=16, fullatt_block_indexes=[1]), gridded(), modalities
    ),
    "qwen3_vl": Family(
        partial(qwen, transformers.Qwen3VLConfig, num_position_embeddings=16, deepstack_visual_indexes=[0, 1]),
        gridded(),
        modalities,
    ),
    "internvl": Family(
        lambda: transformers.InternVLConfig(
            text_config=TEXT | {"model_type": "qwen2"},
            vision_config=TOWER | {"image_size": [8, 8], "patch_size": [2, 2]},
            image_token_id=IMAGE,
        ),
        stacked(4, tiles=(2, 1, 3)),
    ),
    "idefics3": Family(partial(idefics, transformers.Idefics3Config), tiled()),
    "smolvlm": Family(partial(idefics, transformers.SmolVLMConfig), tiled()),
    "paligemma": Family(
        lambda: transformers.PaliGemmaConfig(
            text_config=TEXT | {"model_type": "gemma"},
            vision_config=SIGLIP | {"projection_dim": 16},
            image_token_index=IMAGE,
            projection_dim=16,
            hidden_size=16,
        ),
        stacked(4),
        suffix,
    ),
    "mistral3": Family(
        lambda: transformers.Mistral3Config(
            text_config=TEXT | {"model_type": "mistral"},
            vision_config=PIXTRAL,
            image_token_index=IMAGE,
            spatial_merge_size=2,
        ),
        sized(8),
    ),
    "glm4v": Family(
        lambda: transformers.Glm4vConfig(
            text_config=TEXT | MROPE,
            vision_config=VISUAL | {"out_hidden_size": 16, "image_size": 16},
            **(GRID_TOKENS | {"image_start_token_id": START, "video_start_token_id": 36, "video_end_token_id": 35}),
        ),
        gridded(),
        modalities,
    ),
    "gemma3": Family(
        lambda: transformers.Gemma3Config(
            text_config=TEXT | {"sliding_window": 16},
            vision_config=SIGLIP,
            image_token_index=IMAGE,
            mm_tokens_per_image=4,
        ),
        stacked(4),
        lambda ids: {"token_type_ids": (ids == IMAGE).long()},
    ),
    "qwen3_vl_moe": Family(
        lambda: transformers.Qwen3VLMoeConfig(
            text_config=TEXT | MROPE | EXPERTS,
            vision_config=VISUAL
            | {"out_hidden_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
            **GRID_TOKENS,
        ),
        gridded(),
        modalities,
    ),
    "glm4v_moe": Family(
        lambda: transformers.Glm4vMoeConfig(
            text_config=TEXT | {"rope_parameters": MROPE["rope_parameters"] | {"partial_rotary_factor": 1.0}} | EXPERTS,
            vision_config=VISUAL | {"out_hidden_size": 16, "image_size": 16},
            **(GRID_TOKENS | {"image_start_token_id": START, "video_start_token_id": 36, "video_end_token_id": 35}),
        ),
        gridded(),
        modalities,
    ),
}


def base(name: str) -> torch.nn.Module:
    """The tiny base model of a family in fp64, with weights large enough that every part shows in the logits."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(FAMILIES[name].config()).double().eval()
    model.generation_config.eos_token_id = None
    for module in model.modules():  # torch has no grouped product of fp64
        if hasattr(module, "config"):
            module.config._experts_implementation = "batched_mm"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model


@cache
def adapted(name: str, projector: bool) -> torch.nn.Module:
    """The tiny model with an adapter for every task, randomised: the language model's MLPs, or all that the preset offers."""
    model = base(name)
    pattern = target_modules(model.config, projector=projector, attention=projector)
    config = lilora.LiLoRAConfig(r=4, sub_rank=2, alpha=8, dropout=0.0, target_modules=pattern)
    model = get_peft_model(model, config, adapter_name=TASKS[0], autocast_adapter_dtype=False)
    for task in TASKS[1:]:
        model.add_adapter(task, config)
    randomise(model)
    return model.eval()


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, LiLoRALinear):
            for dictionary in (layer.lilora_A, layer.lilora_B, layer.lilora_U, layer.lilora_V, layer.lilora_fusion):
                for parameter in dictionary.values():
                    parameter.normal_(std=0.4)


# --- batches ------------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Samples of text and pictures; `inputs()` of all, `inputs(i)` of sample i alone."""

    family: Family
    ids: Tensor
    pictures: list[list[dict]]
    packing: Packing

    def inputs(self, i: int | None = None) -> dict[str, Tensor]:
        rows = slice(None) if i is None else slice(i, i + 1)
        _, inputs = self.packing.pack(self.pictures[rows])
        ids = self.ids[rows]
        inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
        return inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | self.family.token_types(ids)


def batch(name: str, images: list[list[int]], packing: Packing | None = None, token: int = IMAGE) -> Batch:
    """A batch with pictures of these kinds in each sample, a text token between two pictures."""
    family = FAMILIES[name]
    packing = packing or family.packing
    pictures = [[packing.draw(kind) for kind in sample] for sample in images]
    tokens, _ = packing.pack(pictures)
    length = 6 + max(sum(sample) + len(sample) for sample in tokens)
    ids = torch.randint(3, 34, (len(images), length))
    for row, sample in zip(ids, tokens, strict=True):
        at = 1
        for count in sample:
            row[at : at + count] = token
            at += count + 1
    return Batch(family, ids, pictures, packing)


def logits(model, inputs, **kwargs):
    with torch.no_grad():
        return model(**inputs, **kwargs).logits


def activate(model, name):
    """Without task_ids, let the model run with one task, or as the base model."""
    model.base_model.enable_adapter_layers() if name else model.base_model.disable_adapter_layers()
    if name:
        model.set_adapter(name)


def alone(model, samples, i, name, call):
    """`call` with sample i in a batch of its own, its task the active one: no route is involved."""
    activate(model, name)
    try:
        return call(samples.inputs(i))[0]
    finally:
        activate(model, TASKS[0])


def close(got, wanted):
    assert got.shape == wanted.shape
    worst, scale = (got - wanted).abs().max(), wanted.abs().max()
    assert worst <= 1e-9 * scale, f"{worst:.1e} where the full scale is {scale:.1e}"


def rows_are_those_of_single_tasks(model, samples, names):
    wanted = torch.stack(
        [alone(model, samples, i, name, lambda inputs: logits(model, inputs)) for i, name in enumerate(names)]
    )
    close(logits(model, samples.inputs(), task_ids=names), wanted)
    changed = (logits(model, samples.inputs(), task_ids=names[1:] + names[:1]) - wanted).abs().amax((1, 2))
    assert (changed > 0.05 * wanted.abs().max()).all(), "a comparison that tasks do not change shows nothing"
