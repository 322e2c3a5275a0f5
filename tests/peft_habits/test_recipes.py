"""What recipes around PEFT do: typed wrappers, parts compiled in place, offloading, copies by averaging weights."""

import copy
import tempfile

import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, PeftModelForCausalLM, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from safetensors.torch import load_file
from support.habits import adapted, assert_close, ids, llama, logits, of_task, settings, train
from support.typed import HEADS, first, typed
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import lilora
from lilora.errors import UserError
from lilora.peft.layer import adapted_layers


@pytest.mark.parametrize("argument", ["task_ids", "adapter_names"])
@pytest.mark.parametrize("kind", HEADS)
def test_typed_wrappers_take_task_ids(kind, argument):
    model, x = typed(kind), torch.randint(3, 50, (3, 5))
    mixed = first(model, x, **{argument: ["a", "b", "a"]})
    for task, rows in (("a", [0, 2]), ("b", [1])):
        model.set_adapter(task)
        assert_close(mixed[rows], first(model, x)[rows])
    with pytest.raises(ValueError, match="'fly' is unknown"):
        first(model, x, **{argument: ["a", "fly", "a"]})
    with pytest.raises(ValueError, match=r"task_ids has the shape \[2\]; it must be \[3\]"):
        first(model, x, **{argument: ["a", "b"]})
    if argument == "task_ids":
        assert torch.equal(first(model, x, task_ids=torch.tensor([0, 1, 0])), mixed)


@pytest.mark.parametrize("evaluate", [False, True])
def test_trainer_and_auto_model_carry_task_ids_through_a_typed_wrapper(evaluate, tmp_path):
    model = typed("CAUSAL_LM", tmp_path / "base")
    model.save_pretrained(tmp_path / "saved", selected_adapters=["a"])
    config = lilora.LiLoRAConfig.from_pretrained(tmp_path / "saved/a")
    config.base_model_name_or_path = str(tmp_path / "base")
    config.save_pretrained(tmp_path / "saved/a")
    assert isinstance(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved/a"), PeftModelForCausalLM)
    model.base_model.set_adapter(["a", "b"])
    rows = [{"input_ids": row, "labels": row, "task_ids": i % 2} for i, row in enumerate(torch.randint(3, 50, (4, 5)))]
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=1, per_device_train_batch_size=4, per_device_eval_batch_size=4, report_to=[], use_cpu=True
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    batch = {"input_ids": torch.stack([r["input_ids"] for r in rows]), "task_ids": torch.tensor([0, 1, 0, 1])}
    with torch.no_grad():
        wanted = model(**batch, labels=batch["input_ids"]).loss.item()
    if evaluate:
        assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted, rel=1e-6)
    else:
        before = {name: p.clone() for name, p in model.named_parameters()}
        assert trainer.train().training_loss == pytest.approx(wanted, rel=1e-6)
        moved = {name.split(".")[-1] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert {"a", "b"} <= moved


def test_ids_of_a_task_that_does_not_train_stop_a_training_step():
    model = typed("CAUSAL_LM").train()
    x = torch.randint(3, 50, (2, 5))
    with pytest.raises(
        ValueError, match=r"samples of task 'b', and \['a'\] train; make all tasks of a training batch active"
    ):
        model(input_ids=x, labels=x, task_ids=["b", "b"])


def test_averaged_weights_are_what_the_next_mixed_batch_sees():
    model, x = adapted("ab", llama(num_hidden_layers=1)).eval(), ids()
    names = (["a", "b"] * len(x))[: len(x)]
    logits(model, x, task_ids=names)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    average.update_parameters(model)
    before = logits(model, x, task_ids=names)
    for own, mean in zip(model.parameters(), average.module.parameters(), strict=True):
        own.data.copy_(mean.data)
    after = logits(model, x, task_ids=names)
    assert not torch.equal(after, before)
    for i, name in enumerate(names):
        assert_close(after[i], of_task(model, name, x)[i])


def test_saved_names_hold_no_wrapper_of_parts_compiled_in_place(tmp_path):
    model, x = adapted("ab", llama(num_hidden_layers=1)), ids()
    wanted, plain = of_task(model, "b", x), copy.deepcopy(model)
    layer = model.get_base_model().model.layers[0]
    layer.mlp = torch.compile(layer.mlp, backend="eager")
    assert all("_orig_mod" not in path for path in adapted_layers(model))
    model.save_pretrained(tmp_path)
    for one in (plain, model):
        one.delete_adapter("b")
        one.load_adapter(tmp_path / "b", "b")
        assert_close(of_task(one, "b", x), wanted)


# --- offloading by accelerate -----------------------------------------------------------------------------------------

OFFLOADED = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
OFFLOADED |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}


def dispatched(model, folder):
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    dispatch_model(base, OFFLOADED, main_device="cpu", offload_dir=folder)
    return model


OFFLOAD = {
    "cpu": lambda model, folder: cpu_offload(model, execution_device="cpu"),
    "disk": lambda model, folder: disk_offload(model, folder, execution_device="cpu"),
    "device_map": dispatched,
}


def mixed(model, x):
    return logits(model, x, task_ids=["a", "b", None])


def generated(model, x):
    return model.generate(input_ids=x, task_ids=["a", "b", None], max_new_tokens=3, do_sample=False)


def merged(model, x):
    model.merge_adapter(["b"])
    y = logits(model, x)
    model.unmerge_adapter()
    return torch.stack([y, logits(model.merge_and_unload(adapter_names=["b"]), x)])


def with_another_task(model, x):
    model.add_adapter("c", settings())
    model.delete_adapter("a")
    return logits(model, x, task_ids=["c", "b", None])


def frozen(model, x):
    lilora.freeze(model, capacity=3)
    return mixed(model, x)


def loaded_again(model, x):
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        lilora.hotswap(model, f"{folder}/a", "a")
        model.load_adapter(f"{folder}/b", "b")
    return mixed(model, x)


def exported(model, x):
    with tempfile.TemporaryDirectory() as folder:
        lilora.export_lora(model, "b", folder)
        return load_file(f"{folder}/adapter_model.safetensors").popitem()[1]


def trained(model, x):
    model.set_adapter("a")
    train(model, x, steps=2)
    return mixed(model, x)


USES = (mixed, generated, merged, with_another_task, frozen, loaded_again, exported, trained)


def run_on(model, x, use):
    torch.manual_seed(1)  # of what a new task draws
    return use(model, x)


@pytest.fixture(scope="module")
def offloadable(tmp_path_factory):
    """(a base model and its two tasks, the folder of each, inputs, what each use of the adapted model returns)."""
    torch.manual_seed(0)
    folder, x, base = tmp_path_factory.mktemp("offloadable"), ids(), llama()
    model = adapted("ab", copy.deepcopy(base))
    model.save_pretrained(folder / "tasks")
    base.save_pretrained(folder / "base")
    return base, model, folder, x, {use: run_on(copy.deepcopy(model), x, use) for use in USES}


def same(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9 if wanted.is_floating_point() else 0)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("how", OFFLOAD)
def test_offloaded_it_computes_what_it_did(offloadable, how, use, tmp_path):
    _, model, _, x, wanted = offloadable
    model = copy.deepcopy(model)
    OFFLOAD[how](model, str(tmp_path))
    assert next(p for n, p in model.named_parameters() if "layers.1" in n and "lilora_A" in n).is_meta
    same(run_on(model, x, use), wanted[use])


@pytest.mark.parametrize("how", OFFLOAD)
def test_a_base_that_is_offloaded_takes_tasks(offloadable, how, tmp_path):
    base, model, _, x, wanted = offloadable
    base = copy.deepcopy(base)
    OFFLOAD[how](base, str(tmp_path))
    other = get_peft_model(base, settings(), "a").eval()
    other.add_adapter("b", settings())
    values = dict(model.named_parameters())
    for name, own in other.named_parameters():
        if "lilora_" in name:
            own.data.copy_(values[name])
    for use in (mixed, generated, trained):
        same(run_on(other, x, use), wanted[use])


@pytest.mark.parametrize("memory", [{"max_memory": {"cpu": 20_000}}, {"device_map": "some"}], ids=["all", "some"])
def test_tasks_are_loaded_into_a_base_on_a_disk(offloadable, memory, tmp_path, monkeypatch):
    """PEFT dispatches the model anew, by files that do not name the parameters of LiLoRA as they are named."""
    monkeypatch.chdir(tmp_path)  # where PEFT writes some of them
    *_, folder, x, wanted = offloadable
    if "device_map" in memory:
        memory = {"device_map": {f"base_model.model.{name}": place for name, place in OFFLOADED.items()}}
    base = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "base", device_map=OFFLOADED, offload_folder=tmp_path / "base", dtype=torch.float64
    )
    model = PeftModel.from_pretrained(
        base, folder / "tasks/a", adapter_name="a", offload_folder=tmp_path / "model", **memory
    )
    model.load_adapter(folder / "tasks/b", "b")
    for use in (mixed, generated, merged):
        same(run_on(model.eval(), x, use), wanted[use])


def test_training_of_offloaded_parameters_says_that_an_optimizer_has_none(offloadable):
    _, model, _, x, _ = offloadable
    model = copy.deepcopy(model)
    cpu_offload(model, execution_device="cpu")
    with pytest.raises(RuntimeError, match=r"mlp.gate_proj: task 'a' trains, but its parameters are offloaded"):
        train(model, x)


def test_the_quickstart_on_a_transformers_model_is_the_same_through_every_door(tmp_path):
    """With and without a task type, loaded by AutoPeftModelForCausalLM, offloaded."""
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "base")
    x = ids()

    def quickstart(**changes):
        torch.manual_seed(1)
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
        config = settings("frozen", **changes)
        model = get_peft_model(base, config, adapter_name="scienceqa")
        train(model, x, steps=2)
        model.add_adapter("textvqa", config)
        model.set_adapter("textvqa")
        train(model, x, steps=2)
        return model.eval()

    def numbers(model):
        mixed = {"input_ids": x, "task_ids": ["textvqa", "scienceqa", None]}
        with torch.no_grad():
            return model(**mixed).logits, model.generate(**mixed, max_new_tokens=4, do_sample=False)

    wanted, typed = numbers(quickstart()), quickstart(task_type="CAUSAL_LM")
    typed.save_pretrained(tmp_path / "tasks")
    auto = AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "tasks/scienceqa", adapter_name="scienceqa", dtype=torch.float64
    )
    auto.load_adapter(tmp_path / "tasks/textvqa", "textvqa")
    offloaded = copy.deepcopy(auto)
    cpu_offload(offloaded, execution_device="cpu")
    for model in (typed, auto, offloaded):
        assert isinstance(model, PeftModelForCausalLM)
        for got, value in zip(numbers(model.eval()), wanted, strict=True):
            same(got, value)


def test_the_quickstart_on_plain_layers_is_the_same_offloaded():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).requires_grad_(False)
    net[2] = lilora.LiLoRALinear(net[2], r=4)
    for task in ("a", "b"):
        net[2].add_task(task)
    lilora.attach(net)
    for task in ("a", "b"):
        lilora.set_task(net, task)
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(torch.randn(6, 8)), torch.randint(4, (6,))).backward()
            optimizer.step()
    net.eval()
    x = torch.randn(3, 8)
    with torch.no_grad():
        wanted = net(x, task_ids=["a", "b", None])
        cpu_offload(net, execution_device="cpu")
        torch.testing.assert_close(net(x, task_ids=["a", "b", None]), wanted)


def test_lora_plus_gives_its_rate_to_b0_and_fusion():
    """As the guide says: PEFT knows B by its name, and U, a later task's own part of B, has another."""
    model = adapted("ab", llama(num_hidden_layers=1))
    groups = {}
    for task in "ab":
        model.set_adapter(task)
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16)
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        groups[task] = {n.split(".")[-2]: rates[id(p)] for n, p in model.named_parameters() if p.requires_grad}
        train(model, ids(), steps=1)
    own = {"lilora_U": 0.01, "lilora_V": 0.01, "lilora_fusion": 0.16}
    assert groups == {"a": {"lilora_A": 0.01, "lilora_B": 0.16, **own}, "b": own}


def test_lora_fa_is_refused_in_a_sentence():
    with pytest.raises(UserError, match=r"LoRA-FA wants LoRA's pairs of A and B, .*; make it active again"):
        create_lorafa_optimizer(adapted("a", llama(num_hidden_layers=1)), r=4, lora_alpha=8, lr=0.01)
    lora = get_peft_model(llama(num_hidden_layers=1), LoraConfig(target_modules=["q_proj"]))
    optimizer = create_lorafa_optimizer(lora, r=8, lora_alpha=8, lr=0.01)
    assert any("lora_B" in name for group in optimizer.param_groups for name in group["names"])


def test_data_parallel_is_refused():
    layer, *_ = adapted_layers(adapted("ab", llama(num_hidden_layers=1))).values()
    with pytest.raises(RuntimeError, match=r"nn\.DataParallel copies a model in every forward"):
        layer._replicate_for_data_parallel()  # what torch.nn.parallel.replicate asks of every module
