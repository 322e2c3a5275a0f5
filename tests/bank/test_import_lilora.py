"""`lilora_task_bank.bin` in the layout of LiLoRA's released code, read into banks: the model against dense weights by hand."""

import copy
import json

import pytest
import torch
from transformers import AutoConfig, CLIPModel, LlavaForConditionalGeneration

from lilora.bank.bank import Bank
from lilora.bank.index import BaseModelId
from lilora.continual.base_model import load_bank
from lilora.errors import UserError
from lilora.importers.checkpoint import write_bank
from lilora.importers.lilora import read_lilora
from lilora.methods import METHODS, make_method

R, SUB_RANK, ALPHA, IMAGE = 4, 2, 10, 39
MLP = {"gate_proj": (24, 32), "up_proj": (24, 32), "down_proj": (32, 24)}  # (K, N)
ATTENTION = {"q_proj": (24, 24), "k_proj": (24, 12), "v_proj": (24, 12), "o_proj": (24, 24)}
PROJECTOR = {"0": (16, 24), "2": (24, 24)}
# (name in LLaVA's own tree, in that of transformers, K, N)
LINEARS = [
    (f"model.layers.{i}.mlp.{n}", f"model.language_model.layers.{i}.mlp.{n}", *kn)
    for i in range(2)
    for n, kn in MLP.items()
]
LINEARS += [
    (f"model.mm_projector.{n}", f"model.multi_modal_projector.linear_{1 + int(n) // 2}", *kn)
    for n, kn in PROJECTOR.items()
]
WIDER = [
    (f"model.layers.{i}.self_attn.{n}", f"model.language_model.layers.{i}.self_attn.{n}", *kn)
    for i in range(2)
    for n, kn in ATTENTION.items()
]


@pytest.fixture(scope="module")
def base(llava_folder):
    return LlavaForConditionalGeneration.from_pretrained(llava_folder).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def empty(llava_folder):
    """The same model without weights."""
    with torch.device("meta"):
        return LlavaForConditionalGeneration(AutoConfig.from_pretrained(llava_folder))


def content(tasks=("1", "10"), linears=LINEARS, ours=0, dtype=torch.float32):
    """What the released code would save after the last of the tasks; ours: which column of LINEARS."""
    saved = {"format": "lilora-task-bank-v2", "lora_share_A": {}, "lora_share_B": {}}
    saved |= {"lora_specific_A": {task: {} for task in tasks}, "lora_specific_B": {task: {} for task in tasks}}
    for *names, k, n in linears:
        path = f"base_model.model.{names[ours]}"
        saved["lora_share_A"][f"{path}.lora_share_A.default.weight"] = torch.randn(R, k) / k**0.5
        saved["lora_share_B"][f"{path}.lora_share_B.default.weight"] = torch.randn(n, R) / 4
        for task in tasks:
            own = f"default.{task}"
            saved["lora_specific_A"][task][f"{path}.lora_specific_A.{own}.weight"] = torch.randn(SUB_RANK, R)
            saved["lora_specific_B"][task][f"{path}.lora_specific_B.{own}.weight"] = torch.randn(n, SUB_RANK) / 4
            saved["lora_specific_B"][task][f"{path}.lora_specific_B.{own}.fusion"] = torch.randn(1)
    saved = mapped(saved, lambda value: value.to(dtype) if isinstance(value, torch.Tensor) else value)
    return saved | {"task_order": list(tasks)}


def mapped(values, change):
    return {key: mapped(value, change) if isinstance(value, dict) else change(value) for key, value in values.items()}


def written(folder, saved, **config):
    torch.save(saved, folder / "lilora_task_bank.bin")
    told = {"peft_type": "LILORA", "r": R, "lora_alpha": ALPHA, "sub_rank": SUB_RANK, **config}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    torch.save({}, folder / "non_lora_trainables.bin")
    return folder / "lilora_task_bank.bin"


def batch():
    ids = torch.randint(3, IMAGE, (2, 9))
    ids[:, 1:5] = IMAGE
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(2, 3, 8, 8)}


@torch.no_grad()
def dense(base, saved, task, inputs, linears=LINEARS, ours=0):
    """Logits with the task's whole update of every linear in its weight, in fp64."""
    model = copy.deepcopy(base).double()
    for *names, _, _ in linears:
        path, own = f"base_model.model.{names[ours]}", f"default.{task}"
        a = saved["lora_share_A"][f"{path}.lora_share_A.default.weight"].double()
        b = saved["lora_share_B"][f"{path}.lora_share_B.default.weight"].double()
        v = saved["lora_specific_A"][task][f"{path}.lora_specific_A.{own}.weight"].double()
        u = saved["lora_specific_B"][task][f"{path}.lora_specific_B.{own}.weight"].double()
        f = 1 / (1 + (-saved["lora_specific_B"][task][f"{path}.lora_specific_B.{own}.fusion"].double()).exp())
        model.get_submodule(names[1]).weight += ALPHA / R * (f * b + (1 - f) * (u @ v)) @ a
    return model(**inputs | {"pixel_values": inputs["pixel_values"].double()}).logits.float()


def agree(method, base, saved, task, name, inputs, **form):
    method.activate(name, train=False)
    with torch.no_grad():
        logits, plain = method.model.eval()(**inputs).logits, base(**inputs).logits
    torch.testing.assert_close(logits, dense(base, saved, task, inputs, **form), rtol=1e-4, atol=1e-4)
    assert (logits - plain).abs().max() > 0.1


CASES = {
    "original names": {},
    "names of transformers": {"ours": 1},
    "bf16": {"dtype": torch.bfloat16},
    "attention too": {"linears": LINEARS + WIDER},
    "language model alone": {"linears": LINEARS[:6]},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_restored_model_is_the_base_with_each_tasks_update_in_its_weights(base, empty, tmp_path, case):
    inputs, saved = batch(), content(**case)
    imported = read_lilora([written(tmp_path, saved)], empty)
    assert (list(imported.tasks), imported.notes) == (["task1", "task10"], ())
    settings = {**METHODS["lilora"].presets["released"], **imported.settings}
    write_bank(tmp_path / "bank", {"settings": settings}, BaseModelId.of(base, "tiny"), imported.tasks)
    bank = Bank.open(tmp_path / "bank")
    method = make_method("lilora", copy.deepcopy(base), bank.config["settings"])
    method.restore(bank.load_tasks())
    form = {key: value for key, value in case.items() if key != "dtype"}
    for task in ("1", "10"):
        agree(method, base, saved, task, f"task{task}", inputs, **form)


def test_tensors_are_stored_as_they_are_and_settings_are_those_of_the_file(empty, tmp_path):
    saved = content(dtype=torch.float16)
    path = written(tmp_path, saved, lora_alpha=6)
    imported = read_lilora([path], empty, ["read", "count"])
    own, shared = imported.tasks["count"]
    raw, linear = "base_model.model.model.mm_projector.2", "model.multi_modal_projector.linear_2"
    assert torch.equal(shared[f"{linear}.A"], saved["lora_share_A"][f"{raw}.lora_share_A.default.weight"])
    assert torch.equal(own[f"{linear}.V"], saved["lora_specific_A"]["10"][f"{raw}.lora_specific_A.default.10.weight"])
    assert {tensor.dtype for tensor in (*own.values(), *shared.values())} == {torch.float16}
    assert imported.tasks["read"][1] is shared
    assert {key: imported.settings[key] for key in ("r", "sub_rank", "alpha")} == {"r": 4, "sub_rank": 2, "alpha": 6}
    (tmp_path / "adapter_config.json").unlink()
    imported = read_lilora([path], empty)
    assert imported.settings["alpha"] == 256
    assert imported.notes == (f"{tmp_path / 'adapter_config.json'} does not tell lora_alpha: alpha is 256",)


# --- bad files ------------------------------------------------------------------------------------------------------------

UP = "base_model.model.model.layers.1.mlp.up_proj"
ONE = f"{UP}.lora_specific_B.default.1"


def at(*keys, value=None):
    """Put a value in a place of the content, or nothing: take away what is there."""

    def change(saved):
        inner = saved
        for key in keys[:-1]:
            inner = inner[key]
        if value is None:
            del inner[keys[-1]]
        else:
            inner[keys[-1]] = value

    return change


def a(path):
    return "lora_share_A", f"base_model.model.model.{path}.lora_share_A.default.weight"


def misnamed(saved):
    """A tensor of task 1 is named as that of task 10."""
    own = saved["lora_specific_B"]["1"]
    own[f"{ONE}0.weight"] = own.pop(f"{ONE}.weight")


UP_A, TASK_1 = a("layers.1.mlp.up_proj"), ("lora_specific_B", "1")
OURS = r"model\.language_model\.layers\.1\.mlp\.up_proj"
TWO = torch.ones(2)
BAD = {
    "no format": (at("format"), "has format None and this reads 'lilora-task-bank-v2'"),
    "another format": (at("format", value="lilora-task-bank-v1"), "has format 'lilora-task-bank-v1'"),
    "no A": (at(*UP_A), rf"no tensor for {OURS}\.A"),
    "no B": (at("lora_share_B", f"{UP}.lora_share_B.default.weight"), rf"no tensor for {OURS}\.B0"),
    "no U": (at(*TASK_1, f"{ONE}.weight"), rf"no tensor for 1/{OURS}\.U"),
    "no fusion": (at(*TASK_1, f"{ONE}.fusion"), rf"no tensor for 1/{OURS}\.fusion"),
    "no shared part": (at("lora_share_A"), "no lora_share_A of a linear"),
    "one projector linear": (at(*a("mm_projector.0")), r"no tensor for .*linear_1\.A"),
    "unknown tensor": (
        at("lora_share_A", f"{UP}.lora_A.weight", value=TWO),
        r"holds the tensor lora_share_A\..*lora_A",
    ),
    "unknown linear": (at(*a("layers.7.mlp.up_proj"), value=TWO), r"holds the tensor .*layers\.7\.mlp"),
    "vision tower": (at(*a("vision_tower.encoder.layers.0.mlp.fc1"), value=TWO), "holds the tensor .*vision_tower"),
    "of task 10 with task 1": (at(*TASK_1, f"{ONE}0.weight", value=TWO), r"holds the tensor .*B\.1\..*default\.10\."),
    "task 10 for task 1": (misnamed, r"holds the tensor .*B\.1\..*default\.10\."),
    "transposed": (at(*TASK_1, f"{ONE}.weight", value=torch.ones(2, 32)), r"is \[2, 32\].*wants \[32, 2\]"),
    "another rank": (at(*UP_A, value=torch.ones(5, 24)), r"is \[5, 24\].*wants \[4, 24\]"),
    "a scalar": (at(*TASK_1, f"{ONE}.fusion", value=torch.tensor(1.0)), r"fusion is \[\].*wants \[1\]"),
    "not finite": (at(*TASK_1, f"{ONE}.fusion", value=torch.tensor([torch.nan])), "is not finite"),
    "no order": (at("task_order"), "task_order is None"),
    "other tasks": (at("task_order", value=["1", "2"]), r"task_order is \['1', '2'\] and its tasks are \['1', '10'\]"),
    "a list": (at("lora_share_B", value=[1, 2]), r"lora_share_B is no plain tensor"),
}


@pytest.mark.parametrize("change, said", BAD.values(), ids=BAD)
def test_a_file_that_does_not_fit_is_refused_in_one_sentence(empty, tmp_path, change, said):
    saved = content()
    change(saved)
    path = written(tmp_path, saved)
    with pytest.raises(UserError, match=said) as error:
        read_lilora([path], empty)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_unreadable_files_and_files_of_another_model_are_refused(empty, clip_folder, tmp_path):
    path = written(tmp_path, content())
    with pytest.raises(UserError, match="2 are given"):
        read_lilora([path, path], empty)
    with pytest.raises(UserError, match="name each once"):
        read_lilora([path], empty, ["one"])
    with torch.device("meta"):
        clip = CLIPModel(AutoConfig.from_pretrained(clip_folder))
    with pytest.raises(UserError, match=r"lora_share_A\.base_model"):
        read_lilora([path], clip)
    torch.save({"base_model.model.lm_head.weight": torch.ones(2)}, tmp_path / "non_lora_trainables.bin")
    with pytest.raises(UserError, match=r"trained weights of the base model \(base_model\.model\.lm_head\.weight\)"):
        read_lilora([path], empty)
    torch.save({}, tmp_path / "non_lora_trainables.bin")
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter_config\.json is no JSON"):
        read_lilora([path], empty)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"lilora_task_bank\.bin is truncated"):
        read_lilora([path], empty)
    torch.save(content()["lora_share_A"], path)
    with pytest.raises(UserError, match="has format None"):
        read_lilora([path], empty)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="has format 'list'"):
        read_lilora([path], empty)


class Runs:
    """A pickle that would run code."""

    def __reduce__(self):
        return print, ("it ran",)


def test_a_file_that_would_run_code_is_refused(empty, tmp_path, capsys):
    path = written(tmp_path, content() | {"extra": Runs()})
    capsys.readouterr()
    with pytest.raises(UserError, match="more than plain tensors"):
        read_lilora([path], empty)
    assert capsys.readouterr().out == ""


# --- the command ----------------------------------------------------------------------------------------------------------


def test_the_command_makes_a_bank_of_which_a_plain_lora_can_be_exported(lilora, llava_folder, base, tmp_path):
    from peft import PeftModel

    source, out = tmp_path / "source", tmp_path / "bank"
    source.mkdir()
    saved, inputs = content(), batch()
    command = ("bank", "import", "lilora", written(source, saved), "--model", llava_folder, "--out", out, "--json")
    code, printed, error = lilora(*command)
    assert code == 0, error
    shown = json.loads(printed)
    assert ([task["name"] for task in shown["tasks"]], shown["notes"]) == (["task1", "task10"], [])
    assert len(shown["shared"]) == 1
    assert shown["config"]["image_aspect"] == "pad", "as LLaVA's scripts have it"
    assert "padded to squares" in (out / "README.md").read_text()
    _, method, _ = load_bank(out, None, "cpu")
    agree(method, base, saved, "10", "task10", inputs)

    code, _, error = lilora("bank", "export", out, "--task", "task1", "--out", tmp_path / "lora")
    assert code == 0, error
    with torch.no_grad():
        logits = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").eval()(**inputs).logits
    torch.testing.assert_close(logits, dense(base, saved, "1", inputs), rtol=1e-4, atol=1e-4)


def test_the_command_writes_nothing_when_it_fails(lilora, llava_folder, tmp_path):
    saved = content()
    at("lora_specific_B", "1", f"{ONE}.fusion")(saved)
    path = written(tmp_path, saved)
    before = {entry.name for entry in tmp_path.iterdir()}
    code, printed, error = lilora("bank", "import", "lilora", path, "--model", llava_folder, "--out", tmp_path / "bank")
    assert (code, printed) == (2, "")
    assert "up_proj.fusion" in error
    assert {entry.name for entry in tmp_path.iterdir()} == before
