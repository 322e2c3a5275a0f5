"""Files written by an earlier version are read: fixtures/101248d holds what that commit wrote.

run: `lilora train` on the tiny suite (r 8, sub-rank 4), stopped in the third of its tasks; peft: two tasks of `base`, saved by
PEFT; expected.safetensors: inputs, and the logits that commit computed for a mixed batch of each.
"""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import lilora.cli as cli
from lilora.bank.bank import Bank
from lilora.continual.base_model import load_bank

WRITTEN = Path(__file__).parent.parent / "fixtures/101248d"


@pytest.fixture(scope="module")
def expected():
    return load_file(WRITTEN / "expected.safetensors")


def test_a_bank(suite, expected):
    _, method, _ = load_bank(WRITTEN / "run", str(suite / "base"), "cpu")
    inputs = {name: expected[name] for name in ("input_ids", "pixel_values")}
    with torch.no_grad():
        got = method.model.eval()(**inputs, task_ids=["colour", "count"]).logits
    torch.testing.assert_close(got, expected["logits"], rtol=1e-4, atol=1e-4)


def test_a_peft_folder(expected):
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(WRITTEN / "base"), WRITTEN / "peft/one", "one")
    model.load_adapter(WRITTEN / "peft/two", "two")
    with torch.no_grad():
        got = model(input_ids=expected["peft_ids"], task_ids=["two", None, "one"]).logits
    torch.testing.assert_close(got, expected["peft_logits"], rtol=1e-4, atol=1e-5)


def test_an_interrupted_run_goes_on(suite, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(WRITTEN / "run", run)
    # The base model lies elsewhere here: the file says where, under its checksum.
    data = json.loads((run / "bank/bank.json").read_bytes())
    data["index"]["base_model"]["id"] = data["index"]["config"]["model"] = str(suite / "base")
    data["checksum"] = hashlib.sha256(json.dumps(data["index"]).encode()).hexdigest()
    (run / "bank/bank.json").write_text(json.dumps(data))
    before = {task: Bank.open(run / "bank").task_fingerprint(task) for task in ("colour", "count")}
    options = ["--r", "8", "--sub-rank", "4", "--alpha", "16", "--dropout", "0.1", "--lr", "0.01", "--max-steps", "4"]
    options += ["--batch-size", "4", "--gradient-accumulation", "1", "--save-steps", "2", "--device", "cpu", "--quiet"]
    cli.app(["train", str(suite / "tasks.yaml"), "--out", str(run), *options], standalone_mode=False)
    assert "passed over" not in capsys.readouterr().err
    bank = Bank.open(run / "bank")
    assert bank.tasks == ["colour", "count", "name"]
    assert {task: bank.task_fingerprint(task) for task in before} == before
