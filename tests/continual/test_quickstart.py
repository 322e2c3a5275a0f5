"""README's Python, run as written but for the size of the model and the names of folders and tasks."""

import re
from pathlib import Path

import torch
from torch import nn
from transformers import AutoProcessor

README = (Path(__file__).parents[2] / "README.md").read_text()
QUICKSTART, STATIC, PLAIN, BANK, ROUTER = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_readme_quickstart_runs(suite):
    code = QUICKSTART.replace('"llava-hf/llava-1.5-7b-hf"', repr(str(suite / "base")))
    code = code.replace(', dtype="bfloat16", device_map="cuda"', "")
    assert "device_map" not in code
    processor = AutoProcessor.from_pretrained(suite / "base")
    image = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8).numpy()
    inputs = processor(text=["<image> name it ?"] * 3, images=[[image]] * 3, return_tensors="pt")
    names = {"inputs": inputs}
    exec(code, names)
    model = names["model"]
    assert list(model.peft_config) == ["scienceqa", "textvqa"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lilora_" in name:
                parameter.normal_(std=0.5)
    together = model(**inputs, task_ids=["textvqa", "scienceqa", None]).logits
    model.set_adapter("scienceqa")
    torch.testing.assert_close(together[1], model(**inputs).logits[1], rtol=1e-4, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 1e-2
    wanted = model.generate(**inputs, task_ids=["textvqa", "scienceqa", None])
    static = STATIC.replace("model.generate(", "got = model.generate(")
    exec(static, names)  # transformers compiles it on an accelerator alone: see tests/layers/test_compile.py
    assert torch.equal(names["got"], wanted)


def test_a_plain_layer_takes_tasks():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 8)

        def forward(self, x):
            return self.head(x)

    names = {"model": Model()}
    exec(PLAIN, names)
    model, x = names["model"], torch.randn(2, 8)
    nn.init.normal_(model.head.lilora_U["a"])
    with_task, without = model.eval()(x, task_ids=["a", None])
    torch.testing.assert_close(without, model.head.base_layer(x)[1])
    assert (with_task - model.head.base_layer(x)[0]).abs().max() > 1e-3


def test_a_bank_answers_in_python_and_finds_its_tasks(suite, tmp_path, lilora, train_options):
    run = tmp_path / "run"
    code, _, err = lilora("train", suite / "tasks.yaml", "--out", run, "--order", "colour,count", *train_options)
    assert code == 0, err
    processor = AutoProcessor.from_pretrained(suite / "base")
    image = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8).numpy()
    asked = ["<image> how many are there ?", "<image> which colour is it ?"]
    names = {"inputs": processor(text=asked, images=[[image]] * 2, return_tensors="pt", padding=True)}
    exec(BANK.replace("runs/cvit", str(run)).replace("TextVQA", "count").replace("ScienceQA", "colour"), names)
    exec(ROUTER, names)
    assert names["router"].route(names["inputs"]) == ["count", "colour"]
