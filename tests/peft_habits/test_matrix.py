"""What PEFT's own tests ask of every method, asked of models x settings: a row of CASES for each."""

import copy
import io
import pickle

import pytest
import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from support.habits import (
    CASES,
    adapted_layers,
    assert_close,
    assert_tied,
    assert_unchanged,
    expected_learning,
    learning,
    mlp,
    of_task,
    output,
    randomise,
    sample,
    state_of,
    train,
)

from lilora import LiLoRAConfig, hotswap
from lilora.errors import UserError
from lilora.peft.tuner import shared_fingerprint

pytestmark = [
    pytest.mark.filterwarnings("ignore:Adapter name:UserWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
    pytest.mark.filterwarnings("ignore:. was active:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged:UserWarning"),
]
MIXED = ["a", "b", None]


@pytest.fixture(params=CASES, scope="module")
def case(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def pretrained(case, tmp_path_factory):
    """(base model never to be changed, folder of tasks a and b, batch, output of each task, of a mixed batch)."""
    torch.manual_seed(2)
    folder, batch, base = tmp_path_factory.mktemp("tasks"), case.batch(), case.base()
    model = case.adapted(base=copy.deepcopy(base))
    model.save_pretrained(folder)
    mixed = output(model, batch, task_ids=MIXED)
    return base, folder, batch, {task: of_task(model, task, batch) for task in "ab"}, mixed


# --- tasks come, learn and go -------------------------------------------------------------------------------------------


def test_a_new_task_is_the_base_model_until_it_learns(case):
    base, batch = case.base(), case.batch()
    expected = output(base, batch)
    model = get_peft_model(base, case.config(), adapter_name="a")
    assert torch.equal(output(model, batch), expected)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, batch)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}
    assert changed == {name for name in before if "lilora_" in name}
    assert not torch.allclose(output(model, batch), expected)
    with model.disable_adapter():
        assert torch.equal(output(model, batch), expected)


def test_what_learns_after_each_step(case, pretrained):
    """Only the active task and, as the preset says, the shared factors; nothing that a step did not name changes."""
    model = get_peft_model(case.base(), case.config(), adapter_name="a")
    first, later = (expected_learning(model, *case.learns(later=later)) for later in (False, True))

    def now(task, shared):
        assert learning(model) == (expected_learning(model, task) | shared if task else set())

    now("a", first)
    model.add_adapter("b", case.config())
    now("a", first)  # a task that is added is not active
    model.set_adapter("b")
    now("b", later)
    model.eval(), model.train()
    now("b", later)
    with model.disable_adapter():
        now(None, later)
    now("b", later)
    model.base_model.disable_adapter_layers()
    now(None, later)
    model.base_model.enable_adapter_layers()
    now("b", later)
    model.merge_adapter()
    model.unmerge_adapter()
    now("b", later)
    model.set_requires_grad("b", False)
    now(None, later)
    model.set_requires_grad("b")
    now("b", later)
    model.set_adapter("b", inference_mode=True)
    now(None, later)
    model.set_adapter("b")
    model.add_adapter("c", case.config())
    now("b", later)
    model.delete_adapter("c")
    now("b", later)
    model.to(torch.bfloat16), model.to(torch.float64)
    now("b", later)
    model.base_model.set_adapter(["a", "b"])
    assert learning(model) == expected_learning(model, "a", "b") | first
    model.set_adapter("b")
    model.delete_adapter("b")
    assert model.active_adapters == ["a"]
    now("a", first)
    model.delete_adapter("a")
    model.add_adapter("z", case.config())
    model.set_adapter("z")
    now("z", first)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
def test_what_learns_after_a_load(case, pretrained, trainable, low_cpu_mem_usage):
    """Into a bfloat16 base too, where PEFT makes new Parameters of the adapter."""
    base, folder, *_ = pretrained
    options = {"is_trainable": trainable, "low_cpu_mem_usage": low_cpu_mem_usage}
    for dtype in (torch.float64, torch.bfloat16):
        plain = copy.deepcopy(base).to(dtype)
        model = PeftModel.from_pretrained(plain, folder / "a", adapter_name="a", **options)
        first = expected_learning(model, "a", *case.learns(later=False)) if trainable else set()
        assert learning(model) == first
        model.load_adapter(folder / "b", "b", low_cpu_mem_usage=low_cpu_mem_usage)
        assert learning(model) == first
        model.set_adapter("b", inference_mode=not trainable)
        assert learning(model) == (expected_learning(model, "b", *case.learns(later=True)) if trainable else set())
        model.add_adapter("c", case.config())
        assert not any(key == "c" for _, key in learning(model))
        assert_tied(model, "abc")


def test_delete_an_inactive_the_active_and_the_last_task(case):
    model, batch = case.adapted(("a", "b", "c")), case.batch()
    with model.disable_adapter():
        base = output(model, batch)
    outputs = {task: of_task(model, task, batch) for task in "abc"}
    assert all(not torch.allclose(outputs[p], outputs[q]) for p, q in ("ab", "bc", "ac"))
    model.delete_adapter("b")
    mixed = output(model, batch, task_ids=torch.tensor([0, 2, -1]))  # ids are not used twice
    for i, expected in enumerate((outputs["a"], outputs["c"], base)):
        assert_close(mixed[i], expected[i])
    assert not any(name.endswith(".b") for name in model.state_dict())
    with pytest.raises(ValueError, match="b"):
        model.set_adapter("b")
    with pytest.warns(UserWarning, match="c was active"):
        model.delete_adapter("c")
    assert torch.equal(output(model, batch), outputs["a"])
    inner = model.get_base_model()
    model.delete_adapter("a")  # PEFT's own wrapper has no forward without an active adapter
    assert torch.equal(output(inner, batch), base)


def test_several_active_tasks_need_task_ids(case, pretrained):
    base, folder, batch, outputs, mixed = pretrained
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder / "a", adapter_name="a")
    model.load_adapter(folder / "b", "b")
    model.base_model.set_adapter(["a", "b"])
    with pytest.raises(ValueError, match=r"\['a', 'b'\] are active together; pass task ids"):
        output(model, batch)
    assert_close(output(model, batch, task_ids=MIXED), mixed)
    for i, task in enumerate("ab"):
        assert_close(mixed[i], outputs[task][i])


# --- files and state dicts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_save_and_load(case, pretrained, low_cpu_mem_usage, dtype):
    base, folder, batch, outputs, mixed = pretrained
    plain, low = copy.deepcopy(base).to(dtype), {"low_cpu_mem_usage": low_cpu_mem_usage}
    model = PeftModel.from_pretrained(plain, folder / "a", adapter_name="a", **low)
    result = model.load_adapter(folder / "b", "b", **low)
    assert not [name for name in result.missing_keys if name.endswith(".b")]
    assert not result.unexpected_keys
    assert not model.training
    assert_tied(model, "ab")
    assert {name for name, p in model.named_parameters() if p.is_meta} == set()
    if dtype is torch.float64:
        assert_close(output(model, batch, task_ids=MIXED), mixed)
        assert_close(of_task(model, "b", batch), outputs["b"])
        assert shared_fingerprint(model) == PeftConfig.from_pretrained(folder / "b").shared_fingerprint


def test_selected_adapters_subfolders_and_pickled_files(case, pretrained, tmp_path):
    base, folder, batch, outputs, mixed = pretrained
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder, subfolder="a", adapter_name="a")
    model.load_adapter(folder, "b", subfolder="b")
    assert_close(output(model, batch, task_ids=MIXED), mixed)
    model.save_pretrained(tmp_path, selected_adapters=["b"], safe_serialization=False)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"b"}
    assert (tmp_path / "b" / "adapter_model.bin").exists()
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "b")
    assert_close(output(again, batch), outputs["b"])
    again.save_pretrained(tmp_path / "default")
    assert (tmp_path / "default" / "adapter_model.safetensors").exists(), "the task called default lies at the root"
    with pytest.raises(ValueError, match=r"\['a', 'b'\] - got \['c'\]"):
        model.save_pretrained(tmp_path, selected_adapters=["c"])


def test_state_dicts(case, pretrained):
    base, folder, batch, outputs, _ = pretrained
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder / "a", adapter_name="a")
    model.load_adapter(folder / "b", "b")
    state = get_peft_model_state_dict(model, adapter_name="b")
    kinds = {"A", "B", "U", "V"} | ({"fusion"} if model.peft_config["b"].fusion else set())
    assert set(state) == {f"base_model.model.{path}.lilora_{kind}" for path in adapted_layers(model) for kind in kinds}
    injected = inject_adapter_in_model(case.config(), copy.deepcopy(base), "t")
    result = set_peft_model_state_dict(injected, state, "t")
    assert not result.unexpected_keys
    assert_close(output(injected, batch), outputs["b"])
    bare = get_peft_model_state_dict(injected, adapter_name="t")
    assert set(bare) == {name.removeprefix("base_model.model.") for name in state}
    whole = case.adapted(base=copy.deepcopy(base))
    whole.load_state_dict(model.state_dict())
    assert_tied(whole, "ab")
    assert_close(of_task(whole, "b", batch), outputs["b"])
    assert_close(of_task(whole, "a", batch), outputs["a"])


def test_modules_to_save(case, tmp_path):
    base, batch = case.base(), case.batch()
    model = case.adapted(base=copy.deepcopy(base), modules_to_save=[case.head])
    head = model.get_base_model().get_submodule(case.head)
    before = {task: head.modules_to_save[task].weight.clone() for task in "ab"}
    assert {name for name in learning(model) if isinstance(name, str)} == {
        f"base_model.model.{case.head}.modules_to_save.a.{name}"
        for name, _ in base.get_submodule(case.head).named_parameters()
    }
    train(model, batch)
    assert not torch.equal(head.modules_to_save["a"].weight, before["a"])
    assert torch.equal(head.modules_to_save["b"].weight, before["b"])
    assert torch.equal(head.original_module.weight, base.get_submodule(case.head).weight)
    outputs = {task: of_task(model, task, batch) for task in "ab"}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a", adapter_name="a", low_cpu_mem_usage=True)
    loaded.load_adapter(tmp_path / "b", "b")
    for task in "ab":
        assert_close(of_task(loaded, task, batch), outputs[task])
    mixed = output(loaded, batch, task_ids=MIXED)
    for i, task in enumerate(MIXED):
        wanted = output(loaded, batch, task_ids=[task] * len(MIXED))[i]
        assert_close(mixed[i], outputs[task][i] if task else wanted)
        assert_close(mixed[i], wanted)


def test_a_load_that_fails_leaves_the_model_alone(case, pretrained):
    base, folder, batch, outputs, _ = pretrained
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder / "a", adapter_name="a", is_trainable=True)
    model.add_adapter("b", case.config())
    model.set_adapter("b", inference_mode=True)
    foreign = get_peft_model_state_dict(case.adapted(("z",)), adapter_name="z")
    good = get_peft_model_state_dict(model, adapter_name="b")
    name = next(name for name in good if name.endswith("lilora_V"))
    bad = {
        "lilora_. differs from the model's, which its other tasks share; load tasks of one chain": foreign,
        "lilora_V of task 'b' is .*, but this model needs": good | {name: good[name][:, :-1]},
        "lilora_V is missing in the tensors of task 'b'": {k: v for k, v in good.items() if k != name},
        "elsewhere.lilora_V is unknown to the model": good | {"base_model.model.elsewhere.lilora_V": good[name]},
    }
    before = state_of(model)
    for words, state in bad.items():
        with pytest.raises(UserError, match=words):
            set_peft_model_state_dict(model, state, "b")
        with pytest.raises(UserError, match=words.partition(", which")[0]):
            hotswap(model, state, "b")
        assert_unchanged(model, dict(before))
    assert_close(of_task(model, "a", batch), outputs["a"])


# --- merging ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unmerge(case, pretrained, safe_merge):
    base, folder, batch, outputs, mixed = pretrained
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder / "a", adapter_name="a")
    model.load_adapter(folder / "b", "b")
    model.set_adapter("b")
    model.merge_adapter(safe_merge=safe_merge)
    assert_close(output(model, batch), outputs["b"])
    for kwargs in ({"task_ids": ["a"] * 3}, {"adapter_names": ["a"] * 3}):
        with pytest.raises(RuntimeError, match="task 'b' is merged into the base weight; unmerge"):
            output(model, batch, **kwargs)
    with pytest.raises(ValueError, match=r"Cannot delete adapter\(s\) \['b'\] while they are merged"):
        model.delete_adapter("b")
    with pytest.raises(UserError, match="task 'b' is merged into the weight of"):
        hotswap(model, folder / "a", "b")
    with pytest.raises(UserError, match="task 'b' is merged into the weight of"):
        model.load_adapter(folder / "a", "b")
    model.unmerge_adapter()
    assert_close(output(model, batch, task_ids=MIXED), mixed)
    model.merge_adapter(["a"], safe_merge=safe_merge)
    assert_close(output(model, batch), outputs["a"])
    with model.disable_adapter():
        assert_close(output(model, batch)[2], mixed[2])
    assert_close(output(model, batch), outputs["b"])
    model.merge_adapter()
    model.set_adapter("a")  # takes b out first
    assert_close(output(model, batch), outputs["a"])
    for names, words in ((["a", "b"], "cannot merge"), (["c"], "task 'c' is unknown")):
        before = state_of(model)
        with pytest.raises(ValueError, match=words):
            model.merge_adapter(names, safe_merge=safe_merge)
        assert_unchanged(model, before)
    model.base_model.disable_adapter_layers()
    merged = model.merge_and_unload(safe_merge=safe_merge)  # of the active task, disabled or not, as PEFT's LoRA does
    assert type(merged) is type(base)
    assert not adapted_layers(merged)
    assert_close(output(merged, batch), outputs["a"])


def test_safe_merge_refuses_nan_and_unload_gives_the_base_back(case, pretrained):
    base, folder, batch, *_ = pretrained
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder / "a", adapter_name="a")
    list(adapted_layers(model).values())[-1].lilora_V["a"].data[0, 0] = torch.nan
    before = [layer.base_layer.weight.clone() for layer in adapted_layers(model).values()]
    with pytest.raises(UserError, match="NaNs detected in the merged weights; the adapter a seems to be broken"):
        model.merge_adapter(safe_merge=True)
    for weight, layer in zip(before, adapted_layers(model).values(), strict=True):
        assert torch.equal(layer.base_layer.weight, weight)
        assert not layer.merged
    assert torch.equal(output(model.unload(), batch), output(base, batch))


# --- task ids -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_adapter_names_and_task_ids_agree(case, pretrained, training):
    base, folder, batch, outputs, mixed = pretrained
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder / "a", adapter_name="a")
    model.load_adapter(folder / "b", "b")
    with model.disable_adapter():
        plain = output(model, batch)
        assert torch.equal(output(model, batch, adapter_names=["a", "b", "__base__"]), plain)
    for i, expected in enumerate((outputs["a"], outputs["b"], plain)):
        assert_close(mixed[i], expected[i])
    model.train(training)
    tensor = torch.tensor([0, 1, -1])
    for kwargs in (
        {"adapter_names": ["a", "b", "__base__"]},
        {"task_ids": MIXED},
        {"task_ids": [0, 1, -1]},
        {"task_ids": tensor},
        {"task_ids": tensor.int()},
    ):
        assert_close(output(model, batch, **kwargs), mixed)
    assert_close(output(model.get_base_model(), batch, task_ids=tensor), mixed)
    for names, words in ((["a", "b"], r"task_ids has the shape \[2\]"), (["a", "b", "c"], "task 'c' is unknown")):
        if case.base is mlp and len(names) == 2:
            words = "first sees .* rows, but the route has 2 samples"  # only its layers can count the samples
        with pytest.raises(ValueError, match=words):
            output(model, batch, adapter_names=names)


def test_adapter_names_train(case):
    """PEFT's own methods forbid it; here a mixed batch gives each task the gradients of its samples."""
    model, batch = case.adapted(), case.batch()
    model.base_model.set_adapter(["a", "b"])

    def gradients(batch, names):
        y = model(**batch, adapter_names=names)
        (y if isinstance(y, torch.Tensor) else y.logits).tanh().sum().backward()

    for i, task in enumerate("ab"):
        gradients(sample(batch, i), [task])
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    gradients(batch, ["a", "b", "__base__"])
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(expected)
    for name, gradient in expected.items():
        assert_close(model.get_parameter(name).grad, gradient)
    for task in "ab":
        assert any(gradient.any() for name, gradient in expected.items() if name.endswith(f"U.{task}"))


# --- copies, dtypes and devices -----------------------------------------------------------------------------------------


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_and_loaded],
    ids=["copy", "pickle", "torch"],
)
def test_a_copy_lives_on_its_own(case, copied):
    model, batch = case.adapted(), case.batch()
    other = copied(model)  # before a forward: transformers' hooks that catch outputs cannot be pickled
    expected = output(model, batch, task_ids=MIXED)
    assert_tied(other, "ab")
    assert learning(other) == learning(model)
    randomise(model)
    other.add_adapter("c", case.config())
    other.set_adapter("c")
    assert torch.equal(output(other, batch, task_ids=MIXED), expected)
    with pytest.raises(ValueError, match="unknown"):
        output(model, batch, task_ids=["c"] * 3)


def test_dtypes_and_devices(case):
    model, batch = case.adapted(), case.batch()
    expected = output(model, batch, task_ids=MIXED)
    state = copy.deepcopy(model.state_dict())
    before = learning(model)
    for move in ("half", "bfloat16", "float", "double"):
        getattr(model, move)()
        assert len({p.dtype for p in model.parameters()}) == 1
        assert_tied(model, "ab")
        dtype = next(model.parameters()).dtype
        cast = {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.items()}
        assert output(model, cast, task_ids=MIXED).isfinite().all()
    model.to("meta")
    assert_tied(model, "ab")
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    assert_tied(model, "ab")
    assert learning(model) == before
    if not list(model.buffers()):  # tables of positions are in no file
        assert torch.equal(output(model, batch, task_ids=MIXED), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_autocast_adapter_dtype(case, dtype, autocast):
    wanted = torch.float32 if autocast else dtype
    model = get_peft_model(case.base().to(dtype), case.config(), adapter_name="a", autocast_adapter_dtype=autocast)
    before = learning(model)
    model.add_adapter("b", case.config(), autocast_adapter_dtype=autocast)
    assert {p.dtype for name, p in model.named_parameters() if "lilora_" in name} == {wanted}
    assert {p.dtype for name, p in model.named_parameters() if "lilora_" not in name} == {dtype}
    assert learning(model) == before
    assert_tied(model, "ab")


# --- reports ------------------------------------------------------------------------------------------------------------


def test_counts_and_status(case, capsys):
    model = case.adapted()
    layers = adapted_layers(model)
    config = model.peft_config["a"]
    rows = [(layer.in_features, layer.out_features) for layer in layers.values()]
    own = sum(n * config.sub_rank + config.sub_rank * config.r + config.fusion for _, n in rows)
    shared = {"A": sum(config.r * k for k, _ in rows), "B0": sum(config.r * n for _, n in rows)}
    base = sum(p.numel() for p in case.base().parameters())
    for task, later in (("a", False), ("b", True)):
        model.set_adapter(task)
        trainable = own + sum(shared[key] for key in case.learns(later=later))
        assert model.get_nb_trainable_parameters() == (trainable, base + 2 * own + sum(shared.values()))
        model.print_trainable_parameters()
        assert f"trainable params: {trainable:,} ||" in capsys.readouterr().out
        status = model.get_model_status()
        assert status.active_adapters == [task]
        assert status.available_adapters == ["a", "b"]
        assert status.requires_grad == {"a": task == "a", "b": task == "b"}
        assert status.trainable_params == trainable
        assert status.num_adapter_layers == len(layers)
        assert status.peft_types == {"a": "LILORA", "b": "LILORA"}
    assert {status.name for status in model.get_layer_status()} == {f"model.{path}" for path in layers}
    model.merge_adapter()
    with model.disable_adapter():
        assert model.get_model_status().enabled is False
    assert isinstance(model.active_peft_config, LiLoRAConfig)
