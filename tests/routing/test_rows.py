"""Whose a layer's rows are: of pooled samples, of models that reorder them, and where nothing tells."""

import pytest
import torch
import transformers
from support.habits import MLP, adapted
from support.tiny_llava import randomise
from torch import nn

from lilora_kernels import LiLoRALinear, attach, freeze, route, set_task
from lilora_kernels.routing.context import TEXT, BatchContext, Tasks

NAMES = ["a", "b", "a"]


@pytest.fixture(autouse=True)
def _fresh():
    yield
    torch.compiler.reset()


def with_adapters(model, paths):
    for path in paths:
        parent, _, name = path.rpartition(".")
        parent = model.get_submodule(parent)
        layer = LiLoRALinear(getattr(parent, name), r=4, dropout=0.0)
        for task in ("a", "b"):
            layer.add_task(task)
        setattr(parent, name, layer)
    randomise(model)
    attach(model)
    return model.eval()


class Pooled(nn.Module):
    """x [B, L, K], or with an embedding tokens [B, L], -> [B, 4]."""

    def __init__(self, tokens=False):
        super().__init__()
        self.embed = nn.Embedding(20, 8) if tokens else nn.Identity()
        self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.inner(self.embed(x)).mean(1))


POOLED = {
    "images": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 4)),
        ["1", "3"],
        lambda: torch.randn(3, 3, 8, 8),
    ),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 4)),
        ["3"],
        lambda: torch.randn(3, 3, 8, 8),
    ),
    "series": (Pooled, ["inner", "head"], lambda: torch.randn(3, 5, 8)),
    "tokens": (lambda: Pooled(tokens=True), ["inner", "head"], lambda: torch.randint(20, (3, 5))),
}


@pytest.mark.parametrize("kind", POOLED)
def test_pooled_samples_have_a_row_each(kind):
    torch.manual_seed(0)
    make, paths, inputs = POOLED[kind]
    model, x = with_adapters(make(), paths), inputs()
    with torch.no_grad():
        mixed = model(x, task_ids=NAMES)
        for i, name in enumerate(NAMES):
            set_task(model, name)
            torch.testing.assert_close(mixed[i : i + 1], model(x[i : i + 1]))
        assert not torch.allclose(mixed, model(x, task_ids=["b", "a", "b"]))


def test_a_classifier_of_transformers_has_a_row_for_each_sample():
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.RobertaConfig(vocab_size=40, num_labels=3, max_position_embeddings=40, **config)
    model = with_adapters(
        transformers.RobertaForSequenceClassification(config), ["classifier.dense", "classifier.out_proj"]
    )
    ids = torch.randint(3, 40, (3, 5))
    with torch.no_grad():
        mixed = model(input_ids=ids, task_ids=NAMES).logits
        for i, name in enumerate(NAMES):
            set_task(model, name)
            torch.testing.assert_close(mixed[i : i + 1], model(input_ids=ids[i : i + 1]).logits)


@pytest.mark.parametrize("length", [4, 5])
def test_a_model_that_sees_its_sequences_first_takes_batches_of_one_task(length):
    config = transformers.XLNetConfig(vocab_size=40, d_model=16, n_layer=1, n_head=2, d_inner=24)
    model = adapted(base=transformers.XLNetLMHeadModel(config).double().eval(), target_modules=["layer_1", "layer_2"])
    ids = torch.randint(2, 40, (4, length))
    with torch.no_grad():
        model(input_ids=ids, task_ids=["b"] * 4)
        with pytest.raises(ValueError, match="xlnet has layers that see its sequences transposed; pass batches of one"):
            model(input_ids=ids, task_ids=["a", "b", "a", "b"])


def test_ids_that_are_given_to_a_layer_with_its_rows_need_no_order():
    config = transformers.XLNetConfig(vocab_size=40, d_model=16, n_layer=1, n_head=2, d_inner=24)
    model = adapted(base=transformers.XLNetLMHeadModel(config).double().eval(), target_modules=["layer_1"])
    layer, x = model.get_base_model().transformer.layer[0].ff.layer_1, torch.randn(2, 3, 16, dtype=torch.float64)
    with torch.no_grad():
        y = layer(x, task=torch.tensor([1, 0], dtype=torch.int32))
        for at, task in enumerate((1, 0)):
            torch.testing.assert_close(y[at : at + 1], layer(x[at : at + 1], task=torch.tensor([task])))


def test_a_number_as_first_argument_is_no_batch():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 4)

        def forward(self, scale, x):
            return scale * self.inner(x)

    model = with_adapters(Scaled(), ["inner"])
    with torch.no_grad():
        assert model(torch.tensor(0.5), torch.randn(3, 8), task_ids=["b"] * 3).shape == (3, 4)


# --- ids ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def model():
    torch.manual_seed(0)
    return with_adapters(nn.Sequential(nn.Linear(8, 8)), ["0"])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_written_into_ids_after_a_route_was_entered_is_not_seen(model, frozen, dtype):
    x = torch.randn(2, 8)
    if frozen:
        freeze(model)
    with torch.no_grad():
        wanted, ids = model(x, task_ids=[0, 1]), torch.tensor([0, 1], dtype=dtype)
        with route(model, ids):
            ids.fill_(1)
            torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize("ids", [{0, 1}, frozenset("ab"), {"a": 0, "b": 1}], ids=lambda ids: type(ids).__name__)
def test_ids_without_an_order_are_refused(model, ids):
    with pytest.raises(TypeError, match="pass one name or id per sample, in a list"):
        model(torch.randn(2, 8), task_ids=ids)


def test_an_id_beyond_32_bits_is_unknown_as_others_are(model):
    with pytest.raises(ValueError, match=f"task_ids holds {2**40}; known ids are"):
        model(torch.randn(1, 8), task_ids=[2**40])


@pytest.mark.parametrize("frozen", [False, True])
def test_another_default_device_is_none_of_ids(model, frozen):
    x = torch.randn(2, 8)
    if frozen:
        freeze(model, capacity=3)
    with torch.no_grad():
        wanted = model(x, task_ids=["b", None])
        with torch.device("meta"):
            torch.testing.assert_close(model(x, task_ids=["b", None]), wanted)


def test_compiled_a_route_of_fewer_ids_than_samples_raises(model):
    with torch.no_grad(), route(model, torch.tensor([0, 1])):
        with pytest.raises(ValueError, match="the route has 2 samples"):
            model(torch.randn(4, 8))
        with pytest.raises(Exception, match="the route has 2 samples"):
            torch.compile(model, backend="eager")(torch.randn(4, 8))


def test_rows_of_one_sample_are_one_behind_the_other_in_a_graph_too(model):
    """An expanded view is none that the kernels take."""
    strides = []

    def rows(x, ids):
        found = BatchContext(ids, tasks=model.lilora_tasks).rows(x, TEXT)
        strides.append(found.is_contiguous())
        return found + 0

    torch.compile(rows, backend="eager")(torch.randn(1, 5, 8), torch.tensor([1], dtype=torch.int32))
    assert strides == [True]


def test_a_frozen_model_on_a_device_knows_on_the_host_whose_its_rows_are():
    """The plans made of library products ask; a copy from the device would wait for it."""
    tasks = Tasks()
    for name in ("a", "b"):
        tasks.add(name)
    context = BatchContext(torch.tensor([1, 0], dtype=torch.int32, device="meta"), ids=[1, 0], tasks=tasks)
    rows = context.rows(torch.empty(2, 3, 8, device="meta"), TEXT, (False, False, True))
    assert rows.layouts == []
    assert rows.on_host.tolist() == [1, 1, 1, 0, 0, 0]


# --- attach -------------------------------------------------------------------------------------------------------------


def test_a_refused_attach_leaves_the_model_without_routing():
    class Taking(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = (LiLoRALinear(nn.Linear(8, 8), r=2) for _ in range(2))

        def forward(self, x, **kwargs):
            return self.two(self.one(x))

    model = Taking()
    for layer, names in ((model.one, "ab"), (model.two, "a")):
        for name in names:
            layer.add_task(name)
    randomise(model)
    model(torch.randn(2, 8))
    with pytest.raises(ValueError, match="two has the tasks"):
        attach(model)
    with pytest.raises(TypeError, match="task_ids do not reach the adapted layers"):
        model(torch.randn(2, 8), task_ids=[1, 1])
    assert model.one.model_tasks is not model.two.model_tasks


# --- generation ---------------------------------------------------------------------------------------------------------


class Guided(nn.Module):
    """Generates with a second half of its batch, as some models do with guidance."""

    main_input_name = "input_ids"

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.generation_config = transformers.GenerationConfig()

    def forward(self, input_ids):
        return self.head(self.embed(input_ids))

    def generate(self, input_ids, generation_config=None, guidance_scale=None, num_beams=1):
        guidance_scale = guidance_scale or getattr(self.generation_config, "guidance_scale", None)
        y = self(input_ids=input_ids.repeat_interleave(num_beams, 0))
        return y if guidance_scale is None else y + guidance_scale * self(input_ids=input_ids.repeat(2, 1))[: len(y)]


def test_the_second_half_of_a_guided_batch_is_no_beams():
    model, ids = with_adapters(Guided(), ["head"]), torch.randint(20, (2, 3))
    with torch.no_grad():
        beams = model.generate(ids, num_beams=2, task_ids=["a", "b"])
        torch.testing.assert_close(beams, model(ids.repeat_interleave(2, 0), task_ids=["a", "a", "b", "b"]))
        assert model.generate(ids, guidance_scale=3.0, task_ids=["b", "b"]).shape == (2, 3, 20)
        with pytest.raises(ValueError, match=r"which has a guidance_scale, has 4 samples.* pass batches of one task"):
            model.generate(ids, guidance_scale=3.0, task_ids=["a", "b"])
        model.generation_config.guidance_scale = 3.0
        for given in ({}, {"generation_config": transformers.GenerationConfig(max_new_tokens=2)}):
            with pytest.raises(ValueError, match="which has a guidance_scale, has 4 samples"):
                model.generate(ids, **given, task_ids=["a", "b"])


def test_continuous_batching_takes_no_task_ids():
    model = adapted(target_modules=MLP)
    with pytest.raises(TypeError, match="generate_batch schedules its requests by itself"):
        model.generate_batch([[1, 2], [3]], task_ids=["a", "b"])
