"""Tasks that leave a bank: as plain LoRAs, as merged models, as PEFT adapters, each against the model that the bank restores."""

import copy
import json
import re

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPModel, LlavaForConditionalGeneration

import lilora as package
from lilora import LiLoRAConfig
from lilora.bank.bank import Bank
from lilora.bank.export import PlainLoRA, write_lora
from lilora.bank.index import BaseModelId
from lilora.continual.base_model import load_bank
from lilora.continual.clip import ContrastiveCLIP
from lilora.continual.publish import export_tasks, merge_task
from lilora.errors import UserError
from lilora.families import target_modules
from lilora.methods import METHODS, Stage, make_method

R, SUB_RANK, ALPHA, IMAGE = 4, 2, 10.0, 39
PATTERN = target_modules("llava", projector=True)
CLIP = target_modules("clip")
TRAIN = {"dtype": "auto", "seed": 0}
LORA = {"target_modules": PATTERN, "r": R, "lora_alpha": ALPHA, "lora_dropout": 0.1}
LILORA = {"target_modules": PATTERN, "r": R, "sub_rank": SUB_RANK, "alpha": ALPHA}
POOL = {"target_modules": PATTERN, "r": R}
SETTINGS = {
    "lilora": LILORA,
    "lilora-drifting": {**LILORA, "train_a": "always", "train_b0": "always"},
    "lilora-plain": {**LILORA, "fusion": False},
    **dict.fromkeys(("lora", "dirlora", "ewc", "lwf"), LORA),
    **{name: {**POOL, "alpha": ALPHA} for name in ("olora", "sdlora", "loda", "adalora", "sora")},
    "cia": LORA,
    "dac": {"target_modules": PATTERN, "r": R, "active": 3, "merged": 2, "critical": 2, "alpha": ALPHA},
    "moelora": {"target_modules": PATTERN, "r": R, "experts": 2},
    "pclr": {"target_modules": PATTERN, "r": R, "cap": 16},
    **dict.fromkeys(("proglora", "eproj", "xgblora"), POOL),
}
NO_LORA = {
    "dac": "lilora bank merge",
    "xgblora": "lilora bank merge",
    "moelora": "for every token",
    "pclr": "ranks of its own from a pool",
    "proglora": "by its prompt and image",
    "eproj": "by its prompt and image",
}
PLAIN = [name for name in SETTINGS if name not in NO_LORA]


@pytest.fixture(scope="module")
def base(llava_folder):
    return LlavaForConditionalGeneration.from_pretrained(llava_folder).eval().requires_grad_(False)


@torch.no_grad()
def randomise(method):
    for name, parameter in method.model.named_parameters():
        if "lora_" in name:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)


@torch.no_grad()
def made(folder, which, base, id, settings=None, tasks=("read", "count"), kind="instruction", dtype=torch.float32):
    """A bank of tasks with random factors, as a run would write it."""
    name, settings = which.partition("-")[0], settings or SETTINGS[which]
    config = {"method": name, "settings": settings, "train": TRAIN, "kind": kind, "model": str(id)}
    bank = Bank.create(folder, config=config, base_model=BaseModelId.of(base, str(id)))
    method = make_method(name, copy.deepcopy(base), settings)
    for i, task in enumerate(tasks):
        method.add(task)
        kept = [t.clone() for t in method.tensors(task)[1].values()] if which in ("lilora", "lilora-plain") else []
        randomise(method)
        if i and kept:  # the shared factors are frozen after the first task
            for tensor, value in zip(method.tensors(task)[1].values(), kept, strict=True):
                tensor.copy_(value)
        if name == "dac":
            for layer in method.layers.values():
                layer.choose.counts.copy_(torch.randperm(R))
                layer.choose.weights.uniform_(0.5, 2)
                layer.choose.samples.fill_(1)
            method.end(Stage("learn", task), None)
        tensors = ({name: t.to(dtype) for name, t in part.items()} for part in method.tensors(task))
        bank.add_task(task, *tensors, replaces=method.one_state)
    return bank


def restored(bank, base, task):
    method = make_method(bank.config["method"], copy.deepcopy(base), bank.config["settings"])
    method.restore(bank.load_tasks())
    if not method.mixed_batches or method.needs_task:
        method.activate(task, train=False)
    return method.model.eval()


def batch():
    ids = torch.randint(3, IMAGE, (2, 9))
    ids[:, 1:5] = IMAGE
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(2, 3, 8, 8)}


@torch.no_grad()
def agree(got, wanted, plain, inputs):
    """Equal logits, and others than without the task."""
    got, wanted, plain = (model(**inputs).logits for model in (got, wanted, plain))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert (wanted - plain).abs().max() > 0.05


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def exact_b(bank, task, path):
    """(B of a linear in fp64, the shared tensors)."""
    own, shared = bank.load_task(task)
    f = torch.sigmoid(own[f"{path}.fusion"].double())
    return f * shared[f"{path}.B0"].double() + (1 - f) * own[f"{path}.U"].double() @ own[f"{path}.V"].double(), shared


# --- plain LoRA -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", PLAIN)
def test_peft_loads_an_exported_task_with_the_logits_of_the_bank(which, base, llava_folder, tmp_path):
    bank, inputs = made(tmp_path / "bank", which, base, llava_folder), batch()
    folders = export_tasks(bank, None, tmp_path / "out")
    needs_task = METHODS[bank.config["method"]].needs_task
    assert list(folders) == (["read", "count"] if needs_task else ["count"])
    for task, folder in folders.items():
        exported = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
        agree(exported, restored(bank, base, task), base, inputs)


def test_the_folder_is_what_vllm_reads(base, llava_folder, tmp_path):
    """It takes r, lora_alpha and a list of target modules, no rsLoRA, DoRA, bias or modules_to_save; of a tensor's name
    `base_model.model.<path>.lora_A.weight` it takes the path, and its last part must be that of a linear it adapts."""
    bank = made(tmp_path / "bank", "lilora", base, llava_folder)
    folder = export_tasks(bank, "read", tmp_path / "out")["read"]
    assert folder == str(tmp_path / "out")
    assert sorted(files(tmp_path / "out")) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["bias"]) == ("LORA", R, 10, "none")
    assert not any(
        config.get(key) for key in ("use_rslora", "use_dora", "modules_to_save", "rank_pattern", "alpha_pattern")
    )
    modules = config["target_modules"]
    assert modules == sorted(modules)
    assert len(modules) == 2 * 3 + 2
    assert {name.split(".")[-1] for name in modules} == {"gate_proj", "up_proj", "down_proj", "linear_1", "linear_2"}
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    assert tensors.keys() == {f"base_model.model.{path}.lora_{x}.weight" for path in modules for x in "AB"}
    for path in modules:
        linear = base.get_submodule(path)
        a, b = (tensors[f"base_model.model.{path}.lora_{x}.weight"] for x in "AB")
        assert (a.shape, b.shape) == ((R, linear.in_features), (linear.out_features, R))


def test_linears_beside_shared_experts_are_named_by_their_weights(tmp_path):
    """PEFT would take them for routed experts, by the ends of their names, and lose what was trained."""
    beside = ["layers.0.mlp.up_proj", "layers.1.mlp.shared_experts.down_proj"]
    names = [*beside, "layers.0.self_attn.q_proj"]
    lora = PlainLoRA({name: (torch.zeros(2, 3), torch.zeros(5, 2)) for name in names}, 2.0, 0.1)
    write_lora(tmp_path, lora, None)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["layers.0.self_attn.q_proj"]
    assert config["target_parameters"] == [f"{name}.weight" for name in beside]
    assert config["lora_dropout"] == 0.0
    del lora.factors[beside[1]]
    write_lora(tmp_path, lora, None)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["target_modules"], config["target_parameters"]) == ([*lora.factors], None)
    assert config["lora_dropout"] == 0.1


def test_factors_keep_their_dtype_and_b_is_rounded_once(base, llava_folder, tmp_path):
    bank = made(tmp_path / "bank", "lilora", base, llava_folder, dtype=torch.bfloat16)
    export_tasks(bank, "count", tmp_path / "out")
    tensors, path = load_file(tmp_path / "out/adapter_model.safetensors"), "model.language_model.layers.1.mlp.down_proj"
    b, shared = exact_b(bank, "count", path)
    stored = tensors[f"base_model.model.{path}.lora_B.weight"]
    assert stored.dtype == torch.bfloat16
    assert ((stored.double() - b).abs() <= b.abs() * 2**-8 + 1e-6).all()  # half a unit in the last place
    assert torch.equal(tensors[f"base_model.model.{path}.lora_A.weight"], shared[f"{path}.A"])


@pytest.mark.parametrize("wrapped", [True, False], ids=["peft", "by hand"])
def test_a_model_in_memory_is_exported_like_its_bank(wrapped, base, llava_folder, tmp_path):
    bank, inputs = made(tmp_path / "bank", "lilora", base, llava_folder), batch()
    model = restored(bank, base, "read")
    package.export_lora(model if wrapped else model.base_model.model, "count", tmp_path / "memory")
    export_tasks(bank, "count", tmp_path / "bank-out")
    memory, disk = files(tmp_path / "memory"), files(tmp_path / "bank-out")
    assert memory["adapter_model.safetensors"] == disk["adapter_model.safetensors"]
    configs = [json.loads(found["adapter_config.json"]) for found in (memory, disk)]
    assert configs[0] == configs[1]
    exported = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "memory").eval()
    agree(exported, restored(bank, base, "count"), base, inputs)


def compiled_in_part(model):
    for layer in model.get_submodule("base_model.model.model.language_model.layers"):
        layer.mlp = torch.compile(layer.mlp, backend="eager")
    return model


def compiled_whole(model):
    return torch.compile(model, backend="eager")


def parallel(model):
    made = torch.nn.parallel.DistributedDataParallel.__new__(torch.nn.parallel.DistributedDataParallel)
    torch.nn.Module.__init__(made)  # without a process group: only its name of the model counts here
    made.module = model
    return made


@pytest.mark.parametrize("wrap", [compiled_in_part, compiled_whole, parallel])
def test_saved_names_hold_no_wrapper(wrap, base, llava_folder, tmp_path):
    bank = made(tmp_path / "bank", "lilora", base, llava_folder)
    model = restored(bank, base, "read")
    package.export_lora(model, "count", tmp_path / "plain")
    wrapped = wrap(model)
    package.export_lora(wrapped, "count", tmp_path / "wrapped")
    assert files(tmp_path / "wrapped") == files(tmp_path / "plain")
    source = {name: t.clone() for name, t in get_peft_model_state_dict(model, adapter_name="count").items()}
    package.hotswap(wrapped, source, "count")


@pytest.mark.parametrize("which", ["lora", "dirlora"])
def test_a_method_names_its_tensors_without_wrappers(which, base, llava_folder, tmp_path):
    bank = made(tmp_path / "bank", which, base, llava_folder)
    method = make_method(which, copy.deepcopy(base), bank.config["settings"])
    method.restore(bank.load_tasks())
    names = method.tensors("count")[1].keys()
    compiled_in_part(method.model)
    assert method.tensors("count")[1].keys() == names


@pytest.mark.parametrize("which", ["lilora", "lora", "olora"])
def test_tensors_that_the_settings_do_not_make_are_not_restored(which, base, llava_folder, tmp_path):
    bank = made(tmp_path / "bank", which, base, llava_folder)
    tasks = bank.load_tasks()
    rank = {"A": lambda t: t[:1], "B0": lambda t: t[:, :1], "V": lambda t: t[:, :1]}

    def of_rank_one(tensors):  # which would fill all ranks of the model with the first
        return {name: rank.get(name.rpartition(".")[2], lambda t: t)(tensor) for name, tensor in tensors.items()}

    def elsewhere(tensors):
        return {f"model.{name}" if not name.startswith("state.") else name: t for name, t in tensors.items()}

    for change in [elsewhere, *([of_rank_one] if which in ("lilora", "lora") else [])]:
        method = make_method(which, copy.deepcopy(base), bank.config["settings"])
        with pytest.raises(UserError, match="in the model; give"):
            method.restore({task: tuple(map(change, parts)) for task, parts in tasks.items()})


@pytest.mark.parametrize("which", ["lilora", "lora"])
def test_a_rank_that_is_not_that_of_the_tensors_is_not_exported(which, base, llava_folder, tmp_path):
    bank = made(tmp_path / "bank", which, base, llava_folder)
    config = {**bank.config, "settings": bank.config["settings"] | {"r": R + 1}}
    other = Bank.create(tmp_path / "other", config=config, base_model=bank.base_model)
    for task, tensors in bank.load_tasks().items():
        other.add_task(task, *tensors)
    with pytest.raises(UserError, match=f"has {R} ranks and the settings say {R + 1}"):
        export_tasks(other, "count" if which == "lilora" else None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("why", ["no layers", "unknown task", "bias", "modules_to_save", "folder in use"])
def test_a_model_that_is_no_plain_lora_is_refused(why, base, tmp_path):
    more = {"bias": {"bias": "lilora_only"}, "modules_to_save": {"modules_to_save": ["lm_head"]}}.get(why, {})
    model = base if why == "no layers" else get_peft_model(copy.deepcopy(base), LiLoRAConfig(**LILORA, **more), "read")
    out = tmp_path / "out"
    if why == "folder in use":
        out.mkdir()
        (out / "mine").write_text("")
    said = {
        "no layers": "without LiLoRA layers",
        "unknown task": "'count' is unknown; the model has read",
        "folder in use": "already exists",
    }
    with pytest.raises(UserError, match=said.get(why, "biases or modules_to_save")):
        package.export_lora(model, "count" if why == "unknown task" else "read", out)
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if why == "folder in use" else [])


@pytest.mark.parametrize("which", NO_LORA)
def test_methods_whose_tasks_are_no_lora_say_why(which, base, llava_folder, tmp_path):
    config = {"method": which, "settings": SETTINGS[which], "train": TRAIN}
    bank = Bank.create(tmp_path / "bank", config=config, base_model=BaseModelId.of(base, "tiny"))
    bank.add_task("read", {}, {"layer.experts.A": torch.randn(R, 3), "layer.experts.B0": torch.randn(3, R)})
    with pytest.raises(UserError, match=rf"a task of {which} is no plain LoRA: .*{NO_LORA[which]}"):
        export_tasks(bank, None, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bank"]


# --- merged ---------------------------------------------------------------------------------------------------------------


def one_of(bank):
    """A task to ask for; none where one state serves all."""
    return "read" if METHODS[bank.config["method"]].needs_task else None


@pytest.mark.parametrize("which", ["olora", "dac"])
def test_one_state_for_all_tasks_is_asked_for_without_a_task(which, base, llava_folder, tmp_path):
    bank = made(tmp_path / "bank", which, base, llava_folder)
    for leave in (merge_task, export_tasks):
        with pytest.raises(UserError, match="one state serves all tasks, the newest; leave --task out"):
            leave(bank, "read", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("which", ["lilora", "lilora-drifting", "dirlora", "olora", "dac"])
def test_a_merged_model_has_the_logits_of_the_bank(which, base, llava_folder, tmp_path):
    bank, inputs = made(tmp_path / "bank", which, base, llava_folder), batch()
    merge_task(bank, one_of(bank), tmp_path / "out")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    assert type(merged) is LlavaForConditionalGeneration
    assert {name: p.dtype for name, p in merged.named_parameters()} == {n: p.dtype for n, p in base.named_parameters()}
    own = AutoProcessor.from_pretrained(tmp_path / "out").tokenizer
    assert own("what").input_ids
    assert (base.generation_config.eos_token_id, merged.generation_config.eos_token_id) == (None, own.eos_token_id)
    agree(merged, restored(bank, base, "read"), base, inputs)


def test_merging_rounds_a_weight_once(llava_folder, tmp_path):
    base = LlavaForConditionalGeneration.from_pretrained(llava_folder, dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    AutoProcessor.from_pretrained(llava_folder).save_pretrained(tmp_path / "base")
    bank = made(tmp_path / "bank", "lilora", base, tmp_path / "base")
    merge_task(bank, "count", tmp_path / "out")
    path = "model.language_model.layers.0.mlp.up_proj"
    merged = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").get_submodule(path).weight
    b, shared = exact_b(bank, "count", path)
    exact = base.get_submodule(path).weight.double() + ALPHA / R * b @ shared[f"{path}.A"].double()
    assert merged.dtype == torch.bfloat16
    assert ((merged.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-5).all()  # half a unit in the last place


@pytest.mark.parametrize("which", ["lilora", "dac"])
def test_clip_is_merged_into_a_plain_clip(which, clip_folder, tmp_path):
    base = ContrastiveCLIP.from_pretrained(clip_folder).eval()
    settings = SETTINGS[which] | {"target_modules": CLIP}
    bank = made(tmp_path / "bank", which, base, clip_folder, settings, kind="classification")
    merge_task(bank, one_of(bank), tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == ["CLIPModel"]
    inputs = {"input_ids": torch.randint(3, 40, (4, 8)), "pixel_values": torch.randn(3, 3, 8, 8)}
    merged, wanted = CLIPModel.from_pretrained(tmp_path / "out").eval(), restored(bank, base, "read")
    with torch.no_grad():
        got, want, plain = (model(**inputs).logits_per_image for model in (merged, wanted, base))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
    assert (want - plain).abs().max() > 0.1


def test_merging_refuses_another_base_and_leaves_nothing(base, llava_folder, tmp_path):
    bank = made(tmp_path / "bank", "lilora", base, llava_folder)
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    AutoProcessor.from_pretrained(llava_folder).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="has other weights or another dtype"):
        merge_task(bank, "read", tmp_path / "out", str(tmp_path / "other"))
    assert {path.name for path in tmp_path.iterdir()} == {"bank", "other"}


# --- PEFT's folders of LiLoRA adapters --------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["lilora", "lilora-plain"])
def test_a_bank_survives_peft_folders_bit_for_bit(which, lilora, base, llava_folder, tmp_path):
    bank, inputs = made(tmp_path / "bank", which, base, llava_folder, tasks=("read", "count", "name")), batch()
    code, printed, error = lilora(
        "bank", "export", bank.path, "--out", tmp_path / "out", "--format", "lilora", "--json"
    )
    assert code == 0, error
    folders = json.loads(printed)["folders"]
    command = ("bank", "import", "peft", *folders.values(), "--model", llava_folder, "--out", tmp_path / "again")
    code, _, error = lilora(*command, "--json")
    assert code == 0, error
    again = Bank.open(tmp_path / "again")
    assert again.tasks == bank.tasks
    assert [again.task_fingerprint(t) for t in again.tasks] == [bank.task_fingerprint(t) for t in bank.tasks]
    assert [again.shared_fingerprint(t) for t in again.tasks] == [bank.shared_fingerprint(t) for t in bank.tasks]
    assert LiLoRAConfig(**again.config["settings"]) == LiLoRAConfig(**bank.config["settings"])

    model = PeftModel.from_pretrained(copy.deepcopy(base), folders["read"], adapter_name="read")
    model.load_adapter(folders["count"], "count")  # refuses other shared factors by their fingerprint
    agree(model.eval(), restored(bank, base, "read"), base, inputs)


def test_what_peft_saves_becomes_a_bank_and_the_same_files_again(lilora, base, llava_folder, tmp_path):
    model = get_peft_model(copy.deepcopy(base), LiLoRAConfig(**LILORA), "read")
    model.add_adapter("count", LiLoRAConfig(**LILORA))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lilora_" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "saved")
    folders = [tmp_path / "saved" / task for task in ("read", "count")]
    command = (
        "bank",
        "import",
        "peft",
        *folders,
        "--model",
        llava_folder,
        "--tasks",
        "one,two",
        "--out",
        tmp_path / "bank",
    )
    code, _, error = lilora(*command)
    assert code == 0, error
    bank = Bank.open(tmp_path / "bank")
    assert bank.tasks == ["one", "two"]
    model.set_adapter("count")
    agree(restored(bank, base, "two"), model.eval(), base, batch())
    export_tasks(bank, None, tmp_path / "out", "lilora")
    for folder, task in zip(folders, bank.tasks, strict=True):
        ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "out" / task, folder))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        told = [json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path / "out" / task, folder)]
        assert told[0]["shared_fingerprint"] == told[1]["shared_fingerprint"]
        assert told[0]["first_of_chain"] is told[1]["first_of_chain"] is (task == "one")


BAD = {
    "another method": ("adapter_config.json", lambda c: {**c, "peft_type": "LORA"}, "PEFT type 'LORA'"),
    "a bad setting": ("adapter_config.json", lambda c: {**c, "r": 0}, "r is 0"),
    "bias": ("adapter_config.json", lambda c: {**c, "bias": "all"}, "trained biases"),
    "another rank": ("adapter_config.json", lambda c: {**c, "r": 5}, "differ in their settings"),
    "other targets": ("adapter_config.json", lambda c: {**c, "exclude_modules": ["up_proj"]}, "differ in their settings"),
    "no tensor": ("adapter_model.safetensors", None, r"has no tensor for .*\.U"),
    "unknown tensor": ("adapter_model.safetensors", "extra", "holds the tensor extra"),
    "other shared factors": ("adapter_model.safetensors", "shared", "have other shared factors"),
    "truncated": ("adapter_model.safetensors", "truncated", "missing, truncated or no safetensors"),
    "no config": ("adapter_config.json", "missing", "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("file, change, said", BAD.values(), ids=BAD)
def test_a_peft_folder_that_does_not_fit_is_refused(file, change, said, lilora, base, llava_folder, tmp_path):
    bank = made(tmp_path / "bank", "lilora", base, llava_folder)
    folders = export_tasks(bank, None, tmp_path / "out", "lilora")
    path = tmp_path / "out" / "count" / file
    if file.endswith(".json") and change != "missing":
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    elif change == "missing":
        path.unlink()
    elif change == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        tensors = load_file(path)
        if change is None:
            tensors.pop(next(name for name in tensors if name.endswith("_U")))
        elif change == "extra":
            tensors["extra"] = torch.ones(2)
        else:
            tensors[next(name for name in tensors if name.endswith("_A"))] += 1
        save_file(tensors, path)
    command = ("bank", "import", "peft", *folders.values(), "--model", llava_folder, "--out", tmp_path / "again")
    code, printed, error = lilora(*command)
    (sentence,) = [line for line in error.splitlines() if line.startswith("lilora: ")]
    assert (code, printed) == (2, "")
    assert str(tmp_path / "out" / "count") in sentence
    assert re.search(said, sentence)
    assert not (tmp_path / "again").exists()


# --- cards, the hub, and the command --------------------------------------------------------------------------------------


def scored(bank):
    tasks = bank.tasks
    cells = [[70.0], [65.5, 80.0]]
    empty = [[None], [None, None]]
    matrix = {"tasks": tasks, "unseen": False, "scores": cells, "format_shares": empty, "carried_from": empty}
    bank.set_scores({"matrix": matrix, "functions": {"read": {}, "count": {}}, "seconds": {"read": 1.0, "count": 2.0}})


def test_every_folder_carries_a_card(lilora, base, llava_folder, tmp_path):
    bank = made(tmp_path / "run" / "bank", "lilora", base, "owner/tiny-llava")
    scored(bank)
    export_tasks(bank, "read", tmp_path / "lora")
    merge_task(bank, "read", tmp_path / "merged", str(llava_folder))
    code, _, error = lilora("bank", "rm", bank.path, "--task", "count")
    assert code == 0, error
    kinds = {
        "lora": ("peft", "adapter"),
        "merged": ("transformers", "finetune"),
        "run/bank": ("lilora-kernels", "adapter"),
    }
    for folder, (library, relation) in kinds.items():
        card = ModelCard.load(tmp_path / folder / "README.md")
        data = card.data.to_dict()
        assert (data["library_name"], data["base_model_relation"]) == (library, relation)
        assert data["base_model"] == "owner/tiny-llava"
        assert data["pipeline_tag"] == "image-text-to-text"
        assert {"continual-learning", "lilora"} <= set(data["tags"])
        assert "language" not in data
        shown = ["| read |", '"r": 4', "## Use", "70.0", *(["65.5"] if folder != "run/bank" else [])]
        assert [text for text in shown if text not in card.text] == []
    assert "count" not in (bank.path / "README.md").read_text().split("## Settings")[0]


def test_a_base_model_that_is_a_folder_is_in_no_metadata(base, llava_folder, tmp_path):
    bank = made(tmp_path / "bank", "lilora", base, llava_folder)
    export_tasks(bank, "read", tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "base_model" not in card.data.to_dict()
    assert f'from_pretrained("{llava_folder}")' in card.text


def test_a_bank_can_be_a_repository_of_the_hub(lilora, base, llava_folder, tmp_path, monkeypatch):
    bank = made(tmp_path / "snapshot", "lilora", base, llava_folder)
    asked = []

    def download(name, allow_patterns):
        asked.append((name, *allow_patterns))
        return str(bank.path)

    monkeypatch.setattr("lilora.bank.hub.snapshot_download", download)
    code, printed, error = lilora("bank", "ls", "owner/my-bank", "--json")
    assert code == 0, error
    assert [task["name"] for task in json.loads(printed)["tasks"]] == ["read", "count"]
    opened, method, _ = load_bank("owner/my-bank", device="cpu")
    assert (opened.tasks, method.tasks) == (bank.tasks, bank.tasks)
    # The index first: what is no bank is not downloaded.
    both = [("owner/my-bank", "bank.json", "bank/bank.json"), ("owner/my-bank", "*.safetensors")]
    assert asked == both * 2
    lilora("bank", "ls", "owner/my--bank")
    assert asked == both * 2

    def offline(name, **_):
        raise FileNotFoundError("no way\nto the hub")

    monkeypatch.setattr("lilora.bank.hub.snapshot_download", offline)
    code, _, error = lilora("bank", "ls", "owner/my-bank")
    assert (code, "owner/my-bank is no folder here" in error, "no way to the hub" in error) == (2, True, True)
    code, _, error = lilora("bank", "ls", tmp_path / "nowhere")
    assert (code, "is not a bank" in error) == (2, True)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("export", "--task", "nothing"), "task 'nothing' is unknown"),
        (("merge", "--task", "nothing"), "task 'nothing' is unknown"),
        (("merge",), "--task is missing; "),
        (("export", "--format", "onnx"), "--format onnx is unknown; choose one of lora, lilora"),
        (("rm", "--task", "nothing"), "no task 'nothing'"),
        (("export", "--task", "read"), "already exists; give a new or empty folder"),
        (("merge", "--task", "read"), "already exists; give a new or empty folder"),
    ],
)
def test_the_command_refuses_in_one_sentence_and_writes_nothing(lilora, base, llava_folder, tmp_path, arguments, said):
    bank = made(tmp_path / "bank", "lilora", base, llava_folder)
    out = tmp_path / "out"
    if "already" in said:
        out.mkdir()
        (out / "mine").write_text("")
    before = files(tmp_path)
    command, *more = arguments
    code, printed, error = lilora("bank", command, bank.path, *more, *([] if command == "rm" else ["--out", out]))
    (sentence,) = [line for line in error.splitlines() if line.startswith("lilora: ")]
    assert (code, printed) == (2, "")
    assert said in sentence
    assert files(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == ({"bank", "out"} if "already" in said else {"bank"})


def test_a_damaged_bank_leaves_no_export(lilora, base, llava_folder, tmp_path):
    bank = made(tmp_path / "bank", "lilora", base, llava_folder)
    file = bank.path / "tasks" / "count.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    code, _, error = lilora("bank", "export", bank.path, "--out", tmp_path / "out")  # the other task would do
    assert (code, "tasks/count.safetensors" in error) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["bank"]


def test_a_removed_task_takes_its_scores_along(lilora, base, llava_folder, tmp_path):
    bank = made(tmp_path / "bank", "lilora", base, llava_folder)
    scored(bank)
    inputs, wanted = batch(), restored(bank, base, "count")
    code, printed, error = lilora("bank", "rm", bank.path, "--task", "read", "--json")
    assert code == 0, error
    shown = json.loads(printed)
    assert [(task["name"], task["id"]) for task in shown["tasks"]] == [("count", 1)]
    assert shown["scores"]["matrix"]["scores"] == [[80.0]]
    assert (list(shown["scores"]["functions"]), list(shown["scores"]["seconds"])) == (["count"], ["count"])
    agree(restored(Bank.open(bank.path), base, "count"), wanted, base, inputs)
    code, printed, error = lilora("bank", "rm", bank.path, "--task", "count", "--json")
    assert code == 0, error
    assert (json.loads(printed)["tasks"], json.loads(printed)["scores"]) == ([], {})


@pytest.mark.parametrize(
    "which, task, said",
    [("olora", "count", "all tasks in one state"), ("lora", "read", "on top of 'read'"), ("dac", "read", "on top of")],
)
def test_a_task_that_others_are_built_upon_stays(which, task, said, lilora, base, llava_folder, tmp_path):
    bank = made(tmp_path / "bank", which, base, llava_folder)
    code, _, error = lilora("bank", "rm", bank.path, "--task", task)
    assert (code, said in error) == (2, True)
    assert Bank.open(bank.path).tasks == ["read", "count"]
