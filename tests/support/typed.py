"""Small models under PEFT's typed wrappers, one for each task type."""

import copy

import torch
import transformers
from peft import get_peft_model

import lilora
from support.habits import randomise

HEADS = {
    "CAUSAL_LM": transformers.LlamaForCausalLM,
    "FEATURE_EXTRACTION": transformers.LlamaModel,
    "SEQ_2_SEQ_LM": transformers.T5ForConditionalGeneration,
    "SEQ_CLS": transformers.LlamaForSequenceClassification,
    "TOKEN_CLS": transformers.LlamaForTokenClassification,
    "QUESTION_ANS": transformers.LlamaForQuestionAnswering,
}


def typed(kind, folder=None):
    """A small model of a task type with the random tasks a and b, a active; its base model in `folder`, if given."""
    torch.manual_seed(0)
    if kind == "SEQ_2_SEQ_LM":
        config = transformers.T5Config(
            vocab_size=50,
            d_model=16,
            d_ff=32,
            d_kv=8,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
        targets = ["wi", "wo"]
    else:
        config = transformers.LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=0,
        )
        targets = ["gate_proj", "up_proj", "down_proj"]
    base = HEADS[kind](config).double()
    if folder is not None:
        base.save_pretrained(folder)
    made = lilora.LiLoRAConfig(r=4, sub_rank=2, dropout=0.0, target_modules=targets, task_type=kind)
    model = get_peft_model(base, made, adapter_name="a")
    model.add_adapter("b", copy.deepcopy(made))
    randomise(model)
    model.set_adapter("a")
    return model.eval()


def first(model, x, **options):
    """The first output: logits, or of FEATURE_EXTRACTION hidden states."""
    more = {"decoder_input_ids": x} if isinstance(model.get_base_model(), transformers.T5PreTrainedModel) else {}
    with torch.no_grad():
        return model(input_ids=x, **more, **options)[0]
