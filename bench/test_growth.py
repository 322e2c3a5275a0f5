"""How costs grow with tasks and rows, next to PEFT with a LoRA per task."""

from contextlib import nullcontext

import pytest

from lilora_kernels import plan

from . import growth

OVER_TASKS = {
    "mixed": growth.PEERS,
    "evaluation": ("ours", "peft", "peft_names"),
    "bank": ("ours", "peft"),
}


def pytest_generate_tests(metafunc):
    tiny = metafunc.config.getoption("tiny")
    counts = (1, 2) if tiny else (1, 2, 4, 8, 16, 32, 64)
    if "tasks" in metafunc.fixturenames:
        few = counts[:: 1 if tiny else 3]
        parameters = [
            (what, tasks, name)
            for what, names in OVER_TASKS.items()
            for tasks in (counts if what == "mixed" else few)
            for name in names
            if (what, tasks, name) != ("mixed", 1, "grouped_mm")
        ]
        metafunc.parametrize("what, tasks, name", parameters)


def test_over_tasks(what, tasks, name, machine, ceiling, seconds, measured, report, benchmark):
    benchmark.group = f"{what}, {tasks} tasks"
    runs = {
        "mixed": lambda: growth.mixed_batch(tasks, machine, ceiling, seconds),
        "evaluation": lambda: growth.evaluation(tasks, machine),
        "bank": lambda: growth.bank(tasks, machine),
    }
    rows = measured((what, tasks), runs[what])
    report(rows, name, {"mixed": "forward", "evaluation": "evaluation", "bank": "load"}[what])


@pytest.mark.parametrize("at", range(3))
def test_memory_over_rows(at, machine, measured):
    counts = growth.row_counts(machine)
    # Tiny layers would take the plan one_launch, which keeps the mask of dropout.
    with plan("composed") if machine.tiny else nullcontext():
        rows = measured(("memory", at), lambda: growth.step_memory(counts[at % len(counts)], machine))
    saved = {row["implementation"]: row["saved_bytes"] for row in rows}
    assert saved["base"] <= saved["ours"] <= saved["peft"]
