"""Quantised bases keep their own product: torchao's int8 on any machine, torch's dynamic int8, bitsandbytes if installed."""

import pytest
import torch
import transformers
from peft import get_peft_model
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from support.habits import TEXT, ids, randomise, settings
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from lilora.errors import UserError
from lilora.peft.layer import adapted_layers
from lilora_kernels import LiLoRALinear, explain, fuse_mlps
from lilora_kernels.ops.delta import reference

pytestmark = [
    pytest.mark.filterwarnings("ignore:Adapter name:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*checkpointing:FutureWarning"),
]
K, N = 24, 20
TASKS = ("a", "b")
MIXED = torch.tensor([0, -1, 1, 0], dtype=torch.int32)


def int8():
    model = nn.Sequential(nn.Linear(K, N))
    quantize_(model, Int8WeightOnlyConfig())
    return model[0]


@pytest.fixture
def layer():
    made = LiLoRALinear(int8().requires_grad_(False), r=8, sub_rank=4, dropout=0.0)
    for task in TASKS:
        made.add_task(task)
    randomise(made)
    made.set_task(*TASKS)
    return made


def formula(layer, x, ids):
    """The adapters' part of y in fp64, and their parameters there."""
    wide = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters() if "lilora_" in name}
    u, v, fusion = (torch.stack([wide[f"lilora_{key}.{task}"] for task in TASKS]) for key in ("U", "V", "fusion"))
    a, b0 = (wide[f"lilora_{key}.a"] for key in ("A", "B"))
    return reference.delta(x, a, b0, u, v, fusion.squeeze(1), ids, scaling=layer.lilora_scaling), wide


def close(got, wanted, tolerance):
    torch.testing.assert_close(got.double(), wanted.double(), rtol=0, atol=tolerance * wanted.abs().max().item())


def test_the_base_is_its_own_product_and_the_adapter_the_formula(layer):
    x = torch.randn(4, K, requires_grad=True)
    dy, base = torch.randn(4, N), layer.base_layer
    y = layer(x, task=MIXED)
    y.backward(dy)
    assert torch.equal(y[1], base(x)[1])
    assert torch.equal(layer(x, task=torch.full((4,), -1)), base(x))
    assert torch.equal((y - base(x))[1], torch.zeros(N))
    wide_x = x.detach().double().requires_grad_()
    delta, wide = formula(layer, wide_x, MIXED)
    wanted = wide_x @ base.weight.dequantize().double().T + base.bias.double() + delta
    close(y, base(x).double() + delta, 1e-6)
    wanted.backward(dy.double())
    close(x.grad, wide_x.grad, 1e-5)
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            close(parameter.grad, wide[name].grad, 1e-5)


def test_what_it_says_of_itself(layer):
    assert "base_layer(x) + delta, because the base is a Linear of an Int8Tensor" in explain(layer)
    before = layer.base_layer.weight.dequantize()
    with pytest.raises(TypeError, match=r"merge needs a plain nn\.Linear base, not a Linear of an Int8Tensor"):
        layer.merge("a")
    assert torch.equal(layer.base_layer.weight.dequantize(), before)


def test_compiled_with_changing_task_ids(layer):
    torch.compiler.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    run = torch.compile(layer, backend=graphs, fullgraph=True)
    for _ in range(3):
        x, task = torch.randn(4, K), torch.randint(-1, 2, (4,))
        torch.testing.assert_close(run(x, task=task), layer(x, task=task), rtol=1e-5, atol=1e-5)
    assert graphs.frame_count == 1


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_packed_weight_behind_a_method():
    """It has no backward of its own, so an input that needs a gradient is torch's to refuse."""
    base = torch.ao.nn.quantized.dynamic.Linear(K, N)
    base.set_weight_bias(torch.quantize_per_tensor(torch.randn(N, K), 0.02, 0, torch.qint8), torch.randn(N))
    layer = LiLoRALinear(base, r=8, sub_rank=4, dropout=0.0)
    for task in TASKS:
        layer.add_task(task)
    randomise(layer)
    layer.set_task(*TASKS)
    x = torch.randn(4, K)
    assert "because the base is a Linear" in explain(layer)
    y = layer(x, task=MIXED)
    assert torch.equal(y[1], base(x)[1])
    close(y, base(x).double() + formula(layer, x.double(), MIXED)[0], 1e-6)
    y.sum().backward()
    assert layer.lilora_U["a"].grad.abs().sum() > 0
    with pytest.raises(TypeError, match=r"merge needs a plain nn\.Linear base"):
        layer.merge("a")


# --- through transformers and PEFT ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TEXT | {"hidden_size": 64, "intermediate_size": 128})
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def adapted(folder, quantization):
    """A quantised model with random tasks."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.float32)
    model = get_peft_model(model, settings(), adapter_name=TASKS[0])
    model.add_adapter(TASKS[1], settings())
    torch.manual_seed(1)
    for parameter in [p for name, p in model.named_parameters() if "lilora_" in name]:
        parameter.data.normal_(std=0.1)
    return model.eval()


@pytest.fixture
def model(folder):
    return adapted(folder, transformers.TorchAoConfig(Int8WeightOnlyConfig()))


def dequantised(folder):
    """The same model on weights in fp32 that have the quantised ones' values."""
    quantised = adapted(folder, transformers.TorchAoConfig(Int8WeightOnlyConfig()))
    for module in quantised.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.dequantize(), requires_grad=False)
    for layer in adapted_layers(quantised).values():
        layer.quantization_backend = None
    return quantised


def results(model, x, **options):
    """Logits, and the gradients of everything that learns."""
    model.zero_grad()
    output = model(input_ids=x, labels=x, **options)
    output.loss.backward()
    return [output.logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def test_mixed_batches_generation_and_gradients(model, folder):
    twin, x, names = dequantised(folder), ids(3), ["a", None, "b"]
    assert all(
        "base_layer(x) + delta, because the base is quantised (torchao)" in e for e in explain(model).splitlines()[:-5]
    )
    assert set(fuse_mlps(model).values()) == {"in gate_proj the base is quantised (torchao)"}
    for each in (model, twin):
        for layer in adapted_layers(each).values():
            layer.set_task(*TASKS)
    for got, want in zip(results(model, x, task_ids=names), results(twin, x, task_ids=names), strict=True):
        close(got, want, 1e-4)
    options = {"task_ids": names, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(input_ids=x, **options), twin.generate(input_ids=x, **options))


def rounding(layer):
    """Half a step of the int8 grid, for each row of the weight."""
    return layer.base_layer.weight.scale.reshape(-1, 1) / 2 * 1.01


def test_merging_rounds_the_sum_to_int8_once(model):
    layers = adapted_layers(model).values()
    wanted = {layer: layer.get_base_weight() + layer.delta_weight("a") for layer in layers}
    model.set_adapter("a")
    with pytest.warns(UserWarning, match="merging rounds the base weight to torchao again"):
        model.merge_adapter()
    for layer, weight in wanted.items():
        assert ((layer.get_base_weight() - weight).abs() <= rounding(layer)).all()
        wanted[layer] = layer.get_base_weight() - layer.delta_weight("a")
    with pytest.raises(RuntimeError, match="unmerge"):
        model(input_ids=ids(), task_ids=["a", "b", None])
    model.unmerge_adapter()
    for layer, weight in wanted.items():
        assert ((layer.get_base_weight() - weight).abs() <= rounding(layer)).all()


@pytest.mark.filterwarnings("ignore:merging rounds:UserWarning")
def test_unloading_leaves_the_quantised_model(model):
    x = ids()
    merged = model.merge_and_unload(safe_merge=True)
    linear = merged.model.layers[0].mlp.gate_proj
    assert type(linear) is nn.Linear
    assert type(linear.weight).__name__ == "Int8Tensor"
    assert merged(input_ids=x).logits.isfinite().all()


def test_a_backend_without_a_way_back_refuses_to_merge(model):
    layer = next(iter(adapted_layers(model).values()))
    layer.quantization_backend = ForwardOnlyQuantizationBackend("gptq")
    before = layer.base_layer.weight.dequantize()
    with pytest.raises(UserError, match="cannot be merged into a base quantised by gptq"):
        layer.merge()
    assert layer.merged_task is None
    assert torch.equal(layer.base_layer.weight.dequantize(), before)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes(bits, folder):
    pytest.importorskip("bitsandbytes")
    model = adapted(folder, transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True}))
    assert f"because the base is quantised (bnb {bits}bit)" in explain(model)
    x, names = ids(3), ["a", None, "b"]
    assert all(g.isfinite().all() for g in results(model, x))
    layer = next(iter(adapted_layers(model).values()))
    h = torch.randn(4, 64)
    with torch.no_grad():
        assert torch.equal(layer(h, task=MIXED)[1], layer.base_layer(h)[1])
        close(layer(h, task=MIXED), layer.base_layer(h).double() + formula(layer, h.double(), MIXED)[0], 1e-6)
    assert model.generate(input_ids=x, task_ids=names, max_new_tokens=3).shape == (3, 8)
