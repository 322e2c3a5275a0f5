"""Tiny configs of every family, how its images are packed, and what its forward wants beside tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)

from .packings import (
    Packing,
    anyres,
    aspect_ratios,
    by_positions,
    by_shapes,
    cropped,
    flattened,
    gridded,
    padded,
    sized,
    stacked,
    text_alone,
    tiled,
)

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
QWEN3_VISION = VISUAL | {"out_hidden_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
SIGLIP_16 = SIGLIP | {"image_size": 16}
AUDIO = {
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "num_mel_bins": 8,
    "output_dim": 16,
    "n_window": 4,
}
AUDIO_TOKENS = {"audio_token_index": 36, "audio_token_id": 36}
SPECIAL = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
OPT = SPECIAL | {
    "hidden_size": 16,
    "ffn_dim": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "word_embed_proj_dim": 16,
    "max_position_embeddings": 256,
    "dropout": 0.0,
}
BART = SPECIAL | {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    "max_position_embeddings": 256,
    "dropout": 0.0,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
T5GEMMA = TEXT | {
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE},
}
TINY_TEXT = SPECIAL | {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
GRID_TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START}
PINPOINTS = [[8, 16], [16, 8], [16, 16]]


CLASSIFIERS = (AutoModelForImageClassification, AutoModelForSequenceClassification)
SEVERAL_NONE_ONE = [[0, 1], [], [2]]
AS_MANY_AS_SAMPLES = [[], [1, 0], [2]]
ONE_EACH = [[0], [1], [2]]
NO_IMAGES = [[], [], []]


@dataclass(frozen=True)
class Family:
    """A tiny config, how images are packed, and what the model wants with input_ids [B, L].

    batches: kinds of the images in each sample, of one batch or two. auto: the class that builds the model. text: whether
    it reads tokens. precision: of its logits, relative to the largest; routers and other code that computes in fp32 leave less.
    """

    config: Callable[[], PreTrainedConfig]
    packing: Packing
    beside: Callable[[Tensor], dict[str, Tensor]] = lambda ids: {}
    batches: tuple[list[list[int]], ...] = (SEVERAL_NONE_ONE, AS_MANY_AS_SAMPLES)
    auto: type = AutoModelForImageTextToText
    text: bool = True
    precision: float = 1e-7


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


def glm(config: type, text: dict, vision: dict | None = None) -> PreTrainedConfig:
    tokens = GRID_TOKENS | {"image_start_token_id": START, "video_start_token_id": 36, "video_end_token_id": 35}
    visual = VISUAL | {"out_hidden_size": 16, "image_size": 16}
    return config(text_config=text, vision_config=visual | (vision or {}), **tokens)


def qwen3_5(config: type, **text) -> PreTrainedConfig:
    linear = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    }
    rope = MROPE["rope_parameters"] | {"partial_rotary_factor": 1.0, "mrope_interleaved": True}
    return config(
        text_config=TEXT | linear | {"rope_parameters": rope} | text, vision_config=QWEN3_VISION, **GRID_TOKENS
    )


def blip(config: type) -> PreTrainedConfig:
    qformer = without(TOWER, "image_size", "patch_size") | {"encoder_hidden_size": 16, "vocab_size": VOCABULARY}
    return config(
        text_config={"model_type": "opt"} | OPT,
        vision_config=TOWER,
        qformer_config=qformer | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        num_query_tokens=4,
        image_token_index=IMAGE,
    )


def text(config: type, precision: float = 1e-7, **options) -> Family:
    return Family(
        lambda: config(**TEXT | options),
        text_alone(),
        batches=(NO_IMAGES,),
        auto=AutoModelForCausalLM,
        precision=precision,
    )


def images(config: Callable[[], PreTrainedConfig]) -> Family:
    return Family(config, stacked(0), batches=(ONE_EACH,), auto=AutoModelForImageClassification, text=False)


def answers(ids: Tensor) -> dict[str, Tensor]:
    """What the decoder of an encoder-decoder reads."""
    return {"decoder_input_ids": ids[:, -5:] % 30 + 3}


def without(config: dict, *names: str) -> dict:
    return {name: value for name, value in config.items() if name not in names}


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
    "glm4v": Family(partial(glm, transformers.Glm4vConfig, TEXT | MROPE), gridded(), modalities),
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
            text_config=TEXT | MROPE | EXPERTS, vision_config=QWEN3_VISION, **GRID_TOKENS
        ),
        gridded(),
        modalities,
    ),
    "glm4v_moe": Family(
        partial(
            glm,
            transformers.Glm4vMoeConfig,
            TEXT | EXPERTS | {"rope_parameters": MROPE["rope_parameters"] | {"partial_rotary_factor": 1.0}},
        ),
        gridded(),
        modalities,
    ),
    "aya_vision": Family(
        lambda: transformers.AyaVisionConfig(
            text_config=TEXT | {"model_type": "cohere2"},
            vision_config=SIGLIP_16,
            image_token_index=IMAGE,
            downsample_factor=2,
            vision_feature_layer=-1,
        ),
        stacked(4, (2, 1, 3), side=16),
    ),
    "cohere2_vision": Family(
        lambda: transformers.Cohere2VisionConfig(
            text_config=TEXT | {"model_type": "cohere2"},
            vision_config=SIGLIP_16,
            image_token_id=IMAGE,
            downsample_factor=2,
        ),
        stacked(4, (2, 1, 3), side=16),
    ),
    "vipllava": Family(
        partial(llava, config=transformers.VipLlavaConfig, vision_feature_layers=[-1, -2]),
        stacked(4),
    ),
    "llava_next_video": Family(partial(llava, config=transformers.LlavaNextVideoConfig, **ANY), anyres(together=False)),
    "video_llava": Family(
        lambda: transformers.VideoLlavaConfig(
            text_config=TEXT | {"model_type": "llama"},
            vision_config=CLIP,
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_seq_length=4,
            video_seq_length=40,
        ),
        stacked(4, name="pixel_values_images"),
    ),
    "deepseek_vl": Family(
        lambda: transformers.DeepseekVLConfig(
            text_config=TEXT | {"model_type": "llama"}, vision_config=SIGLIP, image_token_id=IMAGE
        ),
        stacked(4),
    ),
    "janus": Family(
        lambda: transformers.JanusConfig(
            text_config=TEXT | {"model_type": "llama"},
            vision_config=TOWER | {"mlp_ratio": 1.5, "projection_dim": 16, "num_image_tokens": 4},
            vq_config={
                "embed_dim": 4,
                "num_embeddings": 8,
                "latent_channels": 4,
                "base_channels": 32,
                "channel_multiplier": [1],
                "num_res_blocks": 1,
                "num_patches": 2,
                "projection_dim": 16,
                "image_token_embed_dim": 16,
            },
            image_token_id=IMAGE,
        ),
        stacked(4),
    ),
    "got_ocr2": Family(
        lambda: transformers.GotOcr2Config(
            text_config=TEXT | {"model_type": "qwen2"},
            vision_config=TOWER
            | {"image_size": 32, "output_channels": 8, "mlp_dim": 24, "window_size": 4, "global_attn_indexes": [1]},
            image_token_index=IMAGE,
            image_seq_length=4,
        ),
        stacked(4, side=32),
    ),
    "ovis2": Family(
        lambda: transformers.Ovis2Config(
            text_config=TEXT | {"model_type": "qwen2"},
            vision_config=TOWER | {"vocab_size": 32, "hidden_stride": 1, "num_visual_indicator_tokens": 5},
            image_token_id=IMAGE,
            visual_indicator_token_ids=[33, 34, 35, 36, 37],
            hidden_size=16,
            vocab_size=VOCABULARY,
        ),
        stacked(4),
    ),
    "aria": Family(
        lambda: transformers.AriaConfig(
            text_config=TEXT | {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
            vision_config=TOWER | {"model_type": "idefics3_vision"},
            projector_patch_to_query_dict={4: 4},
            image_token_index=IMAGE,
        ),
        stacked(4),
    ),
    "llama4": Family(
        lambda: transformers.Llama4Config(
            text_config=TEXT
            | {
                "intermediate_size_mlp": 24,
                "num_local_experts": 4,
                "num_experts_per_tok": 1,
                "moe_layers": [1],
                "interleave_moe_layer_step": 2,
                "layer_types": ["chunked_attention", "full_attention"],
                "no_rope_layers": [1, 0],
                "attention_chunk_size": 64,
            },
            vision_config=TOWER
            | {
                "intermediate_size": 64,
                "image_size": 16,
                "vision_output_dim": 16,
                "pixel_shuffle_ratio": 0.5,
                "projector_input_dim": 16,
                "projector_output_dim": 16,
            },
            image_token_index=IMAGE,
            boi_token_index=36,
            eoi_token_index=35,
        ),
        stacked(4, (2, 1, 3), side=16),
    ),
    "idefics2": Family(
        lambda: transformers.Idefics2Config(
            text_config=TEXT | {"model_type": "mistral"},
            vision_config=TOWER | {"image_size": 16},
            perceiver_config={
                "hidden_size": 16,
                "resampler_n_latents": 3,
                "resampler_depth": 1,
                "resampler_n_heads": 2,
                "resampler_head_dim": 8,
                "num_key_value_heads": 1,
            },
            image_token_id=IMAGE,
        ),
        tiled(3),
    ),
    "lighton_ocr": Family(
        lambda: transformers.LightOnOcrConfig(
            text_config=TEXT | {"model_type": "qwen3"},
            vision_config=PIXTRAL,
            image_token_id=IMAGE,
            spatial_merge_size=2,
        ),
        sized(8),
    ),
    "video_llama_3": Family(
        lambda: transformers.VideoLlama3Config(
            text_config=TEXT | {"model_type": "qwen2"},
            vision_config=without(TOWER, "image_size"),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
        ),
        gridded(patch=(48,), sizes=True),
    ),
    "paddleocr_vl": Family(
        lambda: transformers.PaddleOCRVLConfig(
            text_config=TEXT | MROPE,
            vision_config=TOWER | {"image_size": 16},
            **GRID_TOKENS,
            vision_end_token_id=36,
        ),
        gridded(patch=(3, 4, 4)),
        modalities,
    ),
    "glm46v": Family(
        partial(
            glm, transformers.Glm46VConfig, TEXT | MROPE | {"model_type": "glm4v_text"}, {"model_type": "glm4v_vision"}
        ),
        gridded(),
        modalities,
    ),
    "glm_ocr": Family(partial(glm, transformers.GlmOcrConfig, TEXT | MROPE), gridded(), modalities),
    "qwen3_5": Family(partial(qwen3_5, transformers.Qwen3_5Config), gridded(), modalities),
    "qwen3_5_moe": Family(
        partial(qwen3_5, transformers.Qwen3_5MoeConfig, **EXPERTS, shared_expert_intermediate_size=12),
        gridded(),
        modalities,
    ),
    "exaone4_5": Family(
        lambda: transformers.Exaone4_5_Config(
            text_config=TEXT | {"model_type": "exaone4", "sliding_window": None, "layer_types": ["full_attention"] * 2},
            vision_config=VISUAL
            | {"out_hidden_size": 16, "window_size": 16, "fullatt_block_indexes": [1], "num_key_value_heads": 1},
            **GRID_TOKENS,
        ),
        gridded(),
    ),
    "qwen2_5_omni_thinker": Family(
        lambda: transformers.Qwen2_5OmniThinkerConfig(
            text_config=TEXT | MROPE,
            vision_config=VISUAL | {"out_hidden_size": 16, "window_size": 16, "fullatt_block_indexes": [1]},
            audio_config=AUDIO,
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            **GRID_TOKENS,
            **AUDIO_TOKENS,
        ),
        gridded(),
    ),
    "qwen3_omni_moe_thinker": Family(
        lambda: transformers.Qwen3OmniMoeThinkerConfig(
            text_config=TEXT | MROPE | EXPERTS,
            vision_config=QWEN3_VISION,
            audio_config=AUDIO | {"downsample_hidden_size": 8},
            **GRID_TOKENS,
            audio_token_id=36,
        ),
        gridded(),
    ),
    "ernie4_5_vl_moe": Family(
        lambda: transformers.Ernie4_5_VLMoeConfig(
            text_config=TEXT
            | MROPE
            | {
                "moe_intermediate_size": [12, 8],
                "moe_k": 2,
                "moe_num_experts": 4,
                "moe_num_shared_experts": 1,
                "mlp_layer_types": ["dense", "sparse"],
            },
            vision_config=VISUAL,
            image_token_id=IMAGE,
            image_start_token_id=START,
            image_end_token_id=34,
            video_token_id=VIDEO,
            video_start_token_id=36,
            video_end_token_id=35,
        ),
        gridded(patch=(48,)),
        lambda ids: modalities(ids) | {"moe_mm_token_type_ids": (ids == IMAGE).int()},
    ),
    "gemma4": Family(
        lambda: transformers.Gemma4Config(
            text_config=TEXT
            | {
                "sliding_window": 16,
                "layer_types": ["sliding_attention", "full_attention"],
                "hidden_size_per_layer_input": 8,
                "vocab_size_per_layer_input": VOCABULARY,
                "global_head_dim": 8,
            },
            vision_config=without(TOWER, "image_size")
            | {"num_key_value_heads": 2, "head_dim": 8, "pooling_kernel_size": 2, "position_embedding_size": 64},
            image_token_id=IMAGE,
            boi_token_id=36,
            eoi_token_id=35,
            video_token_id=VIDEO,
            audio_token_id=34,
        ),
        padded(by_positions),
        modalities,
        precision=1e-5,
    ),
    "lfm2_vl": Family(
        lambda: transformers.Lfm2VlConfig(
            text_config=TEXT | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
            vision_config=without(TOWER, "image_size") | {"num_patches": 64, "vision_use_head": False},
            image_token_id=IMAGE,
            projector_hidden_size=16,
            downsample_factor=2,
        ),
        padded(by_shapes),
    ),
    # --- one image a sample, or other parts beside a decoder ---
    "blip-2": Family(partial(blip, transformers.Blip2Config), stacked(4), batches=(ONE_EACH,)),
    "instructblip": Family(
        partial(blip, transformers.InstructBlipConfig),
        stacked(4),
        lambda ids: {"qformer_input_ids": ids.clamp(max=30)[:, :5]},
        batches=(ONE_EACH,),
    ),
    "mllama": Family(
        lambda: transformers.MllamaConfig(
            text_config=TEXT | {"cross_attention_layers": [1]},
            vision_config={
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "attention_heads": 2,
                "vision_output_dim": 32,
                "image_size": 16,
                "patch_size": 4,
                "max_num_tiles": 2,
                "intermediate_layers_indices": [0],
                "supported_aspect_ratios": [[1, 1], [1, 2]],
            },
            image_token_index=IMAGE,
        ),
        aspect_ratios(),
        lambda ids: {"cross_attention_mask": torch.ones(*ids.shape, 1, 2).long()},
        batches=(ONE_EACH,),
    ),
    "phi4_multimodal": Family(
        lambda: transformers.Phi4MultimodalConfig(
            **TEXT,
            vision_config=TOWER | {"image_size": 16, "crop_size": 16, "image_token_id": IMAGE},
            audio_config={
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_blocks": 1,
                "num_attention_heads": 2,
                "ext_pw_out_channel": 16,
                "depthwise_separable_out_channel": 16,
                "input_size": 8,
                "nemo_conv_channels": 16,
                "audio_token_id": 36,
            },
        ),
        cropped(),
        auto=AutoModelForCausalLM,
    ),
    "kosmos-2.5": Family(
        lambda: transformers.Kosmos2_5Config(
            text_config={
                "vocab_size": VOCABULARY,
                "max_position_embeddings": 256,
                "embed_dim": 16,
                "layers": 2,
                "ffn_dim": 24,
                "attention_heads": 2,
                "dropout": 0.0,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": None,
            },
            vision_config={
                "hidden_size": 16,
                "patch_embed_hidden_size": 48,
                "intermediate_size": 24,
                "head_dim": 8,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "max_num_patches": 64,
            },
            latent_query_num=4,
        ),
        flattened(),
        lambda ids: {"image_embeds_position_mask": (ids == IMAGE).long()},
        batches=(ONE_EACH,),
    ),
    "florence2": Family(
        lambda: transformers.Florence2Config(
            text_config={"model_type": "bart"} | BART,
            vision_config={
                "depths": [1],
                "embed_dim": [16],
                "num_heads": [2],
                "num_groups": [2],
                "patch_size": [4],
                "patch_stride": [4],
                "patch_padding": [0],
                "patch_prenorm": [False],
                "window_size": 2,
                "projection_dim": 16,
                "max_temporal_embeddings": 4,
                "max_position_embeddings": 8,
                "drop_path_rate": 0.0,
            },
            image_token_id=IMAGE,
        ),
        stacked(5),
        answers,
    ),
    "t5gemma2": Family(
        lambda: transformers.T5Gemma2Config(
            encoder={
                "text_config": T5GEMMA,
                "vision_config": SIGLIP,
                "mm_tokens_per_image": 4,
                "boi_token_index": 36,
                "eoi_token_index": 35,
                "image_token_index": IMAGE,
            },
            decoder=T5GEMMA,
            image_token_index=IMAGE,
            eoi_token_index=35,
            vocab_size=VOCABULARY,
            dropout_rate=0.0,
        ),
        stacked(4),
        answers,
    ),
    # --- text alone ---
    "llama": text(transformers.LlamaConfig),
    "mistral": text(transformers.MistralConfig),
    "qwen3": text(transformers.Qwen3Config),
    "gemma3_text": text(transformers.Gemma3TextConfig, sliding_window=16),
    "phi3": text(transformers.Phi3Config),
    "mixtral": text(transformers.MixtralConfig, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": text(transformers.Qwen3MoeConfig, **EXPERTS),
    "gpt_oss": text(transformers.GptOssConfig, num_local_experts=4, num_experts_per_tok=2, sliding_window=16),
    "falcon_h1": text(
        transformers.FalconH1Config,
        precision=1e-4,
        mamba_d_ssm=16,
        mamba_n_heads=2,
        mamba_d_head=8,
        mamba_d_state=4,
        mamba_chunk_size=8,
    ),
    "opt": Family(lambda: transformers.OPTConfig(**OPT), text_alone(), batches=(NO_IMAGES,), auto=AutoModelForCausalLM),
    "gpt2": Family(
        lambda: transformers.GPT2Config(
            **SPECIAL, n_embd=16, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        ),
        text_alone(),
        batches=(NO_IMAGES,),
        auto=AutoModelForCausalLM,
    ),
    "t5": Family(
        lambda: transformers.T5Config(
            **SPECIAL,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        ),
        text_alone(),
        answers,
        batches=(NO_IMAGES,),
        auto=AutoModelForSeq2SeqLM,
    ),
    "bert (classification)": Family(
        lambda: transformers.BertConfig(
            **without(TEXT, "head_dim"), num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        ),
        text_alone(),
        batches=(NO_IMAGES,),
        auto=AutoModelForSequenceClassification,
    ),
    # --- images alone ---
    "vit": images(lambda: transformers.ViTConfig(**TOWER, num_labels=3)),
    "dinov2": images(lambda: transformers.Dinov2Config(**TOWER, mlp_ratio=2, num_labels=3)),
    "siglip (classification)": images(
        lambda: transformers.SiglipConfig(vision_config=TOWER, text_config=TINY_TEXT, num_labels=3)
    ),
    "clip (classification)": images(
        lambda: transformers.CLIPConfig(vision_config=TOWER, text_config=TINY_TEXT, num_labels=3)
    ),
}
