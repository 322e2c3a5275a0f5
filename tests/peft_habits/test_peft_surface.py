"""The rest of PEFT's and transformers' surface: what works, and what is refused with a sentence."""

import copy
import os
import shutil

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training, save_as_lora
from peft.helpers import check_if_peft_model, disable_input_dtype_casting, rescale_adapter_scale, update_signature
from peft.utils.hotswap import hotswap_adapter
from support.habits import (
    CASES,
    MLP,
    adapted,
    adapted_layers,
    assert_close,
    assert_tied,
    assert_unchanged,
    expected_learning,
    ids,
    learning,
    llama,
    logits,
    of_task,
    one_sentence,
    output,
    randomise,
    settings,
    state_of,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.data import Dataset
from transformers import MambaConfig, MambaForCausalLM, SiglipVisionConfig, SiglipVisionModel

import lilora
from lilora.errors import UserError
from lilora.peft.tuner import shared_fingerprint

pytestmark = [
    pytest.mark.filterwarnings("ignore:Adapter name:UserWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
]

perceptron = CASES["mlp-paper"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """(folder of the base model, folder of the tasks a and b, inputs, the output of a mixed batch)."""
    torch.manual_seed(3)
    base, tasks, x = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("tasks"), ids()
    llama().save_pretrained(base)
    model = adapted(base=load_base(base))
    model.save_pretrained(tasks)
    return base, tasks, x, logits(model, x, task_ids=["a", "b", None])


def load_base(folder, dtype=torch.float64):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


# --- transformers' own methods ------------------------------------------------------------------------------------------


def test_transformers_adds_sets_disables_and_deletes(pretrained, tmp_path):
    base, _, x, _ = pretrained
    model = load_base(base)
    expected = logits(model, x)
    model.add_adapter(settings(), "a")
    assert learning(model) == expected_learning(model, "A", "B0", "a")
    model.add_adapter(settings(), "b")  # transformers activates what it adds
    assert model.active_adapters() == ["b"]
    assert learning(model) == expected_learning(model, "b")
    randomise(model)
    outputs = {}
    for task in "ab":
        model.set_adapter(task)
        outputs[task] = logits(model, x)
    model.disable_adapters()
    assert learning(model) == set()
    assert torch.equal(logits(model, x), expected)
    model.enable_adapters()
    assert learning(model) == expected_learning(model, "b")
    assert torch.equal(logits(model, x), outputs["b"])
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    # The folder names the base model, and its weights are in the base folder alone.
    assert_close(logits(loaded, x), outputs["b"])
    model.delete_adapter("b")
    assert model.active_adapters() == ["a"]
    assert torch.equal(logits(model, x), outputs["a"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_two_tasks_of_a_chain_load_into_a_narrower_base(pretrained, dtype):
    """Rounded to the base's dtype, the shared factors are no others: by transformers, and by PEFT without its up-cast."""
    base, tasks, x, _ = pretrained
    by_transformers, by_peft = load_base(base, dtype), load_base(base, dtype)
    for task in "ab":
        by_transformers.load_adapter(str(tasks / task), adapter_name=task)
    by_peft = PeftModel.from_pretrained(by_peft, tasks / "a", adapter_name="a", autocast_adapter_dtype=False)
    by_peft.load_adapter(tasks / "b", "b", autocast_adapter_dtype=False)
    mixed = {"task_ids": ["a", "b", None]}
    assert torch.equal(logits(by_transformers, x, **mixed), logits(by_peft, x, **mixed))
    for model in (by_transformers, by_peft):
        assert_tied(model, "ab")
        assert learning(model) == set()
        assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(
    "changes, words",
    [
        ({"hidden_size": 20}, r"lilora_A of task 'default' is \[6, 16\], but this model needs \[6, 20\]"),
        ({"num_hidden_layers": 3}, "model.layers.2.mlp.gate_proj.lilora_A is missing in the tensors of task"),
        (
            {"num_hidden_layers": 1},
            r"model.layers.1.mlp.\w+.lilora_. is unknown to the model, but in the tensors of task",
        ),
    ],
)
def test_a_task_of_another_base_model_is_refused(pretrained, changes, words, low_cpu_mem_usage):
    """As the first task the base is a plain model again; next to others they are as they were."""
    _, tasks, x, _ = pretrained
    base = llama(**changes)
    expected, attributes = logits(base, x), set(base.__dict__)
    with pytest.raises(UserError, match=words) as caught:
        PeftModel.from_pretrained(base, tasks / "a", low_cpu_mem_usage=low_cpu_mem_usage)
    one_sentence(caught)
    assert not adapted_layers(base)
    assert set(base.__dict__) <= attributes | {"peft_config"}
    assert torch.equal(logits(base, x), expected)
    model = adapted(base=base)
    before = state_of(model)
    with pytest.raises(UserError, match="shared factors"):
        model.load_adapter(tasks / "a", "c", low_cpu_mem_usage=low_cpu_mem_usage)
    assert_unchanged(model, before)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_truncated_file_costs_the_other_tasks_nothing(pretrained, tmp_path, low_cpu_mem_usage):
    base, tasks, x, _ = pretrained
    shutil.copytree(tasks / "b", tmp_path / "b")
    file = tmp_path / "b" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    model = PeftModel.from_pretrained(load_base(base), tasks / "a", adapter_name="a")
    expected, fingerprint = logits(model, x), shared_fingerprint(model)
    with pytest.raises(Exception, match=r"(?i)incomplete|header|deserial"):
        model.load_adapter(tmp_path / "b", "b", low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(model, x), expected)
    assert shared_fingerprint(model) == fingerprint


# --- helpers ------------------------------------------------------------------------------------------------------------


def test_helpers_that_work(pretrained):
    _, tasks, x, _ = pretrained
    model = adapted()
    expected = logits(model, x)
    assert check_if_peft_model(str(tasks / "a"))
    with disable_input_dtype_casting(model):
        assert torch.equal(logits(model, x), expected)
    update_signature(model)
    assert torch.equal(logits(model, x), expected)


@pytest.mark.parametrize(
    "use, error, words",
    [
        (lambda model: get_peft_model(llama(), settings(), "a", mixed=True), ValueError, "'LILORA' is not compatible"),
        (lambda model: rescale_adapter_scale(model, 0.5).__enter__(), ValueError, "only supported for models with `LoraLayer`s"),
        (lambda model: model.add_weighted_adapter(["a", "b"], [1, 1], "c"), UserError, "a weighted sum of LiLoRA tasks is none"),
        (lambda model: get_peft_model(model, settings(), "c"), UserError, "is adapted already; call model.add_adapter"),
        (lambda model: model.set_adapter("c"), ValueError, "Adapter c not found"),
        (lambda model: model.add_adapter("b", settings()), ValueError, "'b' already exists"),
        (lambda model: model.add_adapter("c", settings(bias="lora_only")), UserError, "one of .*'lilora_only'"),
    ],
)  # fmt: skip
def test_what_is_refused_changes_nothing(use, error, words):
    model = adapted()
    before = state_of(model)
    with pytest.raises(error, match=words):
        use(model)
    assert_unchanged(model, before)


def test_the_hotswaps_of_peft_and_transformers_name_what_they_know(pretrained):
    base, tasks, x, _ = pretrained
    model, plain = adapted(), load_base(base)
    before = state_of(model)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but LILORA was passed"):
        hotswap_adapter(model, str(tasks / "a"), "a")
    assert_unchanged(model, before)
    plain.load_adapter(str(tasks / "a"), adapter_name="a")
    expected = logits(plain, x)
    with pytest.raises(ValueError, match="Hotswapping is currently only supported for LoRA"):
        plain.load_adapter(str(tasks / "b"), adapter_name="a", hotswap=True)
    assert torch.equal(logits(plain, x), expected)


def test_a_task_is_converted_to_a_lora_of_its_rank_exactly(tmp_path):
    base, x = llama(), ids()
    model = adapted(base=copy.deepcopy(base))
    save_as_lora(tmp_path, model, model.peft_config["b"].r, adapter_name="b")
    lora = PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=False)
    model.set_adapter("b")
    torch.testing.assert_close(logits(lora, x), logits(model, x), rtol=0, atol=1e-6)


def test_kbit_training():
    model = get_peft_model(prepare_model_for_kbit_training(llama().bfloat16()), settings(), adapter_name="a")
    randomise(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    x = ids()
    model.train()(input_ids=x, labels=x).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_tied_head_is_adapted_but_not_merged():
    model, x = adapted(base=llama(tie_word_embeddings=True), target_modules=[*MLP, "lm_head"]), ids()
    inner = model.get_base_model()
    assert inner.lm_head.weight is inner.model.embed_tokens.weight
    with model.disable_adapter():
        base = logits(model, x)
    assert not torch.allclose(logits(model, x), base)
    before = state_of(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            UserError, match="embed_tokens and lm_head share one weight, so a merge would change both"
        ) as e:
            merge()
        one_sentence(e)
        assert_unchanged(model, dict(before))
    assert torch.equal(logits(model.unload(), x), base)


@pytest.mark.parametrize("bias", ["lilora_only", "all"])
def test_biases_are_saved_and_loaded(tmp_path, bias):
    base, x = llama(mlp_bias=True, attention_bias=True), ids()
    model = get_peft_model(copy.deepcopy(base), settings(bias=bias), adapter_name="a")
    randomise(model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")]
    for name in trained:
        model.get_parameter(name).data.normal_()
    before = learning(model)
    with pytest.warns(UserWarning, match=f"bias configured to be '{bias}'"), model.disable_adapter():
        assert not torch.allclose(logits(model, x), logits(base, x)), "biases stay, as PEFT warns"
    assert learning(model) == before
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        model.add_adapter("b", settings(bias=bias))
    model.save_pretrained(tmp_path)
    by_peft = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a")
    base.load_adapter(str(tmp_path / "a"))
    for loaded in (by_peft, base):
        assert_close(logits(loaded, x), logits(model, x))


# --- training that goes on, and graphs ----------------------------------------------------------------------------------


class Samples(Dataset):
    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"input_ids": self.x[i], "labels": self.x[i]}


@pytest.mark.parametrize("preset, turned", [("frozen", False), ("paper", False), ("paper", True)])
def test_trainer_resumes_from_its_checkpoint(pretrained, tmp_path, preset, turned, monkeypatch):
    """A folder for each task, in whatever order; the shared factors that move with the second task come back with it."""
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda *at: sorted(listdir(*at), reverse=turned))
    base, _, _, _ = pretrained
    x = ids(8)

    def trained(folder, steps, resume=None):
        torch.manual_seed(7)
        model = adapted(base=load_base(base), preset=preset)
        model.set_adapter("b")
        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=2,
            max_steps=4,
            learning_rate=0.1,
            save_steps=2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=Samples(x))
        if steps < 4:
            stop = type("Stop", (transformers.TrainerCallback,), {"on_step_end": stop_at(steps)})
            trainer.add_callback(stop())
        trainer.train(resume_from_checkpoint=resume)
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    whole = trained(tmp_path / "whole", 4)
    half = trained(tmp_path / "parts", 2)
    checkpoint = tmp_path / "parts" / "checkpoint-2"
    assert {path.name for path in checkpoint.iterdir() if path.is_dir()} == {"a", "b"}
    resumed = trained(tmp_path / "parts", 4, str(checkpoint))
    moved = {name.split("lilora_")[1] for name in whole if not torch.equal(whole[name], half[name])}
    # A Parameter is named by the first key it lies under.
    assert moved == {"U.b", "V.b", "fusion.b"} | ({"A.a", "B.a"} if preset == "paper" else set())
    for name, value in whole.items():
        assert_close(resumed[name], value)


def stop_at(steps):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= steps

    return on_step_end


@pytest.mark.parametrize("training", [False, True])
def test_one_graph_for_all_task_ids(training):
    model, batch = perceptron.adapted("abc"), perceptron.batch()
    model.base_model.set_adapter(list("abc"), inference_mode=not training)
    torch.compiler.reset()
    graphs = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    seen = []
    with torch.set_grad_enabled(training):
        for tasks in ([0, 1, -1], [2, 2, 0], [1, 0, 2]):
            task_ids = torch.tensor(tasks, dtype=torch.int32)
            got = compiled(**batch, task_ids=task_ids)
            assert_close(got.detach(), output(model, batch, task_ids=task_ids))
            seen.append(got.detach())
            if training:
                model.zero_grad()
                got.square().mean().backward()
                layer = next(iter(adapted_layers(model).values()))
                assert [bool(layer.lilora_U[task].grad.any()) for task in "abc"] == [i in tasks for i in range(3)]
    assert not torch.allclose(seen[0], seen[1])
    assert graphs.frame_count == 1


def test_one_graph_whichever_task_is_active():
    """Of the inner model: PEFT's wrapper reads the active adapter's name, so a graph around it is made for each name."""
    model, batch = perceptron.adapted("abc"), perceptron.batch()
    expected = {task: of_task(model, task, batch) for task in "abc"}
    torch.compiler.reset()
    graphs = CompileCounterWithBackend("eager")
    model.get_base_model().compile(backend=graphs, fullgraph=True)
    for given in (True, False):
        for active, task in zip("abc", "bca" if given else "abc", strict=True):
            model.set_adapter(active, inference_mode=True)
            task_ids = {"task_ids": torch.full((3,), "abc".index(task), dtype=torch.int32)} if given else {}
            assert_close(output(model, batch, **task_ids), expected[task])
        assert graphs.frame_count == (1 if given else 2)


# --- layers that their model does not run -----------------------------------------------------------------------------


SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
MAMBA = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}


class Own(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Inherited(torch.nn.Linear):
    pass


@pytest.mark.parametrize(
    "make, target, why",
    [
        (
            lambda: SiglipVisionModel(SiglipVisionConfig(**SMALL, image_size=8, patch_size=4)),
            r".*attention\.out_proj",
            r"head\.attention\.out_proj is a NonDynamicallyQuantizableLinear",
        ),
        (lambda: MambaForCausalLM(MambaConfig(**MAMBA)), r".*dt_proj", r"dt_proj is never run by MambaMixer"),
        (lambda: MambaForCausalLM(MambaConfig(**MAMBA)), r".*out_proj", r"out_proj is never run by MambaMixer"),
        (lambda: torch.nn.Sequential(Own(4, 4)), ["0"], "0 is a Own, not an nn.Linear"),
    ],
    ids=["attention", "dt_proj", "out_proj", "forward of its own"],
)
def test_layers_that_their_model_does_not_run_are_refused(make, target, why):
    model = make()
    before = set(dict(model.named_modules()))
    with pytest.raises(UserError, match=why):
        get_peft_model(model, lilora.LiLoRAConfig(r=4, sub_rank=2, target_modules=target))
    assert set(dict(model.named_modules())) == before


def test_a_subclass_with_the_forward_of_a_linear_layer_is_adapted():
    get_peft_model(torch.nn.Sequential(Inherited(4, 4)), lilora.LiLoRAConfig(r=4, sub_rank=2, target_modules=["0"]))
