"""TRL's trainers on a LiLoRA model, three steps each, and what they take as the reference."""

import math

import pytest
import torch
import transformers
from peft import get_peft_model
from support.habits import MLP, randomise, settings
from support.word_tokenizer import word_tokenizer

from lilora.errors import UserError

trl = pytest.importorskip(
    "trl", reason="TRL is not installed: pip install trl, which brings datasets, pandas and pyarrow"
)
datasets = pytest.importorskip("datasets")

WORDS = [*"abcdefgh", "yes", "no"]
PROMPTS = ["a b c", "d e f"]
SFT = [
    {"prompt": prompt, "completion": f" {answer} g h"} for prompt, answer in zip(PROMPTS, ("yes", "no"), strict=True)
]
DPO = [{"prompt": prompt, "chosen": " yes g", "rejected": " no"} for prompt in PROMPTS]


def tokenizer():
    return word_tokenizer(WORDS)


def base():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(tokenizer()),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def config(**changes):
    return settings(task_type="CAUSAL_LM", target_modules=MLP, **changes)


def later_task(**changes):
    """A model whose second task, `default`, trains alone; A and B0 belong to the first."""
    model = get_peft_model(base(), config(**changes), adapter_name="first")
    model.add_adapter("default", config(**changes))
    randomise(model)
    model.set_adapter("default")
    return model


def options(folder, **more):
    plain = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "weight_decay": 0.0, "save_strategy": "no"}
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "bf16": False}
    return {"output_dir": str(folder), "max_steps": 3, "learning_rate": 1e-2, **plain, **quiet, **more}


def dpo(model, folder, **more):
    arguments = trl.DPOConfig(**options(folder, per_device_train_batch_size=2))
    rows = datasets.Dataset.from_list(DPO)
    return trl.DPOTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer(), **more)


def grpo(model, folder, **more):
    sizes = {"per_device_train_batch_size": 2, "num_generations": 2, "max_completion_length": 4}
    return trl.GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=trl.GRPOConfig(**options(folder, beta=0.1, **sizes)),
        train_dataset=datasets.Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=tokenizer(),
        **more,
    )


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def moved(model, before):
    return {name.split(".")[-1] for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("how", ["peft_config", "second task"])
def test_sft_trains_as_a_loop_does(how, tmp_path):
    def made():
        torch.manual_seed(1)
        return later_task() if how == "second task" else get_peft_model(base(), config())

    more = {} if how == "second task" else {"peft_config": config()}
    torch.manual_seed(1)
    trainer = trl.SFTTrainer(
        made() if how == "second task" else base(),
        args=trl.SFTConfig(**options(tmp_path, per_device_train_batch_size=2)),
        train_dataset=datasets.Dataset.from_list(SFT),
        processing_class=tokenizer(),
        **more,
    )
    model, before = made(), values(trainer.model)
    model.load_state_dict(trainer.model.state_dict())
    trainer.train()
    assert moved(trainer.model, before) == {"default"}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    prompts, answers = ([tokenizer()(row[key])["input_ids"] for row in SFT] for key in ("prompt", "completion"))
    x = torch.tensor([prompt + answer + [2] for prompt, answer in zip(prompts, answers, strict=True)])
    labels = x.clone()
    labels[:, :3] = -100
    wanted = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(input_ids=x, labels=labels).loss
        loss.backward()
        optimizer.step()
        wanted.append(loss.item())
    assert logged(trainer, "loss") == pytest.approx(wanted, abs=1e-4)  # it logs four digits
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trainer.model.get_parameter(name), parameter, rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [dpo, grpo])
@pytest.mark.parametrize("how", ["peft_config", "second task"])
def test_the_reference_is_the_model_as_it_was(make, how, tmp_path):
    more = {} if how == "second task" else {"peft_config": config()}
    trainer = make(later_task() if how == "second task" else base(), tmp_path, **more)
    before = values(trainer.model)
    trainer.train()
    assert moved(trainer.model, before) == {"default"}
    if make is dpo:
        assert logged(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-4)
        assert logged(trainer, "loss")[2] < math.log(2)
    else:
        assert logged(trainer, "kl")[0] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("make", [dpo, grpo])
@pytest.mark.parametrize("preset", ["frozen", "paper"])
def test_a_reference_that_would_train_along_is_refused(make, preset, tmp_path):
    model = later_task(preset=preset) if preset == "paper" else get_peft_model(base(), config())
    tasks = list(model.peft_config)
    with pytest.raises(
        UserError, match=r"layers.0.mlp.gate_proj shares A and B0 with it, which train; give the trainer"
    ):
        make(model, tmp_path)
    assert list(model.peft_config) == tasks
    model.add_adapter("ref", config(preset=preset))  # by any other than TRL it is a task as others are
