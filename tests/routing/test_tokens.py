"""Task ids for each token: rows that hold several samples, packed one behind the other."""

import pytest
import torch
from peft import get_peft_model
from support.tiny_llava import randomise
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import LlamaConfig, LlamaForCausalLM

import lilora
from lilora_kernels import LiLoRALinear, attach, freeze, fuse_mlps, set_task

TASKS = ("a", "b")
# Three samples of 3, 2 and 4 tokens in one row, and their positions.
LENGTHS, NAMES = (3, 2, 4), ("b", None, "a")
POSITIONS = torch.tensor([[i for n in LENGTHS for i in range(n)]])
PACKED = [[name for name, n in zip(NAMES, LENGTHS, strict=True) for _ in range(n)]]


@pytest.fixture(scope="module")
def model():
    """Its attention is in fp64 all through: eager has a softmax in fp32, whose last bits may depend on the length of a row."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, attn_implementation="sdpa", bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    settings = lilora.LiLoRAConfig(r=4, sub_rank=2, dropout=0.0, target_modules="all-linear")
    model = get_peft_model(LlamaForCausalLM(config).double(), settings, "a", autocast_adapter_dtype=False)
    model.add_adapter("b", settings)
    randomise(model)
    return model.eval()


def pieces(x, dim=1):
    return x.split(LENGTHS, dim)


def test_packed_samples_compute_what_each_does_alone(model):
    ids = torch.randint(3, 40, (1, sum(LENGTHS)))
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=POSITIONS, use_cache=False, task_ids=PACKED).logits
        for got, own, name in zip(pieces(packed), pieces(ids), NAMES, strict=True):
            wanted = model(input_ids=own, task_ids=[name]).logits
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
        plain = model(input_ids=ids, position_ids=POSITIONS, use_cache=False, task_ids=[None]).logits
    assert (packed - plain).abs().max() > 1e-2


def test_gradients_of_packed_samples_are_the_sums_over_them(model):
    set_task(model, *TASKS)
    try:
        ids = torch.randint(3, 40, (1, sum(LENGTHS)))
        mix = torch.randn(1, sum(LENGTHS), 40).double()
        (model(input_ids=ids, position_ids=POSITIONS, use_cache=False, task_ids=PACKED).logits * mix).sum().backward()
        packed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        for own, part, name in zip(pieces(ids), pieces(mix), NAMES, strict=True):
            (model(input_ids=own, task_ids=[name]).logits * part).sum().backward()
        assert any("lilora_U.b" in name for name in packed)
        for name, grad in packed.items():
            wanted = dict(model.named_parameters())[name].grad
            torch.testing.assert_close(grad, wanted, rtol=0, atol=1e-12)
    finally:
        model.zero_grad()
        set_task(model, "a")


@pytest.mark.parametrize("form", ["names", "ids", "tensor"])
def test_every_form_of_ids_for_each_token(model, form):
    names = [["a", "b", None, "b"], [None, "a", "a", "b"]]
    ids = torch.randint(3, 40, (2, 4))
    numbers = [[-1 if name is None else TASKS.index(name) for name in row] for row in names]
    given = {"names": names, "ids": numbers, "tensor": torch.tensor(numbers)}[form]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, task_ids=given).logits, model(input_ids=ids, task_ids=names).logits)
        by_sample = model(input_ids=ids, task_ids=["a", "b"]).logits
        repeated = model(input_ids=ids, task_ids=[["a"] * 4, ["b"] * 4]).logits
    torch.testing.assert_close(repeated, by_sample, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "given, sentence",
    [
        ([["a", "b"], ["a", "b"]], r"task_ids has the shape \[2, 2\]; it must be \[2, 4\], one id for each token"),
        ([["a"] * 4], r"task_ids has the shape \[1, 4\]; it must be \[2\]"),
        ([["a"] * 4, ["b"] * 3], r"task_ids has rows of \[4, 3\] ids; give one for each token"),
        ([["a"] * 4, ["fly"] * 4], "task 'fly' is unknown"),
        (torch.zeros(2, 4, 1, dtype=torch.int64), r"task_ids has the shape \[2, 4, 1\]"),
    ],
)
def test_what_does_not_fit_is_one_sentence(model, given, sentence):
    with pytest.raises(ValueError, match=sentence), torch.no_grad():
        model(input_ids=torch.randint(3, 40, (2, 4)), task_ids=given)


def test_generate_takes_one_id_for_each_sample(model):
    with pytest.raises(ValueError, match=r"shape \[1, 4\]; generate takes one id for each sample"):
        model.generate(input_ids=torch.randint(3, 40, (1, 4)), task_ids=[["a"] * 4], max_new_tokens=2)


class Mixing(nn.Module):
    """A layer that sees every token, one that sees their mean."""

    def __init__(self, mean):
        super().__init__()
        self.mean = mean
        self.layer = LiLoRALinear(nn.Linear(8, 8).requires_grad_(False), r=4, sub_rank=2, dropout=0.0)
        for task in TASKS:
            self.layer.add_task(task)
        randomise(self)

    def forward(self, x):
        return self.layer(x.mean(1) if self.mean else x)


@pytest.mark.parametrize("state", ["live", "frozen"])
def test_plain_layers_take_them_too(state):
    model, x, ids = Mixing(False).eval(), torch.randn(2, 3, 8), torch.tensor([[0, 1, -1], [1, 1, 0]])
    attach(model)
    if state == "frozen":
        freeze(model, capacity=4)
    with torch.no_grad():
        got = model(x, task_ids=ids)
        for at, i in enumerate(ids.flatten().tolist()):
            wanted = model(x.view(6, 1, 8)[at : at + 1], task_ids=[i])
            torch.testing.assert_close(got.view(6, 8)[at], wanted.view(8), rtol=0, atol=1e-6)
        if state == "live":
            assert torch.equal(model.layer(x, task=ids), got)
            with pytest.raises(ValueError, match=r"task has the shape \[2, 2\]; it must be \[2, 3\]"):
                model.layer(x, task=ids[:, :2])


def test_a_layer_that_does_not_see_each_token_once_refuses():
    model = Mixing(True).eval()
    attach(model)
    with pytest.raises(ValueError, match=r"layer sees \[2\] rows, and task_ids are given for \[2, 3\] tokens"):
        model(torch.randn(2, 3, 8), task_ids=[["a", "b", "b"], ["a", "a", "a"]])


def test_fused_mlps_take_them(model):
    ids = torch.randint(3, 40, (1, sum(LENGTHS)))
    with torch.no_grad():
        wanted = model(input_ids=ids, position_ids=POSITIONS, use_cache=False, task_ids=PACKED).logits
        fuse_mlps(model.get_base_model())
        got = model(input_ids=ids, position_ids=POSITIONS, use_cache=False, task_ids=PACKED).logits
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_a_compiled_model_takes_other_ids_without_compiling_again(model):
    graphs = CompileCounterWithBackend("eager")
    inner = model.get_base_model()
    ids = torch.randint(3, 40, (1, 4))
    mixes = [torch.tensor([row]) for row in ([0, 1, -1, 1], [1, 1, 0, 0], [-1, 0, 0, 1])]
    with torch.no_grad():
        wanted = [inner(input_ids=ids, task_ids=mix).logits for mix in mixes]
        compiled = torch.compile(inner, backend=graphs, dynamic=False)
        for mix, logits in zip(mixes, wanted, strict=True):
            torch.testing.assert_close(compiled(input_ids=ids, task_ids=mix).logits, logits, rtol=0, atol=1e-12)
    assert graphs.frame_count <= 2
