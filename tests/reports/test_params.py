import io
import json
import random
import re
import shlex
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import transformers
from peft import get_peft_model
from rich.console import Console
from torch import nn

from lilora.errors import UserError
from lilora.methods import METHODS, Stage, make_method
from lilora.peft.config import LiLoRAConfig
from lilora.reports.params import account, count, mib

TEXT = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
}
TOWER = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


@pytest.fixture(scope="module")
def llava():
    return account("llava-1.5-7b", projector=True)


def test_published_table_of_llava_1_5_7b(llava):
    """The paper's figures (MiB at bf16, six tasks) within 0.1 %."""
    assert llava.linears == 98
    assert mib(llava.lora_per_task) == pytest.approx(357.3, rel=1e-3)
    assert mib(llava.total("dirlora", 6)) == pytest.approx(2143.9, rel=1e-3)
    assert mib(llava.per_task) == pytest.approx(104.6, rel=1e-3)
    assert mib(llava.total("lilora", 6)) == pytest.approx(985.1, rel=1e-3)
    assert (llava.shared_a, llava.shared_b0, llava.per_task) == (79_298_560, 108_003_328, 54_804_578)
    assert llava.base == 7_063_427_072


def test_counts_are_the_sizes_of_the_tensors():
    rng = random.Random(0)
    widths = [rng.randint(1, 40) for _ in range(5)]
    r, sub_rank, tasks = rng.randint(1, 9), rng.randint(1, 9), rng.randint(2, 7)
    layers = nn.Sequential(*(nn.Linear(k, n) for k, n in pairwise(widths)))
    got = count(layers, r"[013]", r, sub_rank)
    a = b0 = own = 0
    for i in (0, 1, 3):
        n, k = layers[i].weight.shape
        a, b0 = a + torch.empty(r, k).numel(), b0 + torch.empty(n, r).numel()
        own += sum(t.numel() for t in (torch.empty(n, sub_rank), torch.empty(sub_rank, r), torch.empty(1)))
    assert (got.linears, got.shared_a, got.shared_b0, got.per_task, got.lora_per_task) == (3, a, b0, own, a + b0)
    assert got.total("lilora", tasks) == a + b0 + tasks * own
    assert got.total("dirlora", tasks) == tasks * (a + b0)
    assert got.total("lora", tasks) == a + b0


def test_local_folder_table_and_json(tmp_path):
    transformers.LlavaConfig(
        text_config={"model_type": "llama", **TEXT}, vision_config={"model_type": "clip_vision_model", **TOWER}
    ).save_pretrained(tmp_path)
    got = account(str(tmp_path), r=4, sub_rank=2)
    assert got.linears == 6
    assert account(str(tmp_path), target_modules=r".*lm_head").linears == 1
    saved = json.loads(json.dumps(got.to_dict(tasks=3)))
    assert saved["total"]["lilora"] == got.total("lilora", 3)
    assert saved["mib_bf16"]["per_task"] == pytest.approx(got.per_task * 2 / 1024**2)
    console = Console(file=io.StringIO(), width=80)
    console.print(account("llava-1.5-7b", projector=True).table(tasks=6))
    assert all(text in console.file.getvalue() for text in ("104.5 MiB", "984.4 MiB", "2,143.5 MiB", "45.9%"))
    dac = next(line for line in console.file.getvalue().splitlines() if "dac" in line)
    assert re.sub(r"[^\w.%]+", " ", dac).split() == ["dac", "0", "0.0%"]


@pytest.mark.parametrize(
    "config, linears",
    [
        (transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=32), 4),  # Conv1D, whose weight is [K, N]
        (transformers.LlamaConfig(**TEXT), 6),
    ],
    ids=["gpt2", "llama"],
)
def test_the_layers_chosen_are_printed_as_a_shell_takes_them(tmp_path, lilora, config, linears):
    config.save_pretrained(tmp_path)
    code, out, err = lilora("params", "--model", tmp_path)
    assert code == 0, err
    adapters, *options = shlex.split(out.splitlines()[-1])
    assert (adapters, options[0]) == ("adapters:", "--set")
    code, out, _ = lilora("params", "--model", tmp_path, "--json", *options)
    counted = json.loads(out)
    assert (code, counted["linears"]) == (0, linears)
    assert options[1] == f"target_modules={counted['target_modules']}"
    code, out, _ = lilora("params", "--model", tmp_path, "--json", "--set", r"target_modules=.*\.(0|1)\..*")
    assert json.loads(out)["linears"] == {"gpt2": 8, "llama": 14}[config.model_type]


@pytest.mark.parametrize(
    "setting, sentence",
    [
        (
            "target_modules=(",
            "target_modules is '(', which is no regular expression (missing ), unterminated subpattern",
        ),
        ("cap=3", "--set cap=3 is not for params; it takes target_modules=REGULAR-EXPRESSION, experts=true, "),
        ('target_modules=["up"]', "it takes target_modules=REGULAR-EXPRESSION, experts=true, "),
    ],
)
def test_other_settings_are_one_sentence(lilora, setting, sentence):
    code, _, err = lilora("params", "--set", setting)
    assert code == 2
    assert sentence in " ".join(err.split())


@pytest.mark.parametrize(
    "config",
    [None, "{", "{}", '{"model_type": "llava", "text_config": {"hidden_size": "x"}}'],
)
def test_a_folder_without_a_usable_config_is_one_sentence(tmp_path, config):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=re.escape(str(tmp_path)) + ".*give a shipped name") as caught:
        account(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("nothing", 4, 2), "matches no linear layer"),
        (("0", 0, 2), "r is 0"),
        (("0", 4, -1), "sub_rank is -1"),
        (("0", 4, 5), "sub_rank is 5 and r is 4"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(UserError, match=words):
        count(nn.Sequential(nn.Linear(3, 3)), *arguments)


SMALL = {"lilora": {"sub_rank": 2}, "moelora": {"experts": 2}, "dac": {"active": 2, "merged": 2, "critical": 2}}


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("pclr", "proglora", "eproj", "loda")])
def test_what_inference_keeps_is_what_the_methods_tensors_are(name):
    """By the tensors of a method with one task and with two."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 5)
            self.config, self.device = {"model_type": "none"}, torch.device("cpu")

        def forward(self, x):
            return self.down(self.up(x))

    sizes = {} if name == "zero-shot" else {"r": 4}
    settings = sizes | {"target_modules": "up|down"} | SMALL.get(name, {})
    method = make_method(name, Model(), settings)
    measured = []
    for task in ("one", "two"):
        method.begin(Stage("learn", task), lambda samples, size=None: iter(()))
        measured.append(method.parameters())
    once, own = method.inference_parameters(method.read_settings(settings), [(8, 6), (5, 8)])
    assert measured == [once + own, once + 2 * own]


@pytest.fixture(scope="module")
def experts_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe")
    sizes = {name: size for name, size in TEXT.items() if name != "intermediate_size"}
    transformers.Qwen3MoeConfig(**sizes, num_experts=4, moe_intermediate_size=6, head_dim=4).save_pretrained(folder)
    return folder


def test_experts_count_as_many_times_as_they_are(experts_folder):
    bare = account(str(experts_folder), r=4, sub_rank=2)
    got = account(str(experts_folder), r=4, sub_rank=2, expert_ranks=(2, None))
    assert bare.experts == 0
    assert (got.experts, got.expert_r, got.expert_sub_rank) == (2 * 2 * 4, 2, 1)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(experts_folder))
    config = LiLoRAConfig(r=4, sub_rank=2, experts=True, expert_r=2)
    model = get_peft_model(model, config, adapter_name="a")
    sizes = {kind: sum(p.numel() for n, p in model.named_parameters() if f".lilora_{kind}." in n) for kind in "ABUV"}
    fusions = sum(p.numel() for n, p in model.named_parameters() if ".lilora_fusion." in n)
    assert (got.shared_a, got.shared_b0) == (sizes["A"], sizes["B"])
    assert got.per_task == sizes["U"] + sizes["V"] + fusions == bare.per_task + got.experts_per_task
    assert got.lora_per_task == sizes["A"] + sizes["B"]
    assert got.kept == {"lilora": (sizes["A"] + sizes["B"], got.per_task)}
    assert "16 adapted expert linears, r 2, sub_rank 1" in got.table(3).title


def test_the_figures_of_the_page_on_families_for_a_model_of_30_billion(tmp_path):
    """Sizes as published for Qwen3-30B-A3B."""
    sizes = {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4}
    experts = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "head_dim": 128}
    transformers.Qwen3MoeConfig(vocab_size=151936, **sizes, **experts).save_pretrained(tmp_path)
    for ranks, millions in (((8, 4), 88), ((128, 64), 1510)):
        got = account(str(tmp_path), r=8, expert_ranks=ranks)
        assert got.experts_per_task / 1e6 == pytest.approx(millions, rel=0.01)
    assert got.base / 1e9 == pytest.approx(30.5, rel=0.01)


def test_many_parameters_of_experts_are_warned_of(experts_folder, lilora):
    got = account(str(experts_folder), r=4, sub_rank=2, expert_ranks=(4, 3))
    assert got.warning == got.to_dict(2)["warning"]
    assert re.fullmatch(r"a task takes .* each of 16 expert linears .*; lower expert_sub_rank, which is 3", got.warning)
    assert replace(got, base=10**6).warning is None
    assert account(str(experts_folder), r=4, sub_rank=2).warning is None
    options = ["--r", "4", "--set", "experts=true", "--set", "expert_r=4", "--set", "expert_sub_rank=3"]
    code, out, _ = lilora("params", "--model", experts_folder, *options)
    assert code == 0
    assert f"Warning: {got.warning}." in out
    code, _, err = lilora("params", "--model", experts_folder, "--set", "expert_rank=3")
    assert code == 2
    assert (
        "--set expert_rank=3 is not for params; it takes target_modules=REGULAR-EXPRESSION, experts=true, expert_r"
        in err
    )
    with pytest.raises(UserError, match="LlavaForConditionalGeneration has no routed experts"):
        account("llava-1.5-7b", expert_ranks=(8, 4))
