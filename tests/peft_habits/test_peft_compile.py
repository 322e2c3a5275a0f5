"""torch.compile(fullgraph=True) of a model adapted through PEFT: no graph break, no second graph while tasks change."""

import copy

import pytest
import torch
from support.habits import adapted, ids, llama
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import CompileConfig

from lilora.peft.tuner import adapted_layers
from lilora_kernels import fuse_mlps

pytestmark = [
    pytest.mark.filterwarnings("ignore:Adapter name:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*checkpointing:FutureWarning"),
]
TASKS = ("a", "b", "c")


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def model(fused=False, layers=1, **options):
    made = adapted(TASKS, llama(num_hidden_layers=layers), **options).float()
    if fused:
        assert set(fuse_mlps(made).values()) == {None}
    return made


def train_together(peft_model):
    """PEFT activates one adapter; a mixed batch trains all of its tasks."""
    for layer in adapted_layers(peft_model).values():
        layer.set_task(*TASKS)
    return peft_model.train()


def compiled(module):
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(module, backend=counter, fullgraph=True), counter


def some_tasks(samples=3):
    return torch.randint(-1, len(TASKS), (samples,))


def loss_and_gradients(run, peft_model, **inputs):
    peft_model.zero_grad(set_to_none=True)
    loss = run(**inputs, labels=inputs["input_ids"], use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in peft_model.parameters() if p.grad is not None)]


def same(got, wanted, tolerance=1e-4):
    for ours, want in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, want, rtol=tolerance, atol=tolerance * max(want.abs().max().item(), 1e-3))


@pytest.mark.parametrize("fused, dropout", [(False, 0.1), (True, 0.0)], ids=["apart", "fused"])
def test_twenty_training_steps_of_changing_tasks(fused, dropout):
    peft_model = train_together(model(fused, dropout=dropout))
    run, graphs = compiled(peft_model)
    for i in range(20):
        inputs = {"input_ids": ids(), "task_ids": some_tasks()}
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            got = loss_and_gradients(run, peft_model, **inputs)
        if not dropout and i % 10 == 0:
            same(got, loss_and_gradients(peft_model, peft_model, **inputs))
    assert graphs.frame_count == 1
    assert not counters["graph_break"]


def test_twenty_training_steps_of_switched_adapters():
    """The first task trains the shared factors too, which makes a second graph; later tasks make none.

    The base model is compiled: PeftModel's own forward depends on the adapter's name, one graph for each.
    """
    peft_model = model(fused=True).train()
    run, graphs = compiled(peft_model.get_base_model())
    for i in range(20):
        peft_model.set_adapter(TASKS[i % 3])
        inputs = {"input_ids": ids()}
        with torch.compiler.set_stance("fail_on_recompile" if i > 1 else "default"):
            got = loss_and_gradients(run, peft_model, **inputs)
        if i in (3, 4):
            same(got, loss_and_gradients(peft_model, peft_model, **inputs))
    assert graphs.frame_count == 2


def test_one_graph_for_batches_of_any_size():
    peft_model = model(fused=True)
    run, graphs = compiled(peft_model)
    with torch.no_grad():
        for samples in (3, 5, 2, 7):
            inputs = {"input_ids": ids(samples), "task_ids": some_tasks(samples)}
            for tensor in inputs.values():
                torch._dynamo.mark_dynamic(tensor, 0)
            got = run(**inputs, use_cache=False).logits
            same([got], [peft_model(**inputs, use_cache=False).logits])
    assert graphs.frame_count == 1


@pytest.mark.parametrize("mixed", [False, True], ids=["active", "mixed"])
def test_generation_with_a_static_cache(mixed):
    """As transformers compiles it: the prompt runs as it is, and every decode step of all calls is one graph.

    Of active tasks two: the first task's shared factors require gradients, which a graph looks at even without any.
    """
    peft_model, results = model(fused=mixed), []
    static = {"cache_implementation": "static"}
    compiling = CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    compiling._compile_all_devices = True  # else transformers compiles on accelerators only
    for tasks in (["a", None, "c"], ["c", "b", "b"], ["b", "a", None], ["b"] * 3):
        x, routing = ids(), {"task_ids": tasks} if mixed else {}
        if not mixed:
            peft_model.set_adapter(tasks[0])
        steps = {
            "max_new_tokens": 6,
            "do_sample": False,
            "output_logits": True,
            "return_dict_in_generate": True,
            **routing,
        }
        found = [
            torch.stack(peft_model.generate(input_ids=x, **steps, **how).logits)
            for how in ({}, static | {"disable_compile": True}, static | {"compile_config": compiling})
        ]
        same(found[1:], found[:1] * 2, tolerance=1e-5)
        results.append(counters["stats"]["unique_graphs"])
    assert results == ([1, 1, 1, 1] if mixed else [1, 2, 2, 2])
    assert not counters["graph_break"]


@pytest.mark.parametrize("trainable", [False, True])
def test_a_task_loaded_by_transformers_is_what_a_first_compiled_forward_computes(trainable, tmp_path):
    base, x = llama(), ids()
    known = adapted("ab", copy.deepcopy(base))
    known.save_pretrained(tmp_path)
    known.set_adapter("a")
    loaded = copy.deepcopy(base)
    loaded.load_adapter(str(tmp_path / "a"), adapter_name="a", is_trainable=trainable)
    output = torch.compile(loaded, backend="eager")(input_ids=x).logits
    torch.testing.assert_close(output, known(input_ids=x).logits)
    learning = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert bool(learning) == trainable
    if trainable:
        output.tanh().sum().backward()
        assert {name for name, p in loaded.named_parameters() if p.grad is not None} == learning
