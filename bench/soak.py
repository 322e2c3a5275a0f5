"""`make soak`: a tiny model served for minutes while its tasks come, go, are swapped, frozen and thawed. Nothing may grow.

One thread changes the tasks, the others run mixed forwards and generations meanwhile and hold every result against the one
that they had in the beginning.
"""

import argparse
import copy
import gc
import itertools
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from array import array
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from rich.progress import Progress
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import lilora

RESIDENT = ("a", "b")  # what the other threads compute with
SWAPPED = "s"
CAPACITY = 4096  # ids are not used twice, those of deleted tasks neither
PAUSE = 0.05  # seconds between two changes, so that they do not use up the ids
WARM_UP = 0.25  # of the time: caches and allocators fill

# How much the last quarter may exceed the one after the warm-up.
MIB_MORE, TIME_RATIO = 16.0, 1.5


class Sample(NamedTuple):
    """What is there at one moment, with all threads at rest."""

    at: float  # seconds since the start
    mib: float  # resident
    tensors: int
    descriptors: int
    threads: int


class Soak:
    """The model, its threads, and what they measure."""

    def __init__(self, folder: Path, threads: int) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=64,
            pad_token_id=0, bos_token_id=1, eos_token_id=None,
        )  # fmt: skip
        self.config = lilora.LiLoRAConfig(
            r=4, sub_rank=2, dropout=0.0, target_modules=["gate_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM"
        )
        self.model: PeftModel = get_peft_model(LlamaForCausalLM(config), copy.deepcopy(self.config), "a")
        for name in (RESIDENT[1], SWAPPED):
            self.model.add_adapter(name, copy.deepcopy(self.config))
        self.model.eval()
        for name, parameter in self.model.named_parameters():
            if "lilora_" in name:
                parameter.data.normal_(std=0.3)
        self.threads, self.folder = threads, folder
        self.x = torch.randint(2, 64, (4, 6))
        self.orders = [list(names) for names in itertools.product((*RESIDENT, None), repeat=4)][::7]
        self.logits = [self.forward(names) for names in self.orders]
        self.answers = [self.generate(names) for names in self.orders]
        self.swaps = self._swaps()
        lilora.freeze(self.model, CAPACITY)  # the first one moves the parameters: ahead of the threads
        self.running, self.at_rest = threading.Event(), threading.Barrier(threads + 2)
        self.ended = False
        self.errors: list[str] = []
        # Of each kind of step, in turn when and how long: 16 bytes a step, so that what is measured is not the measuring.
        self.seconds: dict[str, array] = defaultdict(lambda: array("d"))

    def _swaps(self) -> list[tuple[dict[str, Tensor] | Path, Tensor]]:
        """Two states of the swapped task, as tensors and as a folder, with the logits of each."""
        found = []
        for source in ("tensors", "folder"):
            for name, parameter in self.model.named_parameters():
                if name.endswith(f".{SWAPPED}") and not name.endswith((f"_A.{SWAPPED}", f"_B.{SWAPPED}")):
                    parameter.data.normal_(std=0.3)
            state = {k: v.clone() for k, v in get_peft_model_state_dict(self.model, adapter_name=SWAPPED).items()}
            self.model.save_pretrained(self.folder / source, selected_adapters=[SWAPPED])
            found.append(
                (state if source == "tensors" else self.folder / source / SWAPPED, self.forward([SWAPPED] * 4))
            )
        return found

    # --- steps ------------------------------------------------------------------------------------------------------

    def forward(self, names: list[str | None]) -> Tensor:
        with torch.inference_mode():
            return self.model(input_ids=self.x, task_ids=names).logits

    def generate(self, names: list[str | None]) -> Tensor:
        return self.model.generate(
            input_ids=self.x, attention_mask=torch.ones_like(self.x), task_ids=names, max_new_tokens=4, do_sample=False
        )

    def check(self, what: str, got: Tensor, wanted: Tensor) -> None:
        close = torch.equal if what == "generate" else lambda p, q: torch.allclose(p, q, rtol=0, atol=1e-4)
        if not close(got, wanted):
            raise AssertionError(f"{what} gives another result than in the beginning")

    def compute(self, number: int) -> None:
        turn = number
        while not self.ended:
            self._rest()
            turn += 1
            at = turn % len(self.orders)
            if turn % 8:
                self.check(
                    "forward", self._timed("forward", lambda at=at: self.forward(self.orders[at])), self.logits[at]
                )
            else:
                got = self._timed("generate", lambda at=at: self.generate(self.orders[at]))
                self.check("generate", got, self.answers[at])

    def change(self, _: int) -> None:
        draw, added = random.Random(0), []
        number = 0
        while not self.ended:
            self._rest()
            time.sleep(PAUSE)
            kind = draw.choice(("add", "delete", "swap", "freeze", "unfreeze"))
            if kind == "add" and len(added) < 6 and number < CAPACITY - 8:
                name = f"t{number}"
                self._timed("add", lambda name=name: self.model.add_adapter(name, copy.deepcopy(self.config)))
                added.append(name)
                number += 1
                self.forward([name, "a", None, name])
            elif kind == "delete" and added:
                name = added.pop(draw.randrange(len(added)))
                self._timed("delete", lambda name=name: self.model.delete_adapter(name))
            elif kind == "swap":
                source, wanted = draw.choice(self.swaps)
                self._timed("swap", lambda source=source: lilora.hotswap(self.model, source, SWAPPED))
                self.check("a swapped task", self.forward([SWAPPED] * 4), wanted)
            elif kind == "freeze":
                self._timed("freeze", lambda: lilora.freeze(self.model, CAPACITY))
            elif kind == "unfreeze":
                self._timed("unfreeze", lambda: lilora.unfreeze(self.model))

    def _timed(self, kind: str, work: Callable) -> object:
        began = time.perf_counter()
        result = work()
        self.seconds[kind].extend((began, time.perf_counter() - began))
        return result

    # --- threads ----------------------------------------------------------------------------------------------------

    def _rest(self) -> None:
        if not self.running.is_set():
            self.at_rest.wait()  # all have come to rest
            self.running.wait()

    def _thread(self, work: Callable[[int], None], number: int) -> None:
        try:
            work(number)
        except threading.BrokenBarrierError:
            pass
        except BaseException as error:
            self.errors.append(f"{type(error).__name__}: {error}")
            self.ended = True
            self.at_rest.abort()

    def run(self, seconds: float, every: float, bar: Progress) -> list[Sample]:
        """Samples taken `every` so many seconds; raises AssertionError for a wrong result or an error in a thread."""
        work = [(self.compute, number) for number in range(self.threads)] + [(self.change, 0)]
        threads = [threading.Thread(target=self._thread, args=each, daemon=True) for each in work]
        samples: list[Sample] = []
        task, began = bar.add_task("soak", total=seconds), time.perf_counter()
        self.running.set()
        for thread in threads:
            thread.start()
        while not self.ended:
            until = time.perf_counter() + every
            while time.perf_counter() < until and not self.ended:
                time.sleep(0.1)
                bar.update(task, completed=time.perf_counter() - began)
            self.running.clear()
            try:
                self.at_rest.wait(120)
            except threading.BrokenBarrierError:
                break
            samples.append(sample(time.perf_counter() - began))
            self.ended = self.ended or samples[-1].at >= seconds
            self.running.set()
        self.running.set()
        for thread in threads:
            thread.join(60)
        if self.errors:
            raise AssertionError("; ".join(self.errors))
        return samples


def sample(at: float) -> Sample:
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    tensors = sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())
    return Sample(at, resident, tensors, len(os.listdir("/proc/self/fd")), threading.active_count())


def judged(samples: list[Sample], seconds: dict[str, array]) -> tuple[list[str], list[str]]:
    """(lines to print, what grew) of the quarter after the warm-up and the last one."""
    lines, grew = [], []
    kept = [s for s in samples if s.at >= WARM_UP * samples[-1].at]
    part = max(1, len(kept) // 3)
    first, last = kept[:part], kept[-part:]
    for name, allowed in (("mib", MIB_MORE), ("tensors", None), ("descriptors", 0), ("threads", 0)):
        before, after = (statistics.median(getattr(s, name) for s in some) for some in (first, last))
        most = max(getattr(s, name) for s in first) if allowed is None else before + allowed
        lines.append(f"{name:12} {before:10.1f} -> {after:10.1f}")
        if after > most:
            grew.append(f"{name} grew from {before:.1f} to {after:.1f}")
    for kind, values in sorted(seconds.items()):
        taken = list(zip(values[::2], values[1::2], strict=True))
        begin, end = taken[0][0], taken[-1][0]
        begin += WARM_UP * (end - begin)
        early = [t for at, t in taken if begin <= at < begin + (end - begin) / 3]
        late = [t for at, t in taken if at >= end - (end - begin) / 3]
        if len(early) < 20 or len(late) < 20:
            lines.append(f"{kind:12} {len(taken):,} times")
            continue
        before, after = statistics.median(early), statistics.median(late)
        lines.append(f"{kind:12} {1e3 * before:7.2f} ms -> {1e3 * after:7.2f} ms   {len(taken):,} times")
        if after > TIME_RATIO * before:
            grew.append(f"the time of {kind} grew from {1e3 * before:.2f} to {1e3 * after:.2f} ms")
    return lines, grew


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--threads", type=int, default=3, help="that compute while one changes the tasks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder, Progress() as bar:
        soak = Soak(Path(folder), options.threads)
        samples = soak.run(options.seconds, max(1.0, options.seconds / 60), bar)
    lines, grew = judged(samples, soak.seconds)
    print("\n".join(lines))
    if grew:
        sys.exit("soak: " + "; ".join(grew))


if __name__ == "__main__":
    main()
