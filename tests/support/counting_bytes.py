"""The bytes that the kernels read and write in the interpreter."""

import numpy as np

from lilora_kernels.ops.delta import triton_jobs


class Counter:
    """Counts the bytes that kernels load and store, by tensor; issued and distinct."""

    def __init__(self, monkeypatch):
        from triton.runtime.interpreter import InterpreterBuilder

        self.ranges, self.lanes = {}, {}
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def counting_load(builder, ptrs, mask, *rest):
            self.count(ptrs, mask)
            return load(builder, ptrs, mask, *rest)

        def counting_store(builder, ptrs, value, mask, *rest):
            self.count(ptrs, mask)
            return store(builder, ptrs, value, mask, *rest)

        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counting_load)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counting_store)

    def watch(self, monkeypatch, see):
        """see(job) after each launch of a kernel, whose tensors go by their names in it, and in the groups in it."""
        launch = triton_jobs.launch

        def counted(made, grid, tensors, numbers, groups):
            self.lanes = {}
            names = [name for name in made.kernel.arg_names if name not in made]
            named = dict(zip(names[len(groups) :], tensors, strict=False))
            for group in groups:
                named |= {name: t for name, t in group._asdict().items() if t is not None}
            self.ranges = {
                name: (t.data_ptr(), t.data_ptr() + t.nbytes, t.element_size())
                for name, t in named.items()
                if t is not None
            }
            launch(made, grid, tensors, numbers, groups)
            see(made.kernel.__name__)

        monkeypatch.setattr(triton_jobs, "launch", counted)

    def count(self, ptrs, mask):
        addresses = np.broadcast_to(ptrs.data, mask.data.shape)[mask.data.astype(bool)]
        if addresses.size == 0:
            return
        name = next(n for n, (low, high, _) in self.ranges.items() if low <= addresses.min() < high)
        self.lanes.setdefault(name, []).append(addresses.ravel())

    def bytes(self, name):
        addresses = np.concatenate(self.lanes[name])
        size = self.ranges[name][2]
        return len(addresses) * size, len(np.unique(addresses)) * size
