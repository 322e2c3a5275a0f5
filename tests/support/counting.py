"""Counts what a call makes a device do."""

from collections import Counter

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Operations(TorchDispatchMode):
    """The torch operations that compute or copy, those inside of ours included; the calls of ours; bytes allocated."""

    NEW = ("empty", "empty_like", "new_empty")
    FREE = (*NEW, "detach_", "promote_types")
    CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def __init__(self):
        super().__init__()
        self.seen, self.ours, self.bytes = Counter(), Counter(), 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, operation.overloadpacket.__name__
        if operation.namespace == "lilora":
            self.ours[name] += 1
            with self:
                return operation.redispatch(self.CPU, *args, **kwargs)
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = operation(*args, **kwargs)
        made = {t.untyped_storage()._cdata for t in tree_leaves(result) if isinstance(t, Tensor)}
        view = made and made <= given and not operation._schema.is_mutable
        if name in self.NEW:
            self.bytes += result.nbytes
        elif not view and name not in self.FREE:
            self.seen[name] += 1
        return result


def saved(module, forward):
    """The bytes of every storage that autograd holds, by its address; parameters belong to the module."""
    own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            held[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return held
