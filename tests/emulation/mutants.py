"""Faults that the emulation must see: texts of csrc/ and what stands in their place.

Run as a program with the path of a library, it computes a few cases with it and fails if one of them is wrong.
"""

import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutant:
    """`text`, which occurs once in csrc/`file`, becomes `instead`; seen where csrc/`kernel` is compiled anew."""

    name: str
    file: str
    text: str
    instead: str
    kernel: str
    devices: tuple[str, ...] = ("sm_80", "sm_90a")


FORWARD, BACKWARD, SLOTS = "delta_forward.cu", "delta_backward.cu", "hopper/slots.cu"
FINISH, SUMS = "finish_dh.h", "gradient_sums.h"
WGMMA = ("sm_90a",)  # without it there are neither fences nor products under way
STEP = "      wait_copies(stages - 2);\n      publish_shared();\n      __syncthreads();\n"
MEET = "    meet(p.launch.state);\n"
WAIT = "  if (kWaits) wait_for_previous_kernel();\n"
SYNC = "  __syncthreads();\n"

MUTANTS = (
    # Copies and fences.
    Mutant("no wait for copies", "tile.h", STEP, STEP.replace("      wait_copies(stages - 2);\n", ""), FORWARD),
    Mutant("a wait for one group too few", "tile.h", "wait_copies(stages - 2)", "wait_copies(stages - 1)", BACKWARD),
    Mutant("no groups of copies", "tile.h", "    commit_copies();\n    loaded", "    loaded", FORWARD),
    Mutant("no wait for the panel of q and z", FORWARD, "  wait_copies(0);\n", "", FORWARD),
    Mutant("no fence", "tile.h", STEP, STEP.replace("      publish_shared();\n", ""), BACKWARD, WGMMA),
    Mutant(
        "a fence behind the barrier",
        "tile.h",
        STEP,
        "      wait_copies(stages - 2);\n      __syncthreads();\n      publish_shared();\n",
        FORWARD,
        WGMMA,
    ),
    Mutant(
        "a fence before the wait",
        "tile.h",
        STEP,
        "      publish_shared();\n      wait_copies(stages - 2);\n      __syncthreads();\n",
        FORWARD,
        WGMMA,
    ),
    Mutant("no fence behind dropout", "adapter.h", "  publish_shared();\n", "", FORWARD, WGMMA),
    Mutant("no end of products", "tile.h", "      end_products(c[0]);\n", "", FORWARD, WGMMA),
    # Barriers of the grid, and between launches.
    Mutant("no barrier of the grid, forward", "plan.h", MEET, "", FORWARD),
    Mutant("no barrier of the grid, backward", "plan.h", MEET, "", BACKWARD),
    Mutant(
        "one barrier of the grid too few",
        "plan.h",
        MEET,
        MEET.replace("meet(p.launch.state)", "kFirst != 2 ? meet(p.launch.state) : __syncthreads()"),
        BACKWARD,
    ),
    Mutant("no wait for the kernel before, forward", "plan.h", WAIT, "", FORWARD),
    Mutant("no wait for the kernel before, backward", "plan.h", WAIT, "", BACKWARD),
    Mutant("no wait for q and z", FORWARD, "    wait_for_previous_kernel();\n", "", FORWARD),
    Mutant(
        "the next kernel begins before the first has waited",
        "plan.h",
        "  if (kPhase > 0) allow_next_kernel();\n",
        "  allow_next_kernel();\n",
        FORWARD,
    ),
    # Barriers of a block.
    Mutant(
        "no barrier before the sums of the base product",
        FORWARD,
        "  __syncthreads();\n  for (int i = threadIdx.x * 4",
        "  for (int i = threadIdx.x * 4",
        FORWARD,
    ),
    Mutant(
        "no barrier between the halves of the depth",
        FORWARD,
        "  __syncthreads();\n  if (slice < half)",
        "  if (slice < half)",
        FORWARD,
    ),
    Mutant("no barrier behind the sum with B0", FORWARD, "if (kBase && z_steps == 0) __syncthreads();", ";", FORWARD),
    Mutant("no barrier of a step", "tile.h", STEP, STEP.replace("      __syncthreads();\n", ""), FORWARD),
    Mutant("no barrier behind the steps", "tile.h", "  }\n  __syncthreads();\n}", "  }\n}", BACKWARD),
    Mutant(
        "no barrier behind dropout",
        FORWARD,
        "* kDepth, filled);\n          __syncthreads();\n",
        "* kDepth, filled);\n",
        FORWARD,
    ),
    Mutant("no barrier behind q", "prepare.h", f"return;\n{SYNC}", "return;\n", FORWARD),
    Mutant(
        "no barrier before the list of tasks",
        "adapter.h",
        "    __syncthreads();\n    const int i = threadIdx.x;\n",
        "    const int i = threadIdx.x;\n",
        FORWARD,
    ),
    Mutant(
        "no barrier within the list of tasks",
        "adapter.h",
        "    __syncthreads();\n    if (i < kRows && first[i]) {\n",
        "    if (i < kRows && first[i]) {\n",
        BACKWARD,
    ),
    Mutant("no barrier in a sum of a block", SUMS, "half];\n    __syncthreads();\n", "half];\n", BACKWARD),
    Mutant(
        "no barrier behind the spans",
        BACKWARD,
        "= -1;\n  }\n  __syncthreads();\n",
        "= -1;\n  }\n",
        BACKWARD,
    ),
    Mutant("no barrier behind P and Q", FINISH, f"= sum;\n  }}\n{SYNC}", "= sum;\n  }\n", BACKWARD),
    Mutant("no barrier within dgate", SUMS, f"= sum;\n{SYNC}", "= sum;\n", BACKWARD),
    Mutant(
        "no barrier behind the sums of rows",
        FINISH,
        "    __syncthreads();\n    if (const int i = threadIdx.x",
        "    if (const int i = threadIdx.x",
        BACKWARD,
    ),
    Mutant(
        "no barrier in the slots",
        SLOTS,
        "  __syncthreads();\n  shared.first[i] =",
        "  shared.first[i] =",
        SLOTS,
    ),
    # The order of sums.
    Mutant(
        "shares of h in another order",
        "adapter.h",
        "for (int split = 1; split < kMostSplits; ++split)",
        "for (int split = kMostSplits - 1; split > 0; --split)",
        FORWARD,
    ),
    Mutant(
        "shares of dq in another order",
        "adapter.h",
        "for (int split = 1; split < kMostSplits; ++split)",
        "for (int split = kMostSplits - 1; split > 0; --split)",
        BACKWARD,
    ),
    Mutant(
        "shares of gradients in another order",
        SUMS,
        "for (int i = 0; i < kMostSplits; ++i) {\n        UNROLL\n        for (int j = 0; j < 4; ++j) sum",
        "for (int i = kMostSplits - 1; i >= 0; --i) {\n        UNROLL\n        for (int j = 0; j < 4; ++j) sum",
        BACKWARD,
    ),
    Mutant(
        "eight shares of gradients before the eight ahead of them",
        SUMS,
        "for (int chunk = 0; chunk < chunks; chunk += kMostSplits)",
        "for (int chunk = (chunks - 1) / kMostSplits * kMostSplits; chunk >= 0; chunk -= kMostSplits)",
        BACKWARD,
    ),
    # Masks of tasks.
    Mutant("z of other tasks' rows", "prepare.h", "list.ids[i] != id || ", "", FORWARD),
    Mutant("y of other tasks' rows", FORWARD, "list.ids[i] != list.tasks[at.pass]", "false", FORWARD),
    Mutant(
        "P and Q of other tasks' rows",
        BACKWARD,
        "list.ids[i] == id && j < columns",
        "i < rows.count && j < columns",
        BACKWARD,
    ),
    Mutant(
        "dU of other tasks' rows",
        BACKWARD,
        "task_of(adapter, row + i) == task",
        "task_of(adapter, row + i) >= 0",
        BACKWARD,
    ),
)


def planted(mutant: Mutant, csrc: Path) -> None:
    """Changes csrc/, which is a copy."""
    path = csrc / mutant.file
    path.write_text(path.read_text().replace(mutant.text, mutant.instead))


def run_cases(library: Path) -> None:
    """Every phase, tiles of both sizes, both kinds of launch, the fused product; raises if anything is not as it should be."""
    import torch
    from emulator import Device
    from order import assert_shares_are_added_in_order
    from support.cases import NAMES, Errors, add_errors, make

    from lilora_kernels import backend, backends, cuda_library

    assert cuda_library.load(library) is None
    cuda_library.load_error = lambda: None
    device = Device(library=library)
    with backend("cuda"):
        assert_shares_are_added_in_order(device)
        for order, rows, dtype, plan, copies, coefficients, processors in (
            (1, 150, torch.float16, "one_launch", "late", "fusion", 3),
            (2, 40, torch.bfloat16, "by_phase", "late", "fusion", 3),
            (3, 150, torch.bfloat16, "fused", "random", "fusion", 3),
            (4, 20, torch.float16, "decode", "now", "fusion", 3),
            (5, 20, torch.bfloat16, "decode", "late", "lora", 13),  # sixteen outputs for each: all warps share them
        ):
            device(processors, order=order, copies=copies)
            errors = Errors()
            for seed in (
                order,
                order + 10,
                order + 20,
            ):  # one draw has three gradients of fusion, too few to be compared
                i = make(rows, 264, 200, 24, 8, 3, coefficients, "random", True, dtype, seed=seed)
                with backends.plan(plan):
                    add_errors(errors, i, "linear", NAMES, 0.1, torch.tensor([seed]))
            errors.check()


if __name__ == "__main__":
    run_cases(Path(sys.argv[1]))
