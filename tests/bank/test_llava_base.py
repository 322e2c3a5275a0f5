"""`lilora base llava`: a LLaVA of a language model, a tower and LLaVA's own projector computes what its parts do."""

import json

import pytest
import torch
from PIL import Image
from support.word_tokenizer import word_tokenizer
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from lilora.continual.collator import Collator
from lilora.continual.instructions import Sample

VISION, HIDDEN, PATCHES = 16, 24, 4
WORDS = ["USER", "ASSISTANT", ":", "what", "is", "it", "?", "red", "and", "that", "blue", "<", ">", "image"]
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def projector():
    sizes = {"0.weight": (HIDDEN, VISION), "0.bias": (HIDDEN,), "2.weight": (HIDDEN, HIDDEN), "2.bias": (HIDDEN,)}
    return {f"model.mm_projector.{name}": torch.randn(size) * 0.3 for name, size in sizes.items()}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def parts(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    tokenizer = word_tokenizer(WORDS, clean_up_tokenization_spaces=False)
    tokenizer.save_pretrained(folder / "vicuna")
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN,
            num_key_value_heads=2,
            initializer_range=0.3,
            tie_word_embeddings=request.param,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            **sizes,
        )
    )
    llama.save_pretrained(folder / "vicuna")
    samples = {"do_sample": False, "temperature": 0.9, "top_p": 0.6}  # as Vicuna's
    (folder / "vicuna" / "generation_config.json").write_text(json.dumps(samples))
    vision = {"hidden_size": VISION, "image_size": 16, "patch_size": 8, **sizes}
    CLIPModel(CLIPConfig(vision_config=vision, text_config={"hidden_size": 8, **sizes})).save_pretrained(
        folder / "clip"
    )
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16).save_pretrained(folder / "clip")
    torch.save(projector(), folder / "mm_projector.bin")
    return folder


def command(parts, out, **changes):
    given = {"language": parts / "vicuna", "vision": parts / "clip", "projector": parts / "mm_projector.bin"} | changes
    return ["base", "llava", "--out", out, *(part for name, value in given.items() for part in (f"--{name}", value))]


def sample_of(folder, question="what is it ?", history=()):
    path = folder / "picture.png"
    Image.effect_noise((30, 20), 90).convert("RGB").save(path)
    return Sample("1", (path,), question, ("red",), history=history, images_ahead=(1, 0) if history else ())


def test_it_computes_what_its_parts_do(parts, tmp_path, lilora):
    code, out, err = lilora(*command(parts, tmp_path / "base"))
    assert (code, str(tmp_path / "base") in out) == (0, True), err
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "base", dtype=torch.float64).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "base")
    inputs = Collator(processor, {"": 0}, train=False)([("", sample_of(tmp_path))])
    inputs.pop("task_ids")
    inputs["pixel_values"] = inputs["pixel_values"].double()

    llama = LlamaForCausalLM.from_pretrained(parts / "vicuna", dtype=torch.float64).eval()
    tower = CLIPVisionModel.from_pretrained(parts / "clip", dtype=torch.float64).eval()
    weights = {n: t.double() for n, t in torch.load(parts / "mm_projector.bin", weights_only=True).items()}
    w0, b0, w2, b2 = (weights[f"model.mm_projector.{name}"] for name in ("0.weight", "0.bias", "2.weight", "2.bias"))
    known, image_id = llama.config.vocab_size, processor.tokenizer.convert_tokens_to_ids("<image>")
    with torch.no_grad():
        pixels = AutoImageProcessor.from_pretrained(parts / "clip")(
            Image.open(tmp_path / "picture.png"), return_tensors="pt"
        )["pixel_values"].double()
        features = tower(pixels, output_hidden_states=True).hidden_states[-2][0, 1:]
        rows = F.linear(F.gelu(F.linear(features, w0, b0)), w2, b2)
        ids = inputs["input_ids"][0]
        at = ids == image_id
        assert at.sum() == PATCHES == len(rows)
        embedded = llama.get_input_embeddings()(ids.where(~at, 0))
        embedded[at] = rows
        wanted = llama(inputs_embeds=embedded[None]).logits
        got = model(**inputs).logits
        torch.testing.assert_close(got[..., :known], wanted, rtol=1e-10, atol=1e-10)
        assert got.shape[-1] % 64 == 0
        mean = wanted.mean(-1, keepdim=True)  # of the tokens that are new, which greedy decoding never chooses
        torch.testing.assert_close(got[..., known:], mean.expand_as(got[..., known:]), rtol=0, atol=1e-5)


def test_a_conversation_is_vicunas(parts, tmp_path, lilora):
    assert (
        lilora(*command(parts, tmp_path / "base"), "--json")[1] == json.dumps({"folder": str(tmp_path / "base")}) + "\n"
    )
    processor = AutoProcessor.from_pretrained(tmp_path / "base")
    picture = [{"type": "image"}, {"type": "text", "text": "what is it ?"}]
    turns = [("user", picture), ("assistant", "red"), ("user", "and that ?"), ("assistant", "blue")]
    messages = [{"role": role, "content": content} for role, content in turns]
    asked = "USER: <image>\nwhat is it ? ASSISTANT: red</s>USER: and that ? ASSISTANT:"
    assert processor.apply_chat_template(messages[:-1], add_generation_prompt=True) == f"{SYSTEM} {asked}"
    assert processor.apply_chat_template(messages) == f"{SYSTEM} {asked} blue</s>"
    brief = [{"role": "system", "content": [{"type": "text", "text": "brief"}]}, *messages[2:3]]
    assert processor.apply_chat_template(brief) == "brief USER: and that ? "

    sample = sample_of(tmp_path, "and that ?", (("what is it ?", "red"),))
    batch = Collator(processor, {"": 0}, train=True)([("", sample)])
    taught = batch["input_ids"][batch["labels"] != -100]
    assert processor.tokenizer.convert_ids_to_tokens(taught) == ["red", "</s>", "red", "</s>"]


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"language": "clip"}, "clip is of type 'clip'; give a model of type llama"),
        ({"vision": "vicuna"}, "vicuna is of type 'llama'; give a model of type clip or clip_vision_model"),
        ({"vision": "gone"}, "gone: cannot be loaded"),
        ({"projector": "gone"}, "gone cannot be read (No such file or directory)"),
        ({"projector": "one.bin"}, "one.bin holds the tensor model.mm_projector.weight, which has no place"),
        ({"projector": "wide.bin"}, "model.mm_projector.0.weight is [24, 17]; linear_1.weight wants [24, 16]"),
        ({"projector": "code.bin"}, "code.bin is truncated, or holds more than plain tensors"),
    ],
)
def test_parts_that_do_not_fit_are_one_sentence(parts, wrong, sentence, tmp_path, lilora):
    torch.save({"model.mm_projector.weight": torch.zeros(HIDDEN, VISION)}, parts / "one.bin")
    torch.save(projector() | {"model.mm_projector.0.weight": torch.zeros(HIDDEN, VISION + 1)}, parts / "wide.bin")
    (parts / "code.bin").write_bytes(b"cposix\nsystem\n(S'true'\ntR.")
    code, _, err = lilora(*command(parts, tmp_path / "base", **{name: parts / path for name, path in wrong.items()}))
    assert (code, sentence in err.splitlines()[-1]) == (2, True), err
    assert not (tmp_path / "base").exists()
