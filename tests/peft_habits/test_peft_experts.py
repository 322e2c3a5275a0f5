"""LiLoRAConfig(experts=True): routed experts adapted through PEFT, on tiny models in fp64."""

import json
import warnings

import pytest
import torch
import transformers
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from support import families
from support.experts import MODELS, TASKS, adapted, base, ids, plain, randomise, settings

import lilora
from lilora.bank.bank import Bank
from lilora.bank.export import export_lora, write_lora
from lilora.bank.index import BaseModelId
from lilora.errors import UserError
from lilora.importers.peft_folder import read_peft, write_peft
from lilora.methods.lilora import LiLoRA
from lilora.methods.stability import StabilityLoss
from lilora.peft.layer import ExpertLinear, adapted_layers

MIXED = ["a", "b", None, "c"]


@torch.no_grad()
def logits(model, **options):
    return model(input_ids=ids(), **options).logits


@pytest.fixture(scope="module")
def model():
    return adapted("qwen3_moe")


@pytest.mark.parametrize("name", MODELS)
def test_a_mixed_batch_is_that_of_single_tasks(name):
    model = adapted(name)
    assert sum(isinstance(layer, ExpertLinear) for layer in adapted_layers(model).values()) == 4
    mixed = logits(model, task_ids=MIXED)
    for i, task in enumerate(MIXED):
        with torch.no_grad():
            alone = model(input_ids=ids()[i : i + 1], task_ids=[task]).logits
            torch.testing.assert_close(mixed[i : i + 1], alone, rtol=0, atol=1e-12)
            assert (model(input_ids=ids()[i : i + 1], task_ids=[MIXED[i - 1]]).logits - alone).abs().max() > 0.1
    torch.testing.assert_close(mixed[2:3], logits(base(name))[2:3], rtol=0, atol=1e-12)
    with torch.no_grad():
        made = [
            model.generate(input_ids=ids(), task_ids=MIXED, max_new_tokens=4, num_beams=n, do_sample=False)
            for n in (1, 2)
        ]
        own = [
            model.generate(input_ids=ids()[i : i + 1], task_ids=[task], max_new_tokens=4, num_beams=n, do_sample=False)
            for n in (1, 2)
            for i, task in enumerate(MIXED)
        ]
    assert torch.equal(torch.cat(made), torch.cat(own))


def test_a_model_that_sees_images():
    """qwen3_vl_moe: rows of its experts are tokens, whatever a sample has of images."""
    model = plain(families.base("qwen3_vl_moe"))
    model = adapted("", model=model, tasks=families.TASKS)
    samples = families.batch("qwen3_vl_moe", [[0], [], [1, 2]])
    families.rows_are_those_of_single_tasks(model, samples, families.TASKS)


def test_names_and_settings_stay_what_they_are_without_experts():
    model = get_peft_model(base("mixtral"), lilora.LiLoRAConfig(r=4), adapter_name="a")
    assert all(".mlp.experts" not in name for name in adapted_layers(model))
    assert not any("lilora" in type(m).__module__ for n, m in model.named_modules() if n.endswith("experts"))


def test_training_two_tasks_at_once_and_with_checkpoints():
    """Gradients with dropout are the same when layers are recomputed; a step changes the tasks of the batch alone."""
    found = []
    for checkpointing in (False, True):
        model = adapted("qwen3_moe", dropout=0.3, train_a="always", train_b0="always").train()
        if checkpointing:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        model.base_model.set_adapter(["a", "b"])
        torch.manual_seed(7)
        model(input_ids=ids(), labels=ids(), task_ids=["a", "b", "b", None]).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    experts = [name for name in found[0] if ".experts." in name]
    assert len(experts) == 4 * (2 + 2 * 3)
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-12)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved >= {name for name in experts if found[0][name].any()}
    assert not any(name.endswith(".c") for name in moved)
    with pytest.raises(ValueError, match="the batch has samples of task 'c', and \\['a', 'b'\\] train"):
        model(input_ids=ids(), task_ids=["a", "b", "b", "c"])


def test_the_stability_loss_holds_the_basis_of_experts():
    model = adapted("qwen3_moe", train_b0="always")
    layers = adapted_layers(model)
    model.set_adapter("b")
    loss = StabilityLoss(layers, "b", 1.0)
    assert loss() == 0
    with torch.no_grad():
        for layer in layers.values():
            layer.lilora_B["b"].add_(torch.randn_like(layer.lilora_B["b"]))
    loss().backward()
    assert all(layer.lilora_B["b"].grad.abs().sum() > 0 for layer in layers.values())


def test_dropout_drops_in_training_alone(model):
    wet = adapted("qwen3_moe", dropout=0.5)
    torch.testing.assert_close(logits(wet, task_ids=MIXED), logits(model, task_ids=MIXED), rtol=0, atol=1e-12)
    wet.train().base_model.set_adapter(TASKS)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(logits(wet, task_ids=MIXED))
    assert torch.equal(drawn[0], drawn[1])
    assert (drawn[0] - drawn[2])[[0, 1, 3]].abs().amax((1, 2)).min() > 1e-3
    torch.testing.assert_close(drawn[0][2], drawn[2][2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("low", [False, True], ids=["", "low_cpu_mem_usage"])
def test_saved_tasks_are_the_same_in_another_model(name, low, tmp_path):
    model = adapted(name)
    wanted = logits(model, task_ids=MIXED)
    model.save_pretrained(tmp_path)
    options = {"autocast_adapter_dtype": False, "low_cpu_mem_usage": low}
    other = PeftModel.from_pretrained(base(name), tmp_path / "a", adapter_name="a", **options)
    for task in TASKS[1:]:
        other.load_adapter(tmp_path / task, task, **options)
    torch.testing.assert_close(logits(other.eval(), task_ids=MIXED), wanted, rtol=0, atol=1e-12)
    assert json.loads((tmp_path / "a/adapter_config.json").read_text())["expert_r"] == 4
    later = PeftModel.from_pretrained(base(name), tmp_path / "b", adapter_name="b", is_trainable=True, **options)
    trains = {name for name, p in later.named_parameters() if p.requires_grad}
    assert not any("lilora_A" in name for name in trains), "b is not the first of its chain"
    assert any("experts.down_proj.lilora_U" in name for name in trains)
    randomise(other)
    with torch.no_grad():
        for path, layer in adapted_layers(other).items():  # of one chain again
            for kind in ("lilora_A", "lilora_B"):
                getattr(layer, kind)["a"].copy_(getattr(adapted_layers(model)[path], kind)["a"])
    lilora.hotswap(other, tmp_path / "b", "b")
    swapped = logits(other, task_ids=["b"] * 4)
    torch.testing.assert_close(swapped, logits(model, task_ids=["b"] * 4), rtol=0, atol=1e-12)


def test_transformers_loads_a_task(model, tmp_path):
    model.save_pretrained(tmp_path)
    other = base("qwen3_moe")
    other.load_adapter(str(tmp_path / "b"), adapter_name="b")
    model.set_adapter("b")
    torch.testing.assert_close(logits(plain(other)), logits(model), rtol=0, atol=1e-6)
    model.set_adapter("a")


def test_merge_unload_disable_and_delete():
    model = adapted("gpt_oss")
    model.set_adapter("b")
    one, bare = logits(model), logits(base("gpt_oss"))
    model.merge_adapter(safe_merge=True)
    assert all(layer.merged_task == "b" for layer in adapted_layers(model).values())
    torch.testing.assert_close(logits(model), one, rtol=0, atol=1e-10)
    with pytest.raises(RuntimeError, match="is merged into the base weight"):
        logits(model, task_ids=MIXED)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), one, rtol=0, atol=1e-10)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), bare, rtol=0, atol=1e-10)
    model.delete_adapter("a")
    torch.testing.assert_close(logits(model), one, rtol=0, atol=1e-10)
    merged = model.merge_and_unload()
    assert type(merged.model.layers[0].mlp.experts).__name__ == "GptOssExperts"
    assert not any("lilora" in name for name in merged.state_dict())
    torch.testing.assert_close(logits(merged), one, rtol=0, atol=1e-10)
    unloaded = adapted("gpt_oss").unload()
    torch.testing.assert_close(logits(unloaded), bare, rtol=0, atol=1e-10)


def test_offloaded_to_the_cpu_they_compute_what_they_did():
    model = adapted("gpt_oss")
    mixed = logits(model, task_ids=MIXED)
    cpu_offload(model, execution_device="cpu")
    torch.testing.assert_close(logits(model, task_ids=MIXED), mixed, rtol=0, atol=1e-12)
    assert model.base_model.model.model.layers[0].mlp.experts.base_layer.down_proj.is_meta
    with pytest.raises(RuntimeError, match=r"experts\.gate_up_proj is offloaded, so no task can be merged"):
        model.merge_adapter()


@pytest.mark.parametrize("name", MODELS)
def test_peft_loads_an_export_with_equal_logits(name, tmp_path):
    """As target_parameters, with the experts' own rank beside that of the linear layers."""
    model = adapted(name, dropout=0.1)
    export_lora(model, "b", tmp_path / "b")
    config = json.loads((tmp_path / "b/adapter_config.json").read_text())
    assert config["target_parameters"][0] == "model.layers.0.mlp.experts.down_proj"
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 6, 0.0)
    assert list(config["rank_pattern"].values()) == [6]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        other = PeftModel.from_pretrained(base(name), tmp_path / "b", autocast_adapter_dtype=False)
    model.set_adapter("b")
    torch.testing.assert_close(logits(other), logits(model), rtol=0, atol=1e-10)


def test_a_bank_keeps_exports_and_merges_them(tmp_path):
    chosen = {"r": 6, "alpha": 9.0, "dropout": 0.0, "experts": True, "expert_r": 4, "expert_sub_rank": 2}
    chosen["target_modules"] = r".*self_attn\.[qkvo]_proj"
    plain_base = base("mixtral", torch.float32)
    method = LiLoRA(base("mixtral", torch.float32), chosen)
    for task in ("a", "b"):
        method.add(task)
    torch.manual_seed(1)
    randomise(method.model)
    bank = Bank.create(tmp_path / "bank", config={"settings": chosen}, base_model=BaseModelId.of(plain_base, "tiny"))
    for task in ("a", "b"):
        bank.add_task(task, *method.tensors(task))
    bank = Bank.open(tmp_path / "bank")
    again = LiLoRA(base("mixtral", torch.float32), chosen)
    again.restore(bank.load_tasks())
    for own in (method, again):
        own.activate("b", train=False)
    wanted = logits(method.model.eval())
    assert torch.equal(logits(again.model.eval()), wanted)
    (tmp_path / "b").mkdir()
    write_lora(tmp_path / "b", LiLoRA.as_lora(bank, "b"), "tiny")
    other = PeftModel.from_pretrained(base("mixtral", torch.float32), tmp_path / "b")
    torch.testing.assert_close(logits(other), wanted, rtol=0, atol=1e-4)
    LiLoRA.merge(plain_base, bank, "b")
    torch.testing.assert_close(logits(plain_base), wanted, rtol=0, atol=1e-4)
    for task in ("a", "b"):
        (tmp_path / "peft" / task).mkdir(parents=True)
        write_peft(tmp_path / "peft" / task, *bank.load_task(task), bank.config["settings"], "tiny", task == "a")
    read = read_peft([tmp_path / "peft/a", tmp_path / "peft/b"], base("mixtral", torch.float32))
    for got, want in zip(read.tasks["b"], bank.load_task("b"), strict=True):
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)
    own, shared = bank.load_task("b")
    name = next(name for name in own if name.endswith("experts.down_proj.fusion"))
    with pytest.raises(UserError, match=r"down_proj\.fusion has shape \[3\] and B0 \[4, 16, 4\] wants \[4\]"):
        bank.add_task("c", {**own, name: own[name][:3]}, shared)


def test_a_task_that_cannot_be_added_leaves_nothing():
    model, wanted = base("qwen3_moe"), logits(base("qwen3_moe"))
    with pytest.raises(ValueError, match="task name 'no name' is not allowed"):
        get_peft_model(model, settings(), adapter_name="no name")
    with pytest.raises(ValueError, match="not found in the base model"):
        get_peft_model(model, settings(experts=False, target_modules=["nothing"]), adapter_name="a")
    assert type(model.model.layers[0].mlp.experts).__name__ == "Qwen3MoeExperts"
    model = get_peft_model(model, settings(target_modules=[]), adapter_name="a", autocast_adapter_dtype=False)
    assert all(isinstance(layer, ExpertLinear) for layer in adapted_layers(model).values())
    with pytest.raises(UserError, match="expert_sub_rank is 1, but the model's other tasks have 2"):
        model.add_adapter("b", settings(target_modules=[], expert_sub_rank=1))
    with pytest.raises(UserError, match="all tasks adapt the same layers"):
        model.add_adapter("b", settings(target_modules=[], exclude_modules=["layers.0.mlp.experts"]))
    assert {layer.tasks[0] for layer in adapted_layers(model).values()} == {"a"}
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-10)
    assert get_peft_model_state_dict(model, adapter_name="a")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"expert_r": 0}, "expert_r is 0; it must be an integer of at least 1"),
        ({"expert_r": 2, "expert_sub_rank": 3}, "expert_sub_rank is 3 and expert_r is 2, the most"),
        ({"experts": "yes"}, "experts is 'yes'; it must be true or false"),
        ({"layers_to_transform": [0]}, "layers_to_transform does not choose among experts; give exclude_modules"),
    ],
)
def test_settings_that_are_wrong(changes, words):
    with pytest.raises(UserError, match=words):
        settings(**changes)


def test_a_pattern_that_the_names_of_experts_match_too():
    model = adapted("mixtral", ["a", "b"], target_modules=r".*(q_proj|gate_up_proj)")
    kinds = [isinstance(layer, ExpertLinear) for layer in adapted_layers(model).values()]
    assert (kinds.count(True), kinds.count(False)) == (4, 2)


def test_models_without_routed_experts_say_so():
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
        )
    )
    with pytest.raises(
        UserError, match="experts is true, but LlamaForCausalLM has no routed experts to adapt of those"
    ):
        get_peft_model(llama, settings(), adapter_name="a")
    assert "lilora_tasks" not in llama.__dict__ or not llama.lilora_tasks.known
