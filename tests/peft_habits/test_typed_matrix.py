"""What PEFT's own tests ask of every method and the untyped matrix does not, under each of PEFT's typed wrappers."""

import copy
import json
import warnings

import pytest
import torch
from peft import (
    PeftModel,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.save_and_load import get_base_model_state_dict, set_base_model_state_dict
from safetensors.torch import load_file, save_file
from support.habits import adapted_layers, assert_close, assert_tied, learning
from support.typed import HEADS, first, typed

import lilora

pytestmark = [
    pytest.mark.filterwarnings("ignore:Adapter name:UserWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
    pytest.mark.filterwarnings("ignore:. was active:UserWarning"),
]
GENERATE = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


@pytest.fixture(params=HEADS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def made():
    """made(kind): a model of that kind that no test changes."""
    models = {}
    return lambda kind: copy.deepcopy(models.setdefault(kind, typed(kind)))


@pytest.fixture
def model(kind, made):
    return made(kind)


@pytest.fixture
def x():
    return torch.randint(3, 50, (3, 5))


def plain(model):
    """Its base model before any adapter, with the same weights."""
    return copy.deepcopy(model).unload()


def config_of(model):
    config = copy.deepcopy(model.peft_config["a"])
    config.inference_mode, config.shared_fingerprint = False, None
    return config


def outputs(model, x):
    found = {}
    for task in "ab":
        model.set_adapter(task)
        found[task] = first(model, x)
    return found


# --- files --------------------------------------------------------------------------------------------------------------


def test_a_folder_holds_the_adapter_alone_and_says_what_it_is(model, kind, x, tmp_path):
    base, wanted = plain(model), outputs(model, x)
    model.save_pretrained(tmp_path)
    assert not {path.name for path in (tmp_path / "a").iterdir()} & {"model.safetensors", "config.json"}
    told = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (told["peft_type"], told["task_type"], told["inference_mode"]) == ("LILORA", kind, True)
    assert (tmp_path / "README.md").exists()
    with warnings.catch_warnings(record=True) as said:
        loaded = PeftModel.from_pretrained(
            copy.deepcopy(base), tmp_path / "a", adapter_name="a", device_map={"": "cpu"}
        )
        result = loaded.load_adapter(tmp_path / "b", "other")
        again = loaded.load_adapter(tmp_path / "b", "yet-another")  # the same folder once more, under another name
    assert not [one for one in said if "missing adapter keys" in str(one.message)]
    assert type(loaded) is type(model)
    assert result.missing_keys == again.missing_keys == []
    for task, same in (("a", "a"), ("other", "b"), ("yet-another", "b")):
        loaded.set_adapter(task)
        assert_close(first(loaded, x), wanted[same], 1e-6)  # PEFT narrows a head that it saves


def test_a_config_that_is_given_is_the_one(model, tmp_path):
    base, config = plain(model), config_of(model)
    model.save_pretrained(tmp_path, selected_adapters=["a"])
    loaded = PeftModel.from_pretrained(base, tmp_path / "a", adapter_name="a", config=config, is_trainable=False)
    assert loaded.peft_config["a"] is config
    assert config.inference_mode


def test_names_that_hold_each_other_are_told_apart(model, kind, tmp_path):
    wanted = set(get_peft_model_state_dict(model, adapter_name="a"))
    for name in ("a2", "other-a", "b-a-b", "lilora"[:2]):
        model.add_adapter(name, config_of(model))
    model.save_pretrained(tmp_path, selected_adapters=["a"])
    assert set(load_file(tmp_path / "a" / "adapter_model.safetensors")) == wanted
    assert {name.rpartition(".")[2] for name, _ in model.named_parameters() if "lilora_U" in name} == {
        "a", "b", "a2", "other-a", "b-a-b", "li"
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_added_and_loaded_tasks_keep_the_base_dtype_without_autocast(model, dtype, tmp_path):
    base, config = plain(model).to(dtype), config_of(model)
    own = get_peft_model(base, config, "a", autocast_adapter_dtype=False)
    own.add_adapter("added", copy.deepcopy(config), autocast_adapter_dtype=False)
    own.save_pretrained(tmp_path, selected_adapters=["a"])
    own.load_adapter(tmp_path / "a", "loaded", autocast_adapter_dtype=False)
    found = {p.dtype for name, p in own.named_parameters() if "lilora_" in name}
    assert found == {p.dtype for name, p in own.named_parameters() if name.endswith("base_layer.weight")} == {dtype}
    assert_tied(own, ["a", "added", "loaded"])


def test_the_base_models_state_dict_comes_out_and_goes_in(model):
    wanted = {name: tensor.clone() for name, tensor in plain(model).state_dict().items()}
    adapters = {name: p.clone() for name, p in model.named_parameters() if "lilora_" in name}
    found = get_base_model_state_dict(model)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    with torch.no_grad():
        for name, parameter in model.get_base_model().named_parameters():
            if "lilora_" not in name:
                parameter.add_(1)
    result = set_base_model_state_dict(model, wanted, strict=False)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in get_base_model_state_dict(model).items())
    assert all(torch.equal(model.get_parameter(name), p) for name, p in adapters.items())


# --- training -----------------------------------------------------------------------------------------------------------


def loss_of(model, x):
    more = {"decoder_input_ids": x} if hasattr(model.get_base_model(), "decoder") else {}
    return model(input_ids=x, **more)[0].square().sum()


def test_gradients_reach_what_trains_and_nothing_else(model, x):
    loss_of(model.train(), x).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert not parameter.requires_grad or "lilora_" in name or "modules_to_save" in name


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(model, x, reentrant):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # of the base model

    def gradients():
        model.zero_grad()
        loss_of(model.train(), x).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    wanted = gradients()
    model.prepare_model_for_gradient_checkpointing(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients()
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name])


@pytest.mark.parametrize("kind", ["CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"], indirect=True)
def test_one_layer_of_several_is_adapted(kind, x):
    config = typed(kind).config
    config.num_hidden_layers = 2
    base = HEADS[kind](config).double()
    config = lilora.LiLoRAConfig(
        r=4, sub_rank=2, target_modules=["up_proj"], layers_to_transform=[0], task_type=kind, dropout=0.0
    )
    model = get_peft_model(base, config)
    assert [path for path in adapted_layers(model) if ".0." not in f".{path}."] == []
    assert len(adapted_layers(model)) == 1
    loss_of(model, x).backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if p.requires_grad and "lilora_" in name)


def test_inputs_want_gradients_when_they_are_told_to(model, x):
    base, config = plain(model), config_of(model)
    assert not get_peft_model(copy.deepcopy(base), config, "a").get_input_embeddings()(x).requires_grad
    own = get_peft_model(prepare_model_for_kbit_training(base), copy.deepcopy(config), "a")
    own.enable_input_require_grads()
    assert own.get_input_embeddings()(x).requires_grad


def test_embeddings_of_the_inputs_in_place_of_ids(model, kind, x):
    names = ["a", "b", None]
    embedded = model.get_input_embeddings()(x)
    more = {"decoder_input_ids": x} if kind == "SEQ_2_SEQ_LM" else {}
    with torch.no_grad():
        got = model(inputs_embeds=embedded, task_ids=names, **more)[0]
    assert_close(got, first(model, x, task_ids=names))


def test_tasks_injected_without_memory_have_none(model):
    base = plain(model)
    inject_adapter_in_model(config_of(model), base, "a", low_cpu_mem_usage=True)
    assert {p.device.type for name, p in base.named_parameters() if "lilora_" in name} == {"meta"}
    assert {p.device.type for name, p in base.named_parameters() if "lilora_" not in name} == {"cpu"}


# --- merging ------------------------------------------------------------------------------------------------------------


def test_merged_and_unloaded_it_is_a_model_of_its_own_kind(model, kind, x, tmp_path):
    base, wanted = plain(model), outputs(model, x)
    model.set_adapter("a")
    for task in "ab":
        merged = copy.deepcopy(model).merge_and_unload(adapter_names=[task], safe_merge=True)
        assert type(merged) is HEADS[kind]
        assert not hasattr(merged, "peft_config")
        assert merged.state_dict().keys() == base.state_dict().keys()
        if task == "a" or kind not in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"):  # whose head is that of the active task
            assert_close(first_of(merged, x), wanted[task], 1e-9)
    save_file({name: t.contiguous().clone() for name, t in merged.state_dict().items()}, tmp_path / "state")
    merged.save_pretrained(tmp_path)
    loaded = HEADS[kind].from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert_close(first_of(loaded, x), first_of(merged, x), 1e-6)


def first_of(model, x):
    more = {"decoder_input_ids": x} if hasattr(model, "decoder") else {}
    with torch.no_grad():
        return model(input_ids=x, **more)[0]


def test_merging_twice_is_merging_once(model, x):
    model.merge_adapter()
    once = first(model, x)
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        model.merge_adapter()
    assert torch.equal(first(model, x), once)


def test_half_precision_merges(model):
    assert {p.dtype for p in model.half().merge_and_unload().parameters()} == {torch.float16}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_merged(model, value):
    next(p for name, p in model.named_parameters() if name.endswith("lilora_A.a")).data[0] = value
    before = get_base_model_state_dict(model)
    before = {name: tensor.clone() for name, tensor in before.items()}
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_and_unload(safe_merge=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in get_base_model_state_dict(model).items())


@pytest.mark.parametrize("kind", ["CAUSAL_LM", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM"], indirect=True)
def test_converted_to_a_lora_it_computes_the_same(model, x):
    base, wanted = plain(model), first(model, x)
    config, state = convert_to_lora(model, rank=4, adapter_name="a")
    lora = get_peft_model(base, config, autocast_adapter_dtype=False).eval()
    assert not set_peft_model_state_dict(lora, state).unexpected_keys
    torch.testing.assert_close(first(lora, x), wanted, rtol=0, atol=1e-5)


# --- deleting, disabling, unloading -------------------------------------------------------------------------------------


def test_a_deleted_task_is_nowhere_and_the_last_may_go_too(model, x):
    def traces(task):
        own = [name for name in model.state_dict() if f".{task}." in f".{name}."]
        copies = [m for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper) and task in m._adapters]
        return own + copies + [name for name in model.peft_config if name == task]

    base, wanted = first_of(plain(model), x), outputs(model, x)
    model.set_adapter("b")
    assert traces("b")
    model.delete_adapter("b")
    assert traces("b") == []
    assert model.active_adapters == ["a"]
    assert_close(first(model, x), wanted["a"])
    with pytest.raises(ValueError, match="Adapter b does not exist"):
        model.delete_adapter("b")
    inner = model.get_base_model()
    model.delete_adapter("a")
    assert (traces("a"), model.active_adapters) == ([], [])
    assert_close(first_of(inner, x), base)


def test_disabled_it_is_the_base_model_and_then_itself_again(model, kind, x):
    def run(model):
        if kind not in GENERATE:
            return first(model, x) if isinstance(model, PeftModel) else first_of(model, x)
        options = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
        return model.generate(input_ids=x, **options).scores[0]

    base, before = run(plain(model)), run(model)
    assert not torch.allclose(base, before)
    with model.disable_adapter():
        assert_close(run(model), base)
    assert torch.equal(run(model), before)
    unloaded = model.unload()
    assert not adapted_layers(unloaded)
    assert not [m for m in unloaded.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    assert_close(run(unloaded), base)


def test_a_second_task_with_biases_is_refused_and_leaves_nothing_half_made(model):
    config = config_of(model)
    config.bias = "all"
    own = get_peft_model(plain(model), config, "a")
    before = learning(own)
    other = copy.deepcopy(config)
    with pytest.raises(ValueError):
        own.add_adapter("b", other)
    assert "b" not in own.peft_config
    assert list(next(iter(adapted_layers(own).values())).tasks) == ["a"]
    assert learning(own) == before


# --- generation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", GENERATE, indirect=True)
def test_mixed_generation_is_that_of_each_task(model, x, beams):
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
    options |= {"attention_mask": torch.ones_like(x)}
    wanted = []
    for i, task in enumerate("ab"):
        model.set_adapter(task)
        wanted.append(model.generate(input_ids=x, **options)[i])
    with model.disable_adapter():
        wanted.append(model.generate(input_ids=x, **options)[2])
    for argument, names in (("task_ids", ["a", "b", None]), ("adapter_names", ["a", "b", "__base__"])):
        got = model.generate(input_ids=x, **options, **{argument: names})
        for row, alone in zip(got, wanted, strict=True):
            length = min(len(row), len(alone))  # padded to the longest of its batch
            assert torch.equal(row[:length], alone[:length])


@pytest.mark.parametrize("kind", GENERATE, indirect=True)
def test_generate_takes_ids_by_position_and_half_precision(model, kind, x):
    options = {"max_new_tokens": 3, "do_sample": False}
    wanted = model.generate(input_ids=x, **options)
    if kind == "CAUSAL_LM":
        assert torch.equal(model.generate(x, **options), wanted)
    model.bfloat16()
    assert model.generate(input_ids=x, task_ids=["a", "b", None], **options).shape[0] == 3
