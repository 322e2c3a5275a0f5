"""Language models without images: trained by manifests whose records have none, evaluated, exported and merged like others."""

import json
import shlex
import shutil

import pytest
import torch
import yaml
from peft import PeftModel
from support.word_tokenizer import word_tokenizer
from transformers import AutoModelForCausalLM, Florence2Config, LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, T5Config

from lilora.bank.bank import Bank
from lilora.continual.base_model import load_bank

WORDS = [
    *["which", "colour", "is", "it", "how", "many", "are", "there", "one", "two", "three", "red", "green", "blue"],
    ":",
    "?",
]
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }} {% if message['role'] == 'assistant' %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}: {% endif %}"
)
TASKS = {"colour": ("which colour is it ?", "red"), "count": ("how many are there ?", "two")}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """The folder of a suite of two tasks, as JSON lines of messages, with a tiny Llama."""
    folder = tmp_path_factory.mktemp("texts")
    torch.manual_seed(0)
    tokenizer = word_tokenizer(WORDS, chat_template=TEMPLATE)
    tokenizer.save_pretrained(folder / "base")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    for task, (question, answer) in TASKS.items():
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for split in ("train", "test"):
            lines = [json.dumps({"id": str(i), "messages": turns}) for i in range(8)]
            (folder / f"{task}-{split}.jsonl").write_text("\n".join(lines))
    tasks = [
        {"name": n, "train": f"{n}-train.jsonl", "test": f"{n}-test.jsonl", "scorer": "exact", "max_new_tokens": 3}
        for n in TASKS
    ]
    (folder / "tasks.yaml").write_text(yaml.safe_dump({"name": "texts", "model": "./base", "tasks": tasks}))
    return folder


OPTIONS = shlex.split("--r 8 --max-steps 30 --batch-size 4 --gradient-accumulation 1 --lr 0.02 --device cpu --quiet")


def trained(texts, out, lilora, *options):
    code, _, err = lilora("train", texts / "tasks.yaml", "--out", out, *OPTIONS, *options)
    assert code == 0, err
    return out


@pytest.fixture
def run(texts, tmp_path, lilora):
    return trained(texts, tmp_path / "run", lilora)


def test_a_run_is_trained_resumed_and_evaluated(run, texts, lilora):
    assert Bank.open(run / "bank").config["kind"] == "text"
    code, out, _ = lilora("eval", run, "--tasks", texts / "tasks.yaml", "--device", "cpu", "--json")
    assert code == 0
    assert '"colour"' in out
    assert trained(texts, run, lilora) == run  # nothing left to do


def test_tasks_answer_each_for_itself_and_are_found_by_the_prompt(run, lilora):
    for task, (question, answer) in TASKS.items():
        code, out, _ = lilora(
            "generate", run, "--task", task, "--prompt", question, "--max-new-tokens", "3", "--device", "cpu"
        )
        assert (code, out.split()[0]) == (0, answer)
        code, out, err = lilora("generate", run, "--prompt", question, "--device", "cpu")
        assert code == 0
        assert f"task: {task}" in err


def test_export_and_merge_give_what_the_bank_gives(run, texts, tmp_path, lilora):
    _, method, processor = load_bank(run, device="cpu")
    method.model.eval()
    inputs = processor(["which colour is it ? :"], return_tensors="pt")
    with torch.no_grad():
        wanted = method.model(**inputs, task_ids=["count"]).logits
        assert lilora("bank", "export", run, "--task", "count", "--out", tmp_path / "lora")[0] == 0
        assert "AutoModelForCausalLM" in (tmp_path / "lora/README.md").read_text()
        base = AutoModelForCausalLM.from_pretrained(texts / "base")
        plain = PeftModel.from_pretrained(base, tmp_path / "lora")
        torch.testing.assert_close(plain(**inputs).logits, wanted, rtol=0, atol=1e-4)
        assert lilora("bank", "merge", run, "--task", "count", "--out", tmp_path / "merged")[0] == 0
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(merged(**inputs).logits, wanted, rtol=0, atol=1e-4)


def test_routed_experts_are_trained_exported_and_merged(texts, tmp_path, lilora):
    suite = tmp_path / "suite"
    shutil.copytree(texts, suite)
    config = Qwen3MoeConfig(
        vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(suite / "base")
    run = trained(suite, tmp_path / "run", lilora, "--set", "experts=true", "--set", "expert_r=4")
    test_export_and_merge_give_what_the_bank_gives(run, suite, tmp_path, lilora)
    assert "model.layers.0.mlp.experts.down_proj.U" in Bank.open(run / "bank").load_task("count")[0]


@pytest.mark.parametrize("method", ["lora", "ewc", "lwf", "olora", "moelora"])
def test_other_methods_train_text_models_too(method, texts, tmp_path, lilora):
    trained(texts, tmp_path / "run", lilora, "--method", method, "--max-steps", "2")
    assert Bank.open(tmp_path / "run/bank").tasks == list(TASKS)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"image": "a.png"}, "a.png"),
        ({}, "LlamaForCausalLM has no vision tower of transformer blocks"),
    ],
)
def test_what_a_text_model_cannot_do_is_one_sentence(change, sentence, texts, tmp_path, lilora):
    options = [] if change else ["--method", "pclr"]
    data = tmp_path / "data"
    data.mkdir()
    for file in texts.glob("*.jsonl"):
        rows = [json.dumps(json.loads(line) | change) for line in file.read_text().splitlines()]
        (data / file.name).write_text("\n".join(rows))
    (data / "tasks.yaml").write_text((texts / "tasks.yaml").read_text().replace("./base", str(texts / "base")))
    code, _, err = lilora("train", data / "tasks.yaml", "--out", tmp_path / "run", *OPTIONS, *options)
    assert code == 2
    assert sentence in err.splitlines()[-1]


@pytest.mark.parametrize(
    "config",
    [T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=1, vocab_size=9), Florence2Config()],
    ids=["text", "images"],
)
def test_an_encoder_decoder_is_refused_in_a_sentence(config, texts, tmp_path, lilora):
    config.save_pretrained(tmp_path / "base")
    code, _, err = lilora(
        "train", texts / "tasks.yaml", "--out", tmp_path / "run", *OPTIONS, "--model", tmp_path / "base"
    )
    assert (code, "Traceback" in err) == (2, False)
    assert f"of type '{config.model_type}', an encoder-decoder, which lilora train does not take; adapt it" in err
    assert not list(tmp_path.glob("run/*"))
