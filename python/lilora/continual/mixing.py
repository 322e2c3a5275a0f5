"""Training samples of several tasks: all of them in one data set, and the order in which stored ones are replayed."""

import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from torch.utils.data import Dataset, Sampler

from lilora.errors import UserError


class TaskSamples(Dataset):
    """The samples of several tasks, one task after the other, each as (number of its task, sample)."""

    def __init__(self, parts: Sequence[Dataset]) -> None:
        self.parts = parts
        self.starts = [0, *accumulate(map(len, parts))]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> tuple[int, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self.starts, index) - 1
        return number, self.parts[number][index - self.starts[number]]


def memory_of(data: TaskSamples, task: int, name: str, size: int, seed: int) -> list[int]:
    """Indices of at most `size` samples of the task of this number, the same for every stage of a run with this seed."""
    own = range(data.starts[task], data.starts[task + 1])
    first = own.start
    chosen = random.Random(f"{seed} {name}").sample(range(len(own)), min(size, len(own)))
    return [first + index for index in chosen]


class ReplaySampler(Sampler[int]):
    """The order of an epoch in which `share` of the samples of every optimizer step are replayed.

    An epoch takes each of the first `own` samples of the data once, `step - round(share * step)` of them in a step (fewer
    in the last), and beside them samples drawn from `memory`, the indices of the stored ones. seed and the number of the
    epoch say all that is drawn, so a resumed run draws the same.
    """

    def __init__(self, own: int, memory: Sequence[int], step: int, share: float, seed: int) -> None:
        self.own, self.memory, self.seed, self.epoch = own, memory, seed, 0
        self.replayed = round(share * step)
        self.new = step - self.replayed
        if not (self.replayed and self.new):
            raise UserError(
                f"a step has {step} sample(s), of which a share of {share} to replay leaves {self.new} new and "
                f"{self.replayed} replayed; raise --batch-size or --gradient-accumulation"
            )

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def _replayed_beside(self, new: int) -> int:
        return round(self.replayed * new / self.new)

    def __len__(self) -> int:
        steps, rest = divmod(self.own, self.new)
        return self.own + steps * self.replayed + self._replayed_beside(rest)

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.seed} {self.epoch}")
        order = rng.sample(range(self.own), self.own)
        for start in range(0, self.own, self.new):
            new = order[start : start + self.new]
            count = self._replayed_beside(len(new))
            again = count > len(self.memory)
            step = new + (rng.choices if again else rng.sample)(self.memory, k=count)
            rng.shuffle(step)
            yield from step
