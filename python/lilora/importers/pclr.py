"""Checkpoints of PCLR's released code (`lrp.bin`, `lrp_ts.bin`) as the tensors of a bank."""

import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from lilora.errors import UserError
from lilora.families import target_modules
from lilora.methods.pclr.queries import query_source
from lilora.methods.pclr.settings import PCLRSettings

from .checkpoint import Checkpoint, Imported, common_name, read_json, read_pickle, setting, task_names

# The file's names of a pool's parts: in lrp.bin, and in lrp_ts.bin, the input of an integration.
_PARTS = {
    "static": "old",
    "share": "shared",
    "train": "new",
    "teacher_part1": "old",
    "teacher_share": "shared",
    "teacher_part2": "new",
}
_POOLS = {"llm": "global", "mm_projector": "projector"}  # others are numbers of decoder layers
_KINDS = {"llm": "text", "vit": "vision"}
_FACTORS = {"A": "A", "B": "B0"}
_PUBLISHED = PCLRSettings(target_modules="")
_TEXT_NOTE = (
    "a prompt's text query is the mean over all its words here, those of the chat template too, and that over the "
    "question's words in the released code: other ranks may be chosen"
)

Linears = dict[str, nn.Linear]


def read_pclr(files: Sequence[Path], model: nn.Module, tasks: Sequence[str] | None = None) -> Imported:
    """The pool in `lrp.bin` or `lrp_ts.bin`, for the LLaVA of transformers that it was trained on.

    files: one file; r and alpha are those of lrp_config.json beside it, else the published 64 and 128. model: its names
    and shapes count, so one on the meta device will do; if it has weights and mm_projector.bin lies beside the file, its
    projector must be that one. tasks: their names, in the order they were trained; None for task1, task2 ...

    The file has A [K, n] and B [n, N] for every linear of language model and projector, of its old (`static`), new
    (`train`; a merged file has none) and shared (`share`) ranks; a text and a vision key for every expert of every pool;
    and a text and a vision query for every task. The bank holds A [n, K] and B0 [N, n] in the file's dtype and the queries
    in fp32, the same for all tasks: the newest pool serves them all. Its logits are the released model's wherever the
    queries choose the same ranks; how they differ is in the notes.

    Raises:
        UserError: the file or one beside it is unreadable, does not have exactly the tensors that the model has places
            for, or has learned another number of tasks; or the model has no vision tower that queries could come from.
    """
    if len(files) != 1:
        raise UserError(f"pclr keeps all tasks in one file and {len(files)} are given; give the newest lrp.bin alone")
    path, widths = files[0], query_source(model).widths
    pattern = target_modules(model.config, projector=True, attention=True)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and re.fullmatch(pattern, n)}
    names = {common_name(name): name for name in linears}
    file = Checkpoint(path, read_pickle(path), lambda raw: bank_name(raw, names))

    one_pool = any(key in file for part in ("old", "new") for key in _keys("global", part))
    pools: dict[str, Linears] = {}
    for common, name in names.items():
        pools.setdefault("global" if one_pool else pool_of(common), {})[name] = linears[name]
    shared = next((file.shape(a)[1:].numel() for a in (f"{name}.shared.A" for name in linears) if a in file), 0)
    stored: dict[str, Tensor] = {}
    for pool, members in pools.items():
        stored |= _take_pool(file, pool, members, widths, shared)
    text, vision = "state.queries.text", "state.queries.vision"
    stored[text] = file.take(text, None, widths[0]).float()
    stored[vision] = file.take(vision, len(stored[text]), widths[1]).float()
    file.finish()
    check_projector(path.with_name("mm_projector.bin"), linears)

    config = path.with_name("lrp_config.json")
    values = read_json(config) if config.exists() else {}
    settings = {
        "target_modules": pattern,
        "r": setting(config, values, "llm_top_rank", default=_PUBLISHED.r, whole=True),
        "alpha": setting(config, values, "llm_lora_alpha", default=_PUBLISHED.alpha),
        "shared": shared,
        "cap": max(_PUBLISHED.cap, *(_experts(stored, pool) for pool in pools)),
        "pools": "global" if one_pool else "layer",
        "vision_query": "pooled" if one_pool else "tokens",  # of the suite with one pool
        "newest_switch": len(stored[text]),  # matters where the file's new ranks are apart
    }
    notes = (*file.notes(), _TEXT_NOTE)
    names = task_names(path, tasks, [f"task{i + 1}" for i in range(len(stored[text]))])
    return Imported(dict.fromkeys(names, ({}, stored)), settings, notes)


def _take_pool(
    file: Checkpoint, pool: str, members: Linears, widths: tuple[int, int], shared: int
) -> dict[str, Tensor]:
    """A pool's keys and the ranks of its linears."""
    stored, sizes = {}, {"shared": shared} if shared else {}
    for part in [p for p in ("old", "new") if any(key in file for key in _keys(pool, p))] or ["old"]:
        text, vision = _keys(pool, part)
        stored[text] = file.take(text, None, widths[0])
        sizes[part] = len(stored[text])
        stored[vision] = file.take(vision, sizes[part], widths[1])
    for name, linear in members.items():
        for part, ranks in sizes.items():
            a, b = f"{name}.{part}.A", f"{name}.{part}.B0"
            stored[a] = file.take(a, linear.in_features, ranks).T
            stored[b] = file.take(b, ranks, linear.out_features).T
    return stored


def _keys(pool: str, part: str) -> tuple[str, str]:
    return f"state.keys.{pool}.{part}.text", f"state.keys.{pool}.{part}.vision"


def _experts(stored: dict[str, Tensor], pool: str) -> int:
    return sum(len(stored[text]) for text in (_keys(pool, part)[0] for part in ("old", "new")) if text in stored)


def pool_of(common: str) -> str:
    layer = re.match(r"layers\.(\d+)\.", common)
    return f"layer-{layer[1]}" if layer else "projector"


def bank_name(raw: str, names: dict[str, str]) -> str | None:
    """What a bank calls a tensor of the file, None for one that is unknown; names: common name -> the model's."""
    if match := re.fullmatch(r"task_(llm|vit)_query_pool", raw):
        return f"state.queries.{_KINDS[match[1]]}"
    if match := re.fullmatch(r"(\w+)_keys_(llm|vit)\.(\w+)", raw):
        part, pool = _PARTS.get(match[1]), _POOLS.get(match[3], f"layer-{match[3]}")
        return f"state.keys.{pool}.{part}.{_KINDS[match[2]]}"
    if match := re.fullmatch(r"(.+)\.(\w+)_rank_([AB])_pool", raw):
        name, part = names.get(common_name(match[1])), _PARTS.get(match[2])
        return f"{name}.{part}.{_FACTORS[match[3]]}" if name and part else None
    return None


def check_projector(path: Path, linears: Linears) -> None:
    """UserError if the file is there and the model has another projector: it is not the one that the ranks belong to."""
    weights = {
        f"{common_name(name)}.{kind}": weight
        for name, linear in linears.items()
        for kind, weight in linear.named_parameters()
        if "projector" in name and not weight.is_meta
    }
    if not path.exists() or not weights:
        return

    def common(raw: str) -> str | None:
        linear, _, kind = raw.rpartition(".")
        name = f"{common_name(linear)}.{kind}"
        return name if name in weights else None

    file = Checkpoint(path, read_pickle(path), common)
    for name, ours in weights.items():
        ours, theirs = ours.float().cpu(), file.take(name, *ours.shape).float()
        if (ours - theirs).norm() > 0.01 * theirs.norm():  # more than bf16 rounds away
            raise UserError(
                f"{path}: tensor {name} is not that of --model; give a model of the language model and the projector that "
                "the checkpoint was trained on"
            )
