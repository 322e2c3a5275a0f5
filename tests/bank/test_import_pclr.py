"""Checkpoints in the layout of PCLR's released code, read into banks: the restored model against dense weights by hand."""

import copy
import json
import os

import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration

from lilora.bank.bank import Bank
from lilora.bank.index import BaseModelId
from lilora.continual.base_model import load_bank
from lilora.continual.images import images_for
from lilora.errors import UserError
from lilora.importers.checkpoint import write_bank
from lilora.importers.pclr import read_pclr
from lilora.methods import make_method
from lilora.methods.pclr.settings import PRESETS

R, ALPHA, IMAGE, PATCHES, TEXT, VISION = 4, 10, 39, 4, 24, 16
WIDTHS = {  # of a decoder layer's linears: (K, N)
    "self_attn.q_proj": (24, 24),
    "self_attn.k_proj": (24, 12),
    "self_attn.v_proj": (24, 12),
    "self_attn.o_proj": (24, 24),
    "mlp.gate_proj": (24, 32),
    "mlp.up_proj": (24, 32),
    "mlp.down_proj": (32, 24),
}
# (name in LLaVA's own tree, in transformers before 4.52, now, pool, K, N)
LINEARS = [
    (
        f"model.layers.{i}.{n}",
        f"language_model.model.layers.{i}.{n}",
        f"model.language_model.layers.{i}.{n}",
        str(i),
        *kn,
    )
    for i in range(2)
    for n, kn in WIDTHS.items()
] + [
    (f"model.mm_projector.{old}", f"{new}", f"model.{new}", "mm_projector", *kn)
    for old, new, kn in (
        (0, "multi_modal_projector.linear_1", (16, 24)),
        (2, "multi_modal_projector.linear_2", (24, 24)),
    )
]
TEACHER = {"static": "teacher_part1", "train": "teacher_part2", "share": "teacher_share"}


@pytest.fixture(scope="module")
def base(llava_folder):
    return LlavaForConditionalGeneration.from_pretrained(llava_folder).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def empty(llava_folder):
    """The same model without weights."""
    with torch.device("meta"):
        return LlavaForConditionalGeneration(AutoConfig.from_pretrained(llava_folder))


def content(sizes, tasks=3, one_pool=False, ours=0, dtype=torch.float32, teacher=False, uneven=()):
    """What the released code would save.

    sizes: ranks of `static`, `train` and `share`; uneven: pools with two more of `static`; ours: which column of LINEARS.
    """
    name = TEACHER if teacher else {part: part for part in TEACHER}
    larger = sizes | {"static": sizes.get("static", 0) + 2}
    saved = {
        "task_llm_query_pool": normalize(torch.randn(tasks, TEXT)),
        "task_vit_query_pool": torch.randn(tasks, VISION),
    }
    for pool in ["llm"] if one_pool else ["mm_projector", "0", "1"]:
        for part, ranks in (larger if pool in uneven else sizes).items():
            if part != "share":
                saved[f"{name[part]}_keys_llm.{pool}"] = torch.randn(ranks, TEXT)
                saved[f"{name[part]}_keys_vit.{pool}"] = torch.randn(ranks, VISION)
    for *names, pool, k, n in LINEARS:
        for part, ranks in (larger if pool in uneven else sizes).items():
            saved[f"base_model.{names[ours]}.{name[part]}_rank_A_pool"] = torch.randn(k, ranks) / k**0.5
            saved[f"base_model.{names[ours]}.{name[part]}_rank_B_pool"] = torch.randn(ranks, n) / 4
    return {name: tensor.to(dtype) for name, tensor in saved.items()}


def written(folder, saved, **config):
    torch.save(saved, folder / "lrp.bin")
    (folder / "lrp_config.json").write_text(json.dumps({"llm_top_rank": R, "llm_lora_alpha": ALPHA, **config}))
    return folder / "lrp.bin"


def batch():
    """Three samples, the last without image."""
    ids = torch.randint(3, IMAGE, (3, 9))
    ids[:2, 1 : 1 + PATCHES] = IMAGE
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(2, 3, 8, 8)}


def samples(inputs):
    for i in range(3):
        one = {name: inputs[name][i : i + 1] for name in ("input_ids", "attention_mask")}
        yield one | ({"pixel_values": inputs["pixel_values"][i : i + 1]} if i < 2 else {})


def queries(model, one, pooled=False):
    """(text [TEXT], vision [VISION]) of a sample; pooled: by the tower's pooled output, as the code with one pool."""
    ids = one["input_ids"][0]
    text = model.get_input_embeddings().weight[ids[ids != IMAGE]].mean(0)
    if "pixel_values" not in one:
        return normalize(text, dim=0), text.new_zeros(VISION)
    seen = model.model.vision_tower(one["pixel_values"].to(text.dtype), output_hidden_states=True)
    vision = seen.pooler_output[0] if pooled else seen.hidden_states[-2][0, 0]
    return normalize(text, dim=0), normalize(vision, dim=0)


def dense(base, saved, one, ours=0):
    """Logits of a sample, with all that it chooses added to the weights: methods of the released code's inference."""
    model = copy.deepcopy(base).double()
    saved = {name.replace("teacher_part1", "static").replace("teacher_part2", "train"): t for name, t in saved.items()}
    saved = {name.replace("teacher_share", "share"): tensor.double() for name, tensor in saved.items()}
    one_pool = any(name.endswith("_keys_llm.llm") for name in saved)
    text, vision = queries(model, one, one_pool)
    near = saved["task_llm_query_pool"] @ text + saved["task_vit_query_pool"] @ vision
    newest = int(near.argmax()) == len(near) - 1
    for *names, pool, k, n in LINEARS:
        factors, total = f"base_model.{names[ours]}", torch.zeros(k, n, dtype=torch.float64)
        scores = {}
        for part in ("static", "train"):
            if f"{factors}.{part}_rank_A_pool" in saved:
                keys = [saved[f"{part}_keys_{kind}.{'llm' if one_pool else pool}"] for kind in ("llm", "vit")]
                scores[part] = normalize(keys[0]) @ text + VISION / TEXT * (normalize(keys[1]) @ vision)
        if len(scores) == 2 and not newest:
            scores.pop("train")
        take = dict.fromkeys(scores, R)
        if len(scores) == 2:
            take["static"] = max(0, R - len(scores["train"]))
        for part, value in scores.items():
            for j in value.argsort(descending=True)[: take[part]]:
                a, b = saved[f"{factors}.{part}_rank_A_pool"][:, j], saved[f"{factors}.{part}_rank_B_pool"][j]
                total += ALPHA / R * torch.outer(a, b)
        if f"{factors}.share_rank_A_pool" in saved:
            a, b = saved[f"{factors}.share_rank_A_pool"], saved[f"{factors}.share_rank_B_pool"]
            total += ALPHA / a.shape[1] * a @ b
        model.get_submodule(names[2]).weight += total.T
    return model(**{key: value.double() if value.is_floating_point() else value for key, value in one.items()}).logits


def restored(base, imported, folder):
    """The model of a bank of what was imported."""
    settings = {**PRESETS["released"], **imported.settings}
    write_bank(folder, {"settings": settings}, BaseModelId.of(base, "tiny"), imported.tasks)
    bank = Bank.open(folder)
    method = make_method("pclr", copy.deepcopy(base), bank.config["settings"])
    method.restore({task: bank.load_task(task) for task in bank.tasks})
    return method.model.eval()


def agree(model, base, saved, inputs, ours=0):
    with torch.no_grad():
        logits, plain = model(**inputs).logits, base(**inputs).logits
        for i, one in enumerate(samples(inputs)):
            torch.testing.assert_close(logits[i : i + 1], dense(base, saved, one, ours).float(), rtol=0, atol=5e-4)
    assert (logits - plain).abs().amax((1, 2)).min() > 0.1


# --- what is restored -----------------------------------------------------------------------------------------------------


CASES = {
    "merged": {"sizes": {"static": 9}},
    "merged-shared-bf16": {"sizes": {"static": 9, "share": 2}, "dtype": torch.bfloat16},
    "merged-one-pool-fp16": {"sizes": {"static": 9, "share": 3}, "one_pool": True, "ours": 1, "dtype": torch.float16},
    "merged-fewer-than-r": {"sizes": {"static": 3}},
    "merged-uneven-pools": {"sizes": {"static": 7}, "uneven": ("1",)},
    "unmerged-topped-up": {"sizes": {"static": 7, "train": 2, "share": 2}},
    "unmerged-enough-new-bf16": {"sizes": {"static": 7, "train": 6, "share": 2}, "dtype": torch.bfloat16},
    "unmerged-one-pool": {"sizes": {"static": 7, "train": 2, "share": 2}, "one_pool": True, "ours": 1},
    "integration-input": {"sizes": {"static": 7, "train": 2, "share": 2}, "teacher": True},
    "integration-input-first": {"sizes": {"train": 6}, "tasks": 1, "teacher": True},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_restored_model_is_the_base_with_the_chosen_ranks_in_its_weights(base, empty, tmp_path, case):
    inputs, saved = batch(), content(**case)
    if (
        "train" in case["sizes"] and case.get("tasks") != 1
    ):  # the first sample is nearest to the newest task, the second not
        for task, one in zip((2, 0), samples(inputs), strict=False):
            for kind, query in zip(("llm", "vit"), queries(base, one, case.get("one_pool", False)), strict=True):
                saved[f"task_{kind}_query_pool"][task] = query
    imported = read_pclr([written(tmp_path, saved)], empty)
    agree(restored(base, imported, tmp_path / "bank"), base, saved, inputs, case.get("ours", 0))


def test_settings_are_those_that_the_file_shows(empty, tmp_path):
    path = written(tmp_path, content({"static": 7, "train": 3, "share": 2}))
    shown = {"r": R, "alpha": ALPHA, "shared": 2, "cap": 256, "pools": "layer"}
    shown |= {"vision_query": "tokens", "newest_switch": 3}
    imported = read_pclr([path], empty)
    assert {name: imported.settings[name] for name in shown} == shown
    assert list(imported.tasks) == ["task1", "task2", "task3"]
    assert ["chat template" in note for note in imported.notes] == [True]
    (tmp_path / "lrp_config.json").unlink()
    assert read_pclr([path], empty).settings | {"r": 64, "alpha": 128} == imported.settings | {"r": 64, "alpha": 128}
    assert read_pclr([path], empty).settings["r"] == 64
    imported = read_pclr([written(tmp_path, content({"static": 300}, one_pool=True, ours=1))], empty, ["a", "b", "c"])
    shown |= {"shared": 0, "cap": 300, "pools": "global", "vision_query": "pooled"}
    assert {name: imported.settings[name] for name in shown} == shown
    assert list(imported.tasks) == ["a", "b", "c"]


def test_ranks_are_stored_as_they_are(base, empty, tmp_path):
    saved = content({"static": 7, "share": 2}, dtype=torch.bfloat16)
    saved["static_keys_llm.0"] = saved["static_keys_llm.0"].double()
    imported = read_pclr([written(tmp_path, saved)], empty)
    restored(base, imported, tmp_path / "bank")
    own, stored = Bank.open(tmp_path / "bank").load_task("task2")
    linear = "model.language_model.layers.1.mlp.down_proj.old"
    assert own == {}
    assert torch.equal(stored[f"{linear}.A"], saved["base_model.model.layers.1.mlp.down_proj.static_rank_A_pool"].T)
    assert torch.equal(stored[f"{linear}.B0"], saved["base_model.model.layers.1.mlp.down_proj.static_rank_B_pool"].T)
    assert {t.dtype for name, t in stored.items() if name.endswith((".A", ".B0"))} == {torch.bfloat16}
    assert stored["state.keys.layer-0.old.text"].dtype == torch.float32
    assert imported.notes[:1] == (f"{tmp_path}/lrp.bin: torch.float64 is stored as torch.float32",)


# --- bad files ------------------------------------------------------------------------------------------------------------


UP = "base_model.model.layers.1.mlp.up_proj"
UP_A = rf"tensor {UP}\.static_rank_A_pool is"


def without(*names):
    return lambda saved: {name: tensor for name, tensor in saved.items() if not name.startswith(names)}


def having(name, tensor):
    return lambda saved: saved | {name: tensor}


POOL_1 = [f"{part}_keys_{kind}.1" for part in ("static", "train") for kind in ("llm", "vit")]
BAD = {
    "no B": (without(f"{UP}.static_rank_B"), r"no tensor for model\.language_model\.layers\.1\.mlp\.up_proj\.old\.B0"),
    "no linear": (without(UP), r"no tensor for model\.language_model\.layers\.1\.mlp\.up_proj\.shared\.A"),
    "no new part of a linear": (without(f"{UP}.train"), r"no tensor for .*up_proj\.new\.A"),
    "no shared part of a linear": (without(f"{UP}.share_rank_A"), r"no tensor for .*up_proj\.shared\.A"),
    "no key": (without("train_keys_vit.1"), r"no tensor for state\.keys\.layer-1\.new\.vision"),
    "no keys of a pool": (without(*POOL_1), r"no tensor for state\.keys\.layer-1\.old\.text"),
    "no queries": (without("task_llm"), r"no tensor for state\.queries\.text"),
    "no ranks of a layer": (without("base_model.model.layers.1"), r"no tensor for model\.language_model\.layers\.1\."),
    "keys of a part without ranks": (without("static_keys_llm", "static_keys_vit"), "holds the tensor base_model.*static_rank"),
    "another layer": (having("static_keys_llm.2", torch.randn(7, 24)), "holds the tensor static_keys_llm.2"),
    "unknown linear": (having("base_model.transformer.h.0.attn.c_attn.static_rank_A_pool", torch.randn(7, 24)), "c_attn"),
    "vision prompts": (having("base_model.model.vision_tower.static_prompt_pool", torch.randn(7, 2, 24)), "prompt_pool"),
    "unknown part": (having("spare_keys_llm.0", torch.randn(7, 24)), "holds the tensor spare_keys_llm.0"),
    "two of one place": (having("teacher_part1_keys_llm.0", torch.randn(7, 24)), "holds the tensor teacher_part1_keys_llm.0"),
    "transposed": (having(f"{UP}.static_rank_A_pool", torch.randn(7, 24)), rf"{UP_A} \[7, 24\].*wants \[24, 7\]"),
    "another number of ranks": (having(f"{UP}.train_rank_B_pool", torch.randn(3, 32)), r"is \[3, 32\].*wants \[2, 32\]"),
    "another number of shared ranks": (having(f"{UP}.share_rank_A_pool", torch.randn(24, 3)), r"is \[24, 3\].*wants \[24, 2\]"),
    "one dimension": (having("static_keys_llm.0", torch.randn(7)), r"static_keys_llm\.0 is \[7\].*wants \[n, 24\]"),
    "no dimension": (having("base_model.model.layers.0.self_attn.q_proj.share_rank_A_pool", torch.tensor(1.0)), r"is \[\]"),
    "no rows": (having("task_llm_query_pool", torch.randn(0, 24)), r"task_llm_query_pool is \[0, 24\]"),
    "width of a key": (having("static_keys_vit.0", torch.randn(7, 24)), r"static_keys_vit\.0 is \[7, 24\].*wants \[7, 16\]"),
    "width of a query": (having("task_vit_query_pool", torch.randn(3, 24)), r"task_vit_query_pool is .*wants \[3, 16\]"),
    "not finite": (having(f"{UP}.static_rank_A_pool", torch.full((24, 7), torch.nan)), rf"{UP_A} not finite"),
    "sparse": (having("static_keys_llm.0", torch.eye(7, 24).to_sparse()), r"static_keys_llm\.0 is no plain tensor"),
    "a number": (having("static_keys_llm.0", 3), r"static_keys_llm\.0 is no plain tensor"),
    "a list": (lambda saved: list(saved.values()), "the content is no plain tensor"),
    "nothing": (lambda saved: {}, r"no tensor for state\.keys\.projector\.old\.text"),
}  # fmt: skip


@pytest.mark.parametrize("change, said", BAD.values(), ids=BAD)
def test_a_file_that_does_not_fit_is_refused_in_one_sentence(empty, tmp_path, change, said):
    saved = content({"static": 7, "train": 2, "share": 2})
    path = written(tmp_path, change(saved))
    with pytest.raises(UserError, match=said) as error:
        read_pclr([path], empty)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def damaged(path, how):
    data = path.read_bytes()
    if how == "code":
        torch.save({"static_keys_llm.0": Code(path.with_name("ran"))}, path)
    elif how == "missing":
        path.unlink()
    elif how == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes({"truncated": data[: len(data) // 2], "empty": b"", "text": b"hello world"}[how])


@pytest.mark.parametrize("how", ["truncated", "empty", "text", "code", "missing", "folder"])
def test_only_plain_tensors_are_read(empty, tmp_path, how):
    path = written(tmp_path, content({"static": 7}))
    damaged(path, how)
    said = "cannot be read" if how in ("missing", "folder") else "truncated, or holds more than plain tensors"
    with pytest.raises(UserError, match=f"lrp.bin.* {said}"):
        read_pclr([path], empty)
    assert not (tmp_path / "ran").exists()


def test_files_beside_it_are_checked(base, empty, tmp_path):
    saved = content({"static": 7})
    for config, said in (
        ({"llm_top_rank": None}, "llm_top_rank is None; it must be a whole number above 0"),
        ({"llm_top_rank": 2.5}, "llm_top_rank is 2.5"),
        ({"llm_lora_alpha": -1}, "llm_lora_alpha is -1; it must be a number above 0"),
        ({"llm_lora_alpha": True}, "llm_lora_alpha is True"),
    ):
        with pytest.raises(UserError, match=f"lrp_config.json: {said}"):
            read_pclr([written(tmp_path, saved, **config)], empty)
    path = written(tmp_path, saved)
    (tmp_path / "lrp_config.json").write_text("{")
    with pytest.raises(UserError, match=r"lrp_config.json is no JSON"):
        read_pclr([path], empty)
    written(tmp_path, saved)

    projector = base.model.multi_modal_projector
    weights = {
        f"base_model.model.mm_projector.{i}.{kind}": getattr(linear, kind).bfloat16()
        for i, linear in ((0, projector.linear_1), (2, projector.linear_2))
        for kind in ("weight", "bias")
    }
    beside = tmp_path / "mm_projector.bin"
    torch.save(weights, beside)
    assert read_pclr([path], base).settings == read_pclr([path], empty).settings
    name = "base_model.model.mm_projector.2.weight"
    for change, said in (
        ({name: 1.05 * weights[name]}, "linear_2.weight is not that of --model"),
        ({name: weights[name][:, 1:]}, rf"tensor {name} is \[24, 23\]"),
        ({name + "s": weights[name]}, f"holds the tensor {name}s"),
    ):
        torch.save(weights | change, beside)
        with pytest.raises(UserError, match=rf"mm_projector\.bin.*{said}"):
            read_pclr([path], base)
    beside.write_bytes(b"")
    with pytest.raises(UserError, match=r"mm_projector\.bin is truncated"):
        read_pclr([path], base)


def test_tasks_and_models_that_do_not_fit_are_refused(empty, tmp_path):
    path = written(tmp_path, content({"static": 7}))
    for tasks in (["a", "b"], ["a", "b", "b"], []):
        with pytest.raises(UserError, match="holds 3 tasks and the names given are"):
            read_pclr([path], empty, tasks)
    with pytest.raises(UserError, match="2 are given"):
        read_pclr([path, path], empty)
    text = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(**text))
    with pytest.raises(UserError, match="LlamaForCausalLM has no vision tower"):
        read_pclr([path], llama)


# --- the command ----------------------------------------------------------------------------------------------------------


def test_the_command_makes_a_bank_that_eval_and_generate_can_load(lilora, llava_folder, base, tmp_path):
    saved, inputs, out = content({"static": 7, "train": 2, "share": 2}), batch(), tmp_path / "runs" / "bank"
    command = ("bank", "import", "pclr", written(tmp_path, saved), "--model", llava_folder, "--out", out)
    code, printed, error = lilora(*command, "--tasks", "a,b,c", "--json")
    assert code == 0, error
    shown = json.loads(printed)
    assert [task["name"] for task in shown["tasks"]] == ["a", "b", "c"]
    assert (shown["path"], len(shown["notes"]), len(shown["shared"])) == (str(out), 1, 1)
    assert shown["config"]["settings"]["newest_switch"] == 3
    assert shown["config"]["image_aspect"] == "pad", "as LLaVA's scripts have it"
    assert shown["shared"][0]["parameters"] == sum(tensor.numel() for tensor in saved.values())
    _, method, processor = load_bank(out, None, "cpu")
    agree(method.model.eval(), base, saved, inputs)
    picture = tmp_path / "wide.png"
    Image.new("RGB", (20, 10)).save(picture)
    assert [image.size for image in images_for(processor, [picture])] == [(20, 20)]
    assert [path.name for path in out.parent.iterdir()] == ["bank"]

    code, _, error = lilora(*command)
    assert (code, "already exists" in error) == (2, True)


@pytest.mark.parametrize("problem", ["tensor", "name", "method", "rank"])
def test_the_command_writes_nothing_when_it_fails(lilora, llava_folder, tmp_path, problem):
    saved, tasks, out = content({"static": 7}), "a,b,c", tmp_path / "runs" / "bank"
    config = {"llm_top_rank": 300} if problem == "rank" else {}
    if problem == "tensor":
        saved.pop("task_vit_query_pool")
    path = written(tmp_path, saved, **config)
    arguments = ("--model", llava_folder, "--out", out, "--tasks", "a,b,c d" if problem == "name" else tasks)
    code, printed, error = lilora("bank", "import", "lora" if problem == "method" else "pclr", path, *arguments)
    said = {
        "tensor": "state.queries.vision",
        "name": "c d",
        "method": "SOURCE lora is unknown; choose one of lilora, pclr, dac, peft",
        "rank": "cap is 256",
    }
    assert (code, printed.strip()) == (2, "")
    (sentence,) = [line for line in error.splitlines() if line.startswith("lilora: ")]
    assert said[problem] in sentence
    assert not out.exists()
    assert not out.parent.exists() or not any(out.parent.iterdir())
