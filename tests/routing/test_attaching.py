"""Which layers of which models a route reaches."""

import copy
import re
import warnings

import pytest
import torch
from accelerate import dispatch_model
from safetensors.torch import load_model
from support.habits import llama
from support.routed import alone, close, layers_of, logits
from support.tiny_llava import PATCHES, TASKS, batch, randomise, tiny_llava
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Dinov2Config,
    Dinov2ForImageClassification,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    Phi4MultimodalConfig,
    Phi4MultimodalForCausalLM,
)
from transformers.modeling_utils import _get_tied_weight_keys

from lilora_kernels import BatchContext, LiLoRALinear, attach, route
from lilora_kernels.attach import detach
from lilora_kernels.layers.lilora import set_task
from lilora_kernels.routing.context import AHEAD, GATHERED, TEXT, tasks_of
from lilora_kernels.routing.placement import places

# --- models apart -----------------------------------------------------------------------------------------------------


def test_two_models_do_not_share_routes(model):
    other, inputs = tiny_llava(), batch([1, 1])
    plain = logits(other, inputs)
    with route(model, ["count", "where"]):
        assert torch.equal(logits(other, inputs), plain)


def test_a_copy_of_an_attached_model_routes_on_its_own(model):
    twin, inputs, names = copy.deepcopy(model), batch([2, 0]), ["count", "where"]
    wanted = logits(model, inputs, task_ids=names)
    close(logits(twin, inputs, task_ids=names), wanted)
    assert tasks_of(twin) is not tasks_of(model)
    assert {layer.model_tasks for layer in layers_of(twin)} == {tasks_of(twin)}
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.count_nonzero(logits(twin, inputs, task_ids=names)) == 0
    close(logits(model, inputs, task_ids=names), wanted)
    with route(model, ["count"]):
        assert tasks_of(twin).current is None


def test_parts_of_a_model_and_misspelt_arguments_swallow_no_task_ids(model):
    inputs, names = batch([2, 0]), ["count", "where"]
    wanted = model(**inputs, task_ids=names, output_hidden_states=True).hidden_states[-1]
    with pytest.raises(TypeError, match="LlavaModel is a part of an adapted model and does not know task_ids"):
        model.model(**inputs, task_ids=names)
    with pytest.raises(TypeError, match="does not know task_ids"):
        model.get_image_features(inputs["pixel_values"], task_ids=names)
    with route(model, names, vision_tokens=[2 * PATCHES, 0]):
        close(model.model(**inputs).last_hidden_state, wanted)
    assert model.model(**inputs, task_ids=None).last_hidden_state.shape == wanted.shape
    for name in ("task_id", "tasks", "task", "adapter_name"):
        with pytest.raises(TypeError, match=rf"takes no {name}; the tasks of a batch are given as task_ids"):
            model(**inputs, **{name: names})
    twin = copy.deepcopy(model)
    attach(twin.model)  # by itself, too
    close(twin.model(**inputs, task_ids=names).last_hidden_state, wanted)
    detach(twin.model)
    detach(twin)
    assert twin.model(**inputs, task_ids=names).last_hidden_state.shape == wanted.shape


def test_a_forward_that_accelerate_put_on_the_instance_is_routed_too():
    hooked, inputs, names = tiny_llava(), batch([2, 0]), ["count", "where"]
    wanted = logits(hooked, inputs, task_ids=names)
    detach(hooked)
    before = dispatch_model(hooked, {"": "cpu"}, main_device="cpu", force_hooks=True).forward
    attach(hooked)
    close(logits(hooked, inputs, task_ids=names), wanted)
    detach(hooked)
    assert hooked.forward is before


def test_transformers_saves_a_model_with_layers_put_in_by_hand(tmp_path):
    def made():
        model = llama()
        for block in model.model.layers:
            block.mlp.up_proj = LiLoRALinear(block.mlp.up_proj, r=4)
            for task in ("ab", "a", "b"):
                block.mlp.up_proj.add_task(task)
        randomise(model)
        attach(model)
        return model.eval()

    model, again, inputs = made(), made(), {"input_ids": torch.randint(2, 38, (4, 5))}
    model.save_pretrained(tmp_path)
    patterns = _get_tied_weight_keys(
        model
    )  # tried one after the other for each name, and Python keeps 512 of them compiled
    names = [name for name in model.state_dict() if "lilora_A" in name or "lilora_B" in name]
    assert all(re.search(pattern, name) for pattern in patterns if "lilora" in pattern for name in names)
    assert load_model(again, tmp_path / "model.safetensors") == (set(), [])
    names = ["b", "ab", None, "a"]
    assert torch.equal(logits(again, inputs, task_ids=names), logits(model, inputs, task_ids=names))


def test_layers_put_in_later_join_the_route_when_attached_again():
    model = tiny_llava()
    layer = LiLoRALinear(model.model.language_model.layers[0].self_attn.q_proj, r=4, sub_rank=2, dropout=0.0)
    for task in TASKS:
        layer.add_task(task)
    randomise(layer)
    model.model.language_model.layers[0].self_attn.q_proj = layer
    attach(model)
    images, inputs = [1, 0], batch([1, 0])
    wanted = torch.stack([alone(model, inputs, images, i, name) for i, name in enumerate(["where", "count"])])
    close(logits(model, inputs, task_ids=["where", "count"]), wanted)


def test_the_route_ends_with_the_forward_even_after_an_error(model):
    inputs = batch([1, 1])
    plain = logits(model, inputs)
    with pytest.raises(ValueError, match="do not explain"):
        logits(model, {**inputs, "pixel_values": inputs["pixel_values"][:1]}, task_ids=["count", "where"])
    assert torch.equal(logits(model, inputs), plain)


@pytest.mark.parametrize("name", ["pixel_values", "images", "crops", "input_features"])
def test_layers_that_may_see_images_or_text_are_refused_with_images(name):
    """Parts named otherwise than in any known family: as many images as samples prove nothing."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.resampler, self.llm = (LiLoRALinear(nn.Linear(8, 8), r=2, sub_rank=2) for _ in range(2))

        def forward(self, input_ids, **inputs):
            embedded = nn.functional.one_hot(input_ids % 8, 8).float()
            for images in inputs.values():
                embedded = embedded.masked_scatter((input_ids == 39)[..., None], self.resampler(images))
            return self.llm(embedded)

    model = Model()
    for layer in (model.resampler, model.llm):
        layer.add_task("a")
    attach(model)
    ids = torch.randint(0, 30, (2, 12))
    model(ids, task_ids=["a", None])
    ids[0, 1:9] = 39
    model(ids, task_ids=["a", "a"], **{name: torch.randn(2, 4, 8)})
    with pytest.raises(
        ValueError, match=rf"resampler is not below the model\'s decoder.*\[2, 4\] rows .* {name}; adapt"
    ):
        model(ids, task_ids=["a", None], **{name: torch.randn(2, 4, 8)})


def test_inputs_of_other_names_are_refused_where_a_layer_ahead_sees_them(model):
    inputs = batch([1, 1]) | {"crops": torch.randn(2, 4)}
    explained = tasks_of(model).explained(model, inputs["input_ids"], (), inputs)
    context = BatchContext(torch.tensor([0, 1], dtype=torch.int32), **explained)
    with pytest.raises(ValueError, match=r"linear_1.*whose the rows of crops are is not known; adapt"):
        context.rows(torch.empty(2, 4, 5), AHEAD, path="linear_1")


def test_experts_that_see_gathered_rows_are_refused():
    """As remote code does it: one expert at a time, rows in an order of the router's."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 8)
            self.experts = nn.ModuleList(LiLoRALinear(nn.Linear(8, 8), r=2, sub_rank=2) for _ in range(2))

        def forward(self, input_ids):
            x = self.embed(input_ids).flatten(0, 1)
            y = torch.zeros_like(x)
            for chosen, expert in zip((x[:, 0].argsort(), x[:, 1].argsort()), self.experts, strict=True):
                y.index_add_(0, chosen, expert(x[chosen]))
            return y.view(*input_ids.shape, 8)

    model = Experts().eval()
    for layer in model.experts:
        for task in ("a", "b"):
            layer.add_task(task)
    randomise(model)
    attach(model)
    for ids in (torch.tensor([[1], [2]]), torch.randint(0, 10, (2, 3))):
        with pytest.raises(
            ValueError, match=r"experts\.0 sees \[\d\] rows that a router gathered.*pass batches of one task"
        ):
            model(ids, task_ids=["a", "b"])
        wanted = model(ids, task_ids=["b", "b"])
        set_task(model, "b")
        close(model(ids), wanted)


def test_a_layer_that_sees_the_images_one_by_one_is_refused():
    model, inputs = tiny_llava(), batch([1, 1])
    projector, project = model.model.multi_modal_projector, model.model.multi_modal_projector.forward
    # As many rows as image tokens in all, each time.
    projector.forward = lambda images: torch.cat([project(image.repeat(2, 1))[:PATCHES] for image in images])[None]
    with pytest.raises(ValueError, match=r"linear_1 runs more than once in a forward"):
        logits(model, inputs, task_ids=["read", "count"])
    logits(model, inputs, task_ids=["read", "read"])


def test_an_encoder_of_images_has_one_for_each_sample():
    model = Dinov2ForImageClassification(
        Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)
    ).eval()
    mlp = model.dinov2.encoder.layer[0].mlp
    mlp.fc1 = LiLoRALinear(mlp.fc1, r=4, sub_rank=2)
    for task in ("a", "b"):
        mlp.fc1.add_task(task)
    randomise(model)
    attach(model.eval())
    images = torch.randn(2, 3, 8, 8)
    got = logits(model, {"pixel_values": images}, task_ids=["a", "b"])
    for i, task in enumerate(("a", "b")):
        set_task(model, task)
        close(got[i : i + 1], logits(model, {"pixel_values": images[i : i + 1]}))


def phi4():
    audio = {"hidden_size": 16, "intermediate_size": 16, "num_blocks": 1, "num_attention_heads": 2}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Phi4MultimodalForCausalLM(
        Phi4MultimodalConfig(**sizes, num_key_value_heads=2, vision_config=vision, audio_config=audio)
    )


def idefics():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"embed_dim": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return IdeficsForVisionText2Text(IdeficsConfig(**sizes, vision_config=vision))


def bart():
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    return BartForConditionalGeneration(BartConfig(**sizes))


@pytest.mark.parametrize(
    "make, path, wanted",
    [
        (tiny_llava, "model.language_model.layers.0.mlp.up_proj", TEXT),
        (tiny_llava, "lm_head", TEXT),
        (tiny_llava, "model.multi_modal_projector.linear_1", AHEAD),
        (tiny_llava, "model.vision_tower.encoder.layers.0.mlp.fc1", AHEAD),
        (phi4, "model.layers.0.mlp.down_proj", TEXT),
        (phi4, "model.embed_tokens_extend.image_embed.img_processor.encoder.layers.0.mlp.fc1", None),
        (idefics, "model.layers.0.mlp.up_proj", TEXT),
        (idefics, "model.vision_model.encoder.layers.0.mlp.fc1", None),
        (bart, "model.decoder.layers.0.fc1", TEXT),
        (bart, "model.encoder.layers.0.fc1", None),
    ],
)
def test_where_a_layer_lies(make, path, wanted):
    with torch.device("meta" if make is not tiny_llava else "cpu"):
        model = make()
    model.get_submodule(path)
    assert places(model, [path]) == {path: wanted}


def test_a_part_behind_the_decoder_is_not_taken_to_lie_ahead_of_it():
    """As an action expert or a talker: it sees rows of the samples, of which there may be as many as images."""

    class Acting(nn.Module):
        def __init__(self):
            super().__init__()
            self.tower, self.action, self.decoder = nn.Linear(4, 4), nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4)])
            self.decoder.main_input_name = "input_ids"

        def get_decoder(self):
            return self.decoder

        def get_image_features(self, pixel_values):
            return self.tower(pixel_values)

    assert places(Acting(), ["tower", "action"]) == {"tower": AHEAD, "action": None}


def test_experts_lie_apart_from_experts_that_all_tokens_see():
    gathered = ["layers.0.mlp.experts.3.up_proj", "layers.0.mlp.experts.expert_2.up_proj", "experts.0"]
    others = [
        "layers.0.mlp.shared_experts.up_proj",
        "layers.0.mlp.shared_experts.0.up_proj",
        "action_expert.layers.0.mlp.up_proj",
    ]
    assert set(places(nn.Module(), gathered).values()) == {GATHERED}
    assert set(places(nn.Module(), others).values()) == {None}


# --- layers that no forward reaches -----------------------------------------------------------------------------------


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.block = nn.TransformerEncoderLayer(8, 2, 8)

    def forward(self, x):
        return self.used(x)


def adapt(model, path):
    parent, _, name = path.rpartition(".")
    layer = LiLoRALinear(model.get_submodule(path), r=4, sub_rank=2)
    layer.add_task("a")
    setattr(model.get_submodule(parent), name, layer)


def test_a_layer_whose_weight_alone_is_read_cannot_be_adapted():
    with pytest.raises(TypeError, match=r"nn\.MultiheadAttention reads and never runs"):
        adapt(Attending(), "attention.out_proj")
    model = Attending()
    adapt(model, "block.linear1")
    with pytest.raises(ValueError, match=r"block\.linear1 cannot be adapted: TransformerEncoderLayer reads its weight"):
        attach(model)


def test_a_layer_that_the_first_forward_does_not_reach_is_named_once():
    model = Attending()
    adapt(model, "used")
    adapt(model, "unused")
    attach(model)
    with pytest.warns(UserWarning, match=r"did not run 1 of the adapted layers \(unused\)"):
        model(torch.randn(2, 3, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(2, 3, 8))
        tiny_llava()(**batch([0, 0]))


class TakesAll(nn.Module):
    """Two adapted layers by hand, and a forward that takes any keyword."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(LiLoRALinear(nn.Linear(4, 4), r=2) for _ in range(2))
        for layer in self.layers:
            layer.add_task("a")
            layer.add_task("b")

    def forward(self, x, **kwargs):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_that_takes_any_keyword_swallows_no_task_ids(earlier, wrapped):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = TakesAll()

        def forward(self, x, **kwargs):
            return self.inner(x, **kwargs)

    model, x = Wrapper() if wrapped else TakesAll(), torch.randn(2, 4)
    if earlier:
        model(x)
    for _ in range(2):
        with pytest.raises(
            TypeError, match=rf"task_ids do not reach the adapted layers of this {type(model).__name__}"
        ):
            model(x, task_ids=["a", "b"])
    inner = model.inner if wrapped else model
    attach(inner)
    model.eval()
    assert model(x, task_ids=["a", "b"]).shape == x.shape
    assert inner.layers[0](x).shape == x.shape
