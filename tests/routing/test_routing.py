"""Which row belongs to which task, through a whole LLaVA: text rows, packed images, beams, copies, bad ids."""

import copy
import warnings
from functools import partial

import pytest
import torch
from accelerate import dispatch_model
from support.tiny_llava import PATCHES, TASKS, batch, randomise, sample, tiny_llava
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

from lilora_kernels import BatchContext, LiLoRALinear, attach, route
from lilora_kernels.attach import detach
from lilora_kernels.layers import lilora
from lilora_kernels.layers.lilora import set_task
from lilora_kernels.routing.context import AHEAD, GATHERED, TEXT, tasks_of
from lilora_kernels.routing.placement import places

BATCHES = {
    "one image each": [1, 1, 1, 1],
    "as many images as samples": [2, 0, 1, 1],
    "none for some": [0, 2, 0, 1],
    "several": [2, 1, 2, 1],
    "no image at all": [0, 0, 0, 0],
}
NAMES = ["where", "read", None, "count"]


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, LiLoRALinear)]


@pytest.fixture(scope="module")
def shared():
    torch.manual_seed(0)
    return tiny_llava()


@pytest.fixture
def model(shared):
    """The model of the module, whose values no test changes."""
    set_task(shared, "read")
    return shared


def logits(model, inputs, **kwargs):
    with torch.no_grad():
        return model(**inputs, **kwargs).logits


def alone(model, inputs, images, i, name):
    """Sample i by itself, its task the active one: no route is involved."""
    set_task(model, *([] if name is None else [name]))
    try:
        return logits(model, sample(inputs, images, i))[0]
    finally:
        set_task(model, "read")


def close(got, wanted):
    assert got.shape == wanted.shape
    worst = (got - wanted).abs().max() / wanted.abs().max()
    assert worst <= 1e-5, f"{worst:.1e} of full scale"


# --- a mixed batch is its samples -------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", BATCHES.values(), ids=BATCHES)
def test_a_mixed_batch_equals_its_samples_one_by_one(model, images):
    inputs = batch(images)
    wanted = torch.stack([alone(model, inputs, images, i, name) for i, name in enumerate(NAMES)])
    close(logits(model, inputs, task_ids=NAMES), wanted)
    ids = torch.tensor([-1 if name is None else TASKS.index(name) for name in NAMES])
    close(logits(model, inputs, task_ids=ids), wanted)
    close(logits(model, inputs, task_ids=ids.tolist()), wanted)
    with route(model, NAMES, vision_tokens=[PATCHES * count for count in images]):
        close(logits(model, inputs), wanted)
    # The comparison can only fail if tasks differ.
    assert (logits(model, inputs, task_ids=NAMES[::-1]) - wanted).abs().max() > 0.1 * wanted.abs().max()


def test_every_image_gets_the_task_of_its_sample(model):
    """Two images of the first sample, none of the second: as many images as samples, and both belong to the first."""
    seen = []
    projector = model.model.multi_modal_projector.linear_1
    hook = projector.register_forward_hook(lambda layer, inputs, y: seen.append((inputs[0], y)))
    logits(model, batch([2, 0]), task_ids=["count", "where"])
    hook.remove()
    (x, y), *more = seen
    assert not more
    assert x.shape[:2] == (2, PATCHES)
    set_task(model, "count")
    with torch.no_grad():
        close(y, projector(x))


def test_gradients_of_a_mixed_batch_are_the_sums_over_its_samples(model):
    images, names = [2, 0, 1], ["count", "where", "count"]
    inputs = batch(images)
    set_task(model, *TASKS)
    model(**inputs, task_ids=names).logits.square().sum().backward()
    mixed = gradients(model)
    for i, name in enumerate(names):
        model(**sample(inputs, images, i), task_ids=[name]).logits.square().sum().backward()
    summed = gradients(model)
    assert mixed.keys() == summed.keys()
    for name, gradient in mixed.items():
        if ".read" in name and not name.endswith(("lilora_A.read", "lilora_B.read")):
            assert torch.count_nonzero(gradient) == 0, name
        else:
            torch.testing.assert_close(gradient, summed[name], rtol=1e-3, atol=1e-4 * summed[name].abs().max().item())


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def test_written_values_are_seen_by_every_way_to_route():
    model, inputs = tiny_llava(), batch([1, 1])
    layers, names = layers_of(model), ["count", "where"]
    vision_tokens = [PATCHES, PATCHES]

    def ways():
        yield logits(model, inputs, task_ids=names)
        with route(model, names, vision_tokens=vision_tokens):
            yield logits(model, inputs)

    before = [y.clone() for y in ways()]
    with torch.no_grad():
        for layer in layers:
            for own in (*layer.lilora_U.values(), *layer.lilora_V.values()):
                own.copy_(torch.randn_like(own) / 3)
    wanted = torch.stack([alone(model, inputs, [1, 1], i, name) for i, name in enumerate(names)])
    for old, new in zip(before, ways(), strict=True):
        assert not torch.equal(old, new)
        close(new, wanted)
    with route(model, names, vision_tokens=vision_tokens), torch.no_grad():
        logits(model, inputs)
        randomise(model)
        within = logits(model, inputs)
    close(within, logits(model, inputs, task_ids=names))


# --- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}], ids=["greedy", "beams", "returned"]
)
@pytest.mark.parametrize("images", [[1, 1, 1], [2, 0, 1]], ids=str)
def test_generation_follows_the_tasks(model, images, options):
    names = ["where", None, "count"]
    inputs, options = batch(images), {"max_new_tokens": 5, "do_sample": False, **options}
    got = model.generate(**inputs, task_ids=names, **options)
    wanted = []
    for i, name in enumerate(names):
        set_task(model, *([] if name is None else [name]))
        wanted.append(model.generate(**sample(inputs, images, i), **options))
    assert torch.equal(got, torch.cat(wanted))
    set_task(model, "read")
    assert not torch.equal(got, model.generate(**inputs, **options))
    with route(model, names):
        assert torch.equal(model.generate(**inputs, **options), got)


def test_generation_stacks_factors_once_and_sees_weights_that_changed_before_it(monkeypatch):
    model, inputs = tiny_llava(), batch([1, 1])
    calls, stack = [], lilora.stacked
    monkeypatch.setattr(lilora, "stacked", lambda *arguments: calls.append(arguments) or stack(*arguments))
    options = {"task_ids": ["where", "read"], "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    first = model.generate(**inputs, **options)
    assert len(calls) == 3 * len(layers_of(model))  # of U, V and fusion, not once for each of five tokens
    with torch.no_grad():
        for layer in layers_of(model):
            layer.lilora_U["where"].mul_(-3)
    changed = model.generate(**inputs, **options)
    assert not torch.equal(changed[0], first[0])
    assert torch.equal(changed[1], first[1])
    logits_now = logits(model, inputs, task_ids=["where", "read"])[0, -1]
    assert changed[0, inputs["input_ids"].shape[1]] == logits_now.argmax()
    with torch.no_grad():
        for layer in layers_of(model):
            layer.lilora_U["where"].mul_(-3)
    assert not torch.equal(logits(model, inputs, task_ids=["where", "read"])[0, -1], logits_now)


def test_generations_inside_a_route_see_what_was_written_between_them():
    model, inputs, names = tiny_llava(), batch([1, 1]), ["where", "read"]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with route(model, names):
        first = model.generate(**inputs, **options)
        with torch.no_grad():
            for layer in layers_of(model):
                layer.lilora_U["where"].mul_(-3)
        second = model.generate(**inputs, **options)
        assert tasks_of(model).current.stacks == {}
    assert not torch.equal(first, second)
    assert torch.equal(second, model.generate(**inputs, task_ids=names, **options))


def test_ids_given_inside_a_route_count(model):
    more = batch([0, 1, 1])
    wanted = logits(model, more, task_ids=NAMES[:3])
    with route(model, ["where", "read"]):
        close(logits(model, more, task_ids=NAMES[:3]), wanted)


def test_a_route_serves_inference_mode_and_then_a_backward():
    model = tiny_llava()
    set_task(model, "read", train=False)
    layer = layers_of(model)[-1]
    x = torch.randn(2, 3, layer.in_features)
    with route(model, ["where", "read"]):
        with torch.inference_mode():
            layer(x)
        x.requires_grad_()
        layer(x).sum().backward()
    assert x.grad is not None


def test_generation_sees_shared_factors_that_a_loader_replaced():
    model, inputs = tiny_llava(), batch([1, 1])
    options = {"task_ids": ["where", "read"], "max_new_tokens": 3, "do_sample": False}
    before = logits(model, inputs, task_ids=["where", "read"])
    for layer in layers_of(model):
        newest = layer.tasks[-1]
        layer.lilora_A[newest] = nn.Parameter(torch.randn_like(layer.lilora_A[newest]), requires_grad=False)
    got = model.generate(**inputs, **options)
    now = logits(model, inputs, task_ids=["where", "read"])
    assert not torch.equal(now, before)
    assert torch.equal(got[:, inputs["input_ids"].shape[1]], now[:, -1].argmax(-1))


def test_generation_with_offloaded_factors_gathers_them_in_every_forward(monkeypatch):
    model, inputs = tiny_llava(), batch([0, 0])
    layers = [layer for layer in layers_of(model) if layer.place == TEXT]
    kept = [{name: p.data for name, p in layer.lilora_U.items()} for layer in layers]
    options = {"task_ids": ["where", "read"], "max_new_tokens": 3, "do_sample": False}
    wanted = model.generate(**inputs, **options)

    def move(layer, values):
        for name in layer.lilora_U:
            layer.lilora_U[name] = nn.Parameter(values[name], requires_grad=False)

    for layer, values in zip(layers, kept, strict=True):
        away = {name: value.to("meta") for name, value in values.items()}
        layer.register_forward_pre_hook(lambda layer, _, values=values: move(layer, values))
        layer.register_forward_hook(lambda layer, *_, away=away: move(layer, away))
        move(layer, away)
    assert torch.equal(model.generate(**inputs, **options), wanted)


def test_generation_reads_shared_factors_that_are_brought_anew_for_every_step():
    model, inputs = tiny_llava(), batch([0, 0])
    options = {"task_ids": ["where", "read"], "max_new_tokens": 4, "do_sample": False}
    wanted = model.generate(**inputs, **options)

    def bring(layer, _, values):
        layer.lilora_A[layer.tasks[0]] = nn.Parameter(values.clone(), requires_grad=False)

    def take(layer, *_):
        layer.lilora_A[layer.tasks[0]].data.fill_(torch.nan)

    for layer in layers_of(model):
        values = layer.lilora_A[layer.tasks[0]].detach().clone()
        layer.register_forward_pre_hook(partial(bring, values=values))
        layer.register_forward_hook(take)
    assert torch.equal(model.generate(**inputs, **options), wanted)


def test_sampled_sequences_repeat_the_task_of_their_sample(model):
    inputs = batch([1, 1])
    options = {"max_new_tokens": 4, "do_sample": True, "num_return_sequences": 3, "top_k": 1}
    got = model.generate(**inputs, task_ids=["where", "count"], **options)
    greedy = model.generate(**inputs, task_ids=["where", "count"], max_new_tokens=4, do_sample=False)
    assert torch.equal(got, greedy.repeat_interleave(3, 0))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ids, error, why",
    [
        (["read"], ValueError, r"shape \[1\]; it must be \[2\]"),
        (["read", "fly"], ValueError, r"'fly' is unknown; this model knows \['read', 'count', 'where'\]"),
        ("read", TypeError, "is 'read'; pass one name or id per sample"),
        ([0, 3], ValueError, "holds 3; known ids are"),
        ([0, -2], ValueError, "holds -2"),
        ([0, 1.0], TypeError, "task names or integer ids"),
        ([0, True], TypeError, "task names or integer ids"),
        (torch.tensor([0.0, 1.0]), TypeError, "torch.float32"),
        (torch.tensor([[0], [1]]), ValueError, r"shape \[2, 1\]"),
    ],
    ids=str,
)
def test_bad_task_ids(model, ids, error, why):
    inputs = batch([1, 1])
    with pytest.raises(error, match=why):
        logits(model, inputs, task_ids=ids)
    with pytest.raises(error, match=why):
        model.generate(**inputs, task_ids=ids, max_new_tokens=2)
    assert tasks_of(model).current is None


def test_images_that_the_route_does_not_explain_raise_with_both_counts(model):
    inputs = batch([1, 1])
    inputs["input_ids"][0, 1] = 5
    with pytest.raises(ValueError, match=r"linear_1.*\[2, 4\] rows.*2 images .* do not explain \[3, 4\] image tokens"):
        logits(model, inputs, task_ids=["read", "count"])


def test_a_route_without_units_takes_them_from_the_batch(model):
    inputs, names = batch([2, 0]), ["read", "count"]
    wanted = logits(model, inputs, task_ids=names)
    with route(model, names):
        close(logits(model, inputs), wanted)


def test_a_batch_of_another_size_than_the_route_raises_with_both_counts(model):
    with (
        pytest.raises(ValueError, match=r"task_ids has the shape \[2\]; it must be \[3\]"),
        route(model, ["read", "count"]),
    ):
        logits(model, batch([0, 0, 0]))


def test_a_model_that_is_not_attached_says_so():
    with pytest.raises(RuntimeError, match=r"call attach\(model\) once"), route(nn.Linear(2, 2), [0]):
        pass


def test_layers_with_other_tasks_cannot_share_a_route():
    layers = [LiLoRALinear(nn.Linear(4, 4), r=2, sub_rank=2) for _ in range(2)]
    layers[0].add_task("a")
    layers[1].add_task("b")
    with pytest.raises(ValueError, match=r"1 has the tasks \['b'\] but other layers have \['a'\]"):
        attach(nn.Sequential(*layers))


# --- Route by itself --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vision_tokens", [[8, 0, 4], torch.tensor([8, 0, 4])], ids=["eager", "in-graph"])
def test_packed_rows(vision_tokens):
    r = BatchContext(torch.tensor([7, 8, 9], dtype=torch.int32), vision_tokens=vision_tokens)
    assert r.rows(torch.empty(3, 4, 5), AHEAD).tolist() == [7] * 8 + [9] * 4
    assert r.rows(torch.empty(12, 5), AHEAD).tolist() == [7] * 8 + [9] * 4
    assert r.rows(torch.empty(24, 5), AHEAD).tolist() == [7] * 16 + [9] * 8
    # A vision tower's class token: 5 rows per image for 4 image tokens.
    assert r.rows(torch.empty(3, 5, 5), AHEAD).tolist() == [7] * 10 + [9] * 5
    for shape in [(2, 4, 5), (13, 5), (5, 5, 5)]:
        with pytest.raises((ValueError, RuntimeError), match=r"image tokens .* do not explain"):
            r.rows(torch.empty(*shape), AHEAD)


def test_flattened_text_rows():
    r = BatchContext(torch.tensor([1, 0], dtype=torch.int32), length=3)
    assert r.rows(torch.empty(2, 3, 4), TEXT).tolist() == [1, 1, 1, 0, 0, 0]
    assert r.rows(torch.empty(6, 4), TEXT).tolist() == [1, 1, 1, 0, 0, 0]
    assert r.rows(torch.empty(2, 3, 2, 4), TEXT).tolist() == [1] * 6 + [0] * 6
    for shape in [(2, 4), (5, 4), (3, 2, 4)]:
        with pytest.raises(ValueError, match="but the route has 2 samples of 3 tokens"):
            r.rows(torch.empty(*shape), TEXT)


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


def test_a_forward_that_accelerate_put_on_the_instance_is_routed_too():
    hooked, inputs, names = tiny_llava(), batch([2, 0]), ["count", "where"]
    wanted = logits(hooked, inputs, task_ids=names)
    detach(hooked)
    before = dispatch_model(hooked, {"": "cpu"}, main_device="cpu", force_hooks=True).forward
    attach(hooked)
    close(logits(hooked, inputs, task_ids=names), wanted)
    detach(hooked)
    assert hooked.forward is before


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
