"""README's quickstart, run as written but for the size of the model."""

import re
from pathlib import Path

import torch
from transformers import AutoProcessor


def test_readme_quickstart_runs(suite):
    text = (Path(__file__).parents[2] / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = code.replace('"llava-hf/llava-1.5-7b-hf"', repr(str(suite / "base")))
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
