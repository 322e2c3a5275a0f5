"""Checkpoints in the layout of DAC's released code, read into banks: the restored model against weights merged by hand."""

import copy
import json

import pytest
import torch
from transformers import AutoConfig, CLIPModel, LlamaConfig, LlamaForCausalLM

from lilora.bank.bank import Bank
from lilora.bank.index import BaseModelId
from lilora.continual.base_model import load_bank
from lilora.errors import UserError
from lilora.importers.checkpoint import write_bank
from lilora.importers.dac import read_dac
from lilora.methods import make_method
from lilora.methods.dac import PRESETS

R, MERGED = 12, 4
ENCODERS = (("text_model", 2, 16, 20), ("vision_model", 3, 24, 28))  # blocks, width, width inside the MLP


def layers():
    """Of each of the file's layers: {its linear: (the model's, K, N)}."""
    for encoder, blocks, width, inner in ENCODERS:
        for block in range(blocks):
            path = f"{encoder}.encoder.layers.{block}"
            attention = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "proj": "out_proj"}
            yield {theirs: (f"{path}.self_attn.{ours}", width, width) for theirs, ours in attention.items()}
            yield {"linear": (f"{path}.mlp.fc1", width, inner)}
            yield {"linear": (f"{path}.mlp.fc2", inner, width)}


def content(dtype=torch.float32, r=R, alpha=1, counts=torch.float32):
    """What the released code would save after a task."""
    weights = {
        f"layer_{i}": {
            theirs: {
                "w_lora_A": torch.randn(r, k, dtype=dtype),
                "w_lora_B": torch.randn(n, r, dtype=dtype),
                "num": torch.randperm(100)[:r].to(counts),
            }
            for theirs, (_, k, n) in linears.items()
        }
        for i, linears in enumerate(layers())
    }
    metadata = {"r": r, "alpha": alpha, "encoder": "both", "params": ["q", "k", "v", "o"], "position": "all"}
    return {"weights": weights, "metadata": metadata}


def written(folder, **contents):
    for name, saved in contents.items():
        torch.save(saved, folder / f"{name}.pt")
    return [folder / f"{name}.pt" for name in contents]


@pytest.fixture(scope="module")
def base(clip_folder):
    return CLIPModel.from_pretrained(clip_folder).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def empty(clip_folder):
    """The same model without weights."""
    with torch.device("meta"):
        return CLIPModel(AutoConfig.from_pretrained(clip_folder))


def batch():
    return {"input_ids": torch.randint(3, 40, (4, 8)), "pixel_values": torch.randn(3, 3, 8, 8)}


def dense(base, tasks, inputs):
    """Logits of the model with each task's most chosen experts added to the weights, one after the other."""
    model = copy.deepcopy(base).double()
    for saved in tasks:
        for i, linears in enumerate(layers()):
            for theirs, (path, k, n) in linears.items():
                factors = saved["weights"][f"layer_{i}"][theirs]
                total = torch.zeros(n, k, dtype=torch.float64)
                for j in sorted(range(R), key=lambda j: -float(factors["num"][j]))[:MERGED]:
                    total += torch.outer(factors["w_lora_B"][:, j].double(), factors["w_lora_A"][j].double())
                model.get_submodule(path).weight += saved["metadata"]["alpha"] / R * total
    return model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"].double()).logits_per_image


def agree(model, base, tasks, inputs):
    with torch.no_grad():
        logits, wanted = model(**inputs).logits_per_image, dense(base, tasks, inputs).float()
        torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)
        assert (logits - base(**inputs).logits_per_image).abs().max() > 0.1


@pytest.mark.parametrize("dtype, alpha", [(torch.float32, 1), (torch.bfloat16, 3), (torch.float16, 0.5)], ids=str)
def test_the_restored_model_is_the_base_with_the_merged_experts_in_its_weights(base, empty, tmp_path, dtype, alpha):
    tasks = {name: content(dtype, alpha=alpha) for name in ("Aircraft", "DTD", "MNIST")}
    imported = read_dac(written(tmp_path, **tasks), empty)
    assert (list(imported.tasks), imported.notes) == (list(tasks), ())
    assert {name: imported.settings[name] for name in ("r", "alpha")} == {"r": R, "alpha": alpha}
    settings = {**PRESETS["released"], **imported.settings}
    write_bank(tmp_path / "bank", {"settings": settings}, BaseModelId.of(base, "tiny"), imported.tasks)
    bank = Bank.open(tmp_path / "bank")
    method = make_method("dac", copy.deepcopy(base), bank.config["settings"])
    assert len(method.layers) == 5 * 6
    method.restore({task: bank.load_task(task) for task in bank.tasks})
    agree(method.model.eval(), base, tasks.values(), batch())


def test_experts_are_stored_as_they_are_and_counts_in_fp32(empty, tmp_path):
    saved = content(torch.bfloat16, counts=torch.int64)
    (path,) = written(tmp_path, DTD=saved)
    imported = read_dac([path], empty, ["textures"])
    ((own, stored),) = imported.tasks.values()
    assert own == {}
    linear, theirs = "vision_model.encoder.layers.1.self_attn.out_proj", saved["weights"]["layer_9"]["proj"]
    assert list(imported.tasks) == ["textures"]
    assert torch.equal(stored[f"{linear}.experts.A"], theirs["w_lora_A"])
    assert torch.equal(stored[f"{linear}.experts.B0"], theirs["w_lora_B"])
    assert stored[f"{linear}.experts.A"].dtype == torch.bfloat16
    assert stored[f"state.{linear}.counts"].tolist() == theirs["num"].tolist()
    assert torch.equal(stored[f"state.{linear}.weights"], torch.ones(R))
    assert imported.notes == (f"{path}: torch.int64 is stored as torch.float32",)


# --- bad files ------------------------------------------------------------------------------------------------------------


def at(*keys, value=None):
    """Put a value in a place of the content, or nothing: take away what is there."""

    def change(saved):
        inner = saved
        for key in keys[:-1]:
            inner = inner.setdefault(key, {})
        if value is None:
            del inner[keys[-1]]
        else:
            inner[keys[-1]] = value

    return change


Q = ("weights", "layer_6", "q_proj")  # of the vision encoder's first block
BAD = {
    "no A": (at(*Q, "w_lora_A"), r"no tensor for vision_model\.encoder\.layers\.0\.self_attn\.q_proj\.experts\.A"),
    "no counts": (at(*Q, "num"), r"no tensor for state\.vision_model\.encoder\.layers\.0\.self_attn\.q_proj\.counts"),
    "no linear": (at(*Q), r"no tensor for .*q_proj\.experts\.A"),
    "no layer": (at("weights", "layer_14"), r"no tensor for vision_model\.encoder\.layers\.2\.mlp\.fc2"),
    "another layer": (at("weights", "layer_15", "linear", "num", value=torch.ones(R)), r"holds the tensor layer_15\.linear\.num"),
    "unknown tensor": (at(*Q, "w_lora_w", value=torch.ones(R)), r"holds the tensor layer_6\.q_proj\.w_lora_w"),
    "unknown linear": (at("weights", "layer_7", "q_proj", "num", value=torch.ones(R)), r"holds the tensor layer_7\.q_proj\.num"),
    "transposed": (at(*Q, "w_lora_A", value=torch.randn(24, R)), r"layer_6\.q_proj\.w_lora_A is \[24, 12\].*wants \[12, 24\]"),
    "width of another encoder": (at(*Q, "w_lora_B", value=torch.randn(16, R)), r"layer_6\.q_proj\.w_lora_B is \[16, 12\]"),
    "another rank": (at("metadata", "r", value=8), r"w_lora_A is \[12, 16\].*wants \[8, 16\]"),
    "not finite": (at(*Q, "w_lora_B", value=torch.full((24, R), torch.inf)), r"layer_6\.q_proj\.w_lora_B is not finite"),
    "a list": (at(*Q, "num", value=[1] * R), r"layer_6\.q_proj\.num is no plain tensor"),
    "no weights": (at("weights"), "has no weights"),
    "no metadata": (at("metadata"), "r is None; it must be a whole number above 0"),
    "no r": (at("metadata", "r"), "r is None"),
    "no alpha": (at("metadata", "alpha", value="1"), "alpha is '1'; it must be a number above 0"),
}  # fmt: skip


@pytest.mark.parametrize("change, said", BAD.values(), ids=BAD)
def test_a_file_that_does_not_fit_is_refused_in_one_sentence(empty, tmp_path, change, said):
    saved = content()
    change(saved)
    good, bad = written(tmp_path, Aircraft=content(), DTD=saved)
    with pytest.raises(UserError, match=said) as error:
        read_dac([bad], empty)
    assert str(bad) in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError):
        read_dac([good, bad], empty)


def test_a_file_that_is_no_dict_or_truncated_is_refused(empty, tmp_path):
    (path,) = written(tmp_path, DTD=[content()])
    with pytest.raises(UserError, match=r"DTD\.pt has no weights"):
        read_dac([path], empty)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"DTD\.pt is truncated"):
        read_dac([path], empty)


def test_files_of_two_runs_names_and_models_that_do_not_fit_are_refused(empty, tmp_path):
    one, other = written(tmp_path, Aircraft=content(), DTD=content(alpha=2))
    with pytest.raises(UserError, match=r"DTD\.pt has .*'alpha': 2.* and .*Aircraft\.pt .*'alpha': 1"):
        read_dac([one, other], empty)
    for files, tasks in (([one, one], None), ([one], ["a", "b"]), ([one, one], ["a", "a"]), ([], None)):
        with pytest.raises(UserError, match="name each once"):
            read_dac(files, empty, tasks)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(**sizes))
    with pytest.raises(UserError, match="LlamaForCausalLM is none"):
        read_dac([one], llama)


# --- the command ----------------------------------------------------------------------------------------------------------


def test_the_command_makes_a_bank_that_eval_can_load(lilora, clip_folder, base, tmp_path):
    tasks, out = {"Aircraft": content(), "DTD": content()}, tmp_path / "bank"
    command = ("bank", "import", "dac", *written(tmp_path, **tasks), "--model", clip_folder, "--out", out)
    code, printed, error = lilora(*command)
    assert code == 0, error
    assert "Aircraft" in printed
    code, printed, _ = lilora("bank", "ls", out, "--json")
    shown = json.loads(printed)
    assert [task["name"] for task in shown["tasks"]] == list(tasks)
    assert (shown["config"]["kind"], shown["config"]["settings"]["merged"]) == ("classification", MERGED)
    assert "image_aspect" not in shown["config"], "CLIP's pictures are cut"
    _, method, _ = load_bank(out, None, "cpu")
    agree(method.model.eval(), base, tasks.values(), batch())


def test_the_command_writes_nothing_when_it_fails(lilora, clip_folder, tmp_path):
    bad = content()
    del bad["weights"]["layer_3"]
    files, before = written(tmp_path, Aircraft=content(), DTD=bad), {"Aircraft.pt", "DTD.pt"}
    code, printed, error = lilora("bank", "import", "dac", *files, "--model", clip_folder, "--out", tmp_path / "bank")
    assert (code, printed) == (2, "")
    assert "DTD.pt has no tensor for text_model.encoder.layers.1.self_attn.q_proj" in error
    assert {path.name for path in tmp_path.iterdir()} == before
