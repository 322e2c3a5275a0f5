"""PCLR: a pool of ranks that compresses, integrates and trains at constant memory, and chooses ranks by the prompt."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lilora.methods.base import (
    Batches,
    Inputs,
    Method,
    Stage,
    Tensors,
    answer_positions,
    evaluating,
    lora_parameters,
    register_method,
    without_labels,
)
from lilora.methods.distillation import divergence
from lilora.methods.pclr.pool import EXPERTS, GateRule, Query, RankPool, normalised
from lilora.methods.pooled import inject_rank_pools, load_rank_pools, pool_tensors, require_grad_only
from lilora.methods.redundancy import rank_gram
from lilora_kernels.functional import rank_gate
from lilora_kernels.layers.rank_pool import RankPoolLinear

from .compression import least_redundant, merged_keys, strided
from .queries import PoolChooser, PoolTasks, attach_pools, query_source
from .settings import PRESETS, TRAIN_PRESETS, PCLRSettings


@register_method
class PCLR(Method):
    """A pool of ranks under a cap, compressed and distilled as tasks come; the prompt and the image choose among them."""

    name = "pclr"
    settings_type = PCLRSettings
    no_lora = "each sample takes ranks of its own from a pool; use lilora generate and eval"
    mixed_batches = True
    one_process_reason = "its integration draws fake queries by the losses of the last ones"
    needs_task = False
    one_state = True
    presets = PRESETS
    train_presets = TRAIN_PRESETS
    train_defaults = {"learning_rate": 2e-4, "weight_decay": 0.0}  # noqa: RUF012
    answers_only = True

    def __init__(self, base: nn.Module, settings: dict[str, Any]) -> None:
        super().__init__(base, settings)
        s = self.options = self.read_settings(settings)
        source = query_source(base, s.vision_query)
        self.model, self.pool_tasks = base, PoolTasks(source)
        weight = source.widths[1] / source.widths[0] if s.vision_weight is None else s.vision_weight
        scales = {"shared_scaling": s.alpha / max(s.shared, 1), "expert_scaling": s.alpha / s.r}
        self.rule = GateRule(s.r, s.scope, s.value, s.reuse, s.query, weight, **scales)
        self.pools: dict[str, RankPool] = {}
        self.members: dict[str, list[str]] = {}

        def chooser(path: str, linear: nn.Linear):
            name = pool_name(path, s.pools)
            self.members.setdefault(name, []).append(path)
            if name not in self.pools:
                self.pools[name] = RankPool(self.rule, *source.widths).to(linear.weight.device)
            return PoolChooser(self.pools[name])

        self.layers = inject_rank_pools(base, s.target_modules, chooser, 1.0, s.dropout)
        base.lora_pools = nn.ModuleDict(self.pools)  # their keys are trained and saved with the model's parameters
        attach_pools(base, self.pool_tasks)
        require_grad_only(base)
        self.queries = Query(*(torch.empty(0, width, device=base.device) for width in source.widths))
        self.chances = torch.ones(0, device=base.device)  # how a fake query is drawn, before division by the sum
        self.fakes = self.queries
        self.integrating = self.continuing = False  # the old pool; the group of the task before
        self._next = (0, 0)  # experts that stay and new ones, for the group being trained

    # --- the pool ---------------------------------------------------------------------------------------------------

    @classmethod
    def inference_parameters(cls, settings: PCLRSettings, linears: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """With the pool at its cap, from however many tasks; keys and queries, whose sizes are the model's, apart."""
        return lora_parameters(settings.cap + settings.shared, linears), 0

    def ranks(self) -> int:
        return max(sum(pool.sizes().values()) + pool.shared for pool in self.pools.values())

    def experts(self) -> int:
        return max(sum(pool.sizes().values()) for pool in self.pools.values())

    def add(self, task: str) -> None:
        self.tasks.append(task)

    def activate(self, task: str, train: bool) -> None:
        """Every task is served by the same model."""

    def stages(self, task: str) -> list[Stage]:
        s, learn = self.options, Stage("learn", task)
        group, within = s.group(len(self.tasks))
        if within:
            return [learn]
        self._next = s.plan(group, self.experts())
        if not s.integrate or self._next[0] == self.experts():
            return [learn]
        return [Stage("integrate", self.tasks[-1], s.integration_rate, s.integration_epochs), learn]

    def begin(self, stage: Stage, batches: Batches) -> None:
        self.integrating = stage.name == "integrate"
        self.pool_tasks.task_queries = None  # the switch is for inference
        if self.integrating:
            self._compress()
            self._begin_integration()
            return
        self.continuing = self.options.group(len(self.tasks))[1] > 0
        if self.continuing:
            self._remember()
        else:
            if self.experts():
                self._compress()
            self._grow(stage.task, batches)
        for name, pool in self.pools.items():
            if self.options.shared and self.options.shared_learns == "always":
                self._share(pool, name)
        self._train("new", *(("shared",) if self.options.shared_learns != "integration" else ()))
        self.add(stage.task)

    def end(self, stage: Stage, batches: Batches) -> None:
        for pool in self.pools.values():
            pool.teacher = {}
        for layer in self.layers.values():
            layer.teacher = {}
        if not self.integrating:
            keys = [pool.keys("new") for pool in self.pools.values()]
            mean = (torch.stack([normalised(k[i]).mean(0) for k in keys]).mean(0) for i in range(2))
            self._add_query(*mean)
        self.integrating = self.continuing = False
        self._switch()
        require_grad_only(self.model)

    @torch.no_grad()
    def _add_query(self, text: Tensor, vision: Tensor) -> None:
        pairs = ((self.queries.text, text), (self.queries.vision, vision))
        self.queries = Query(*(torch.cat([old, normalised(new[None])]) for old, new in pairs))

    def _newest(self) -> int:
        """The first task of the newest group: the newest experts are its and those of the tasks after it."""
        last = len(self.queries.text) - 1
        return last - self.options.group(last)[1]

    def _switch(self) -> None:
        """Let inference tell the newest group's samples from those of past ones, from as many tasks on as the settings say."""
        trained, least = len(self.queries.text), self.options.newest_switch
        self.pool_tasks.task_queries = self.queries if least and trained >= max(2, least) else None
        self.pool_tasks.newest_task = self._newest() if trained else 0

    @torch.no_grad()
    def _remember(self) -> None:
        """Keep the pool as it is as the teacher, while its new experts are trained further."""
        for name, pool in self.pools.items():
            pool.teacher = {part: tuple(key.clone() for key in pool.keys(part)) for part in EXPERTS}
            pool.teacher_shared = pool.shared
            for path in self.members[name]:
                layer = self.layers[path]
                layer.teacher = {part: tuple(t.clone() for t in layer.part(part)) for part in (*EXPERTS, "shared")}

    @torch.no_grad()
    def _compress(self) -> None:
        """Make one part of old and new experts, without those that the plan has no room for.

        What the pool was stays as the teacher, the teacher of an integration.
        """
        total, keep = self.experts(), self._next[0]
        for name, pool in self.pools.items():
            pool.teacher = {part: pool.keys(part) for part in EXPERTS}
            pool.teacher_shared = pool.shared
            text, vision = (torch.cat(keys) for keys in zip(*pool.teacher.values(), strict=True))
            kept = self._kept(name, keep) if keep < total else torch.arange(total)
            kept = kept.to(text.device)
            for path in self.members[name]:
                layer = self.layers[path]
                layer.teacher = {part: layer.part(part) for part in EXPERTS}
                layer.teacher["shared"] = tuple(
                    t.detach().clone() for t in layer.part("shared")
                )  # they are trained further
                a = torch.cat([layer.part(part)[0] for part in EXPERTS])
                b = torch.cat([layer.part(part)[1] for part in EXPERTS], 1)
                layer.put("old", a[kept], b[:, kept], train=False)
                layer.put("new", a[:0], b[:, :0], train=False)
            text, vision = text[kept], vision[kept]
            if keep < total and self.options.merge_keys:
                text, vision = merged_keys(text, vision, self.queries, self.rule)
            pool.put("old", text, vision, train=False)
            pool.put("new", text[:0], vision[:0], train=False)

    def _kept(self, pool: str, keep: int) -> Tensor:
        parts = [
            [torch.cat([self.layers[path].part(part)[i] for part in EXPERTS], i) for i in range(2)]
            for path in self.members[pool]
        ]
        if self.options.prune == "stride":
            return strided(len(parts[0][0]), keep)
        grams = [rank_gram(a, b, a, b) for a, b in parts]
        # Layers count alike, whatever the size of their weights.
        return least_redundant(sum(gram / gram.diagonal().sum().clamp_min(1e-300) for gram in grams), keep)

    @torch.no_grad()
    def _grow(self, task: str, batches: Batches) -> None:
        """New experts and keys for a task, from the queries of some of its samples."""
        old, new = self.experts(), self._next[1]
        if old + new > self.options.cap:
            raise RuntimeError(f"the pool would have {old + new} ranks, more than its cap {self.options.cap}")
        with evaluating(self.model):
            queries = [self.pool_tasks.queries(self.model, inputs) for inputs in batches(max(256, new))]
        text, vision = torch.cat([q.text for q in queries]), torch.cat([q.vision for q in queries])
        mean = Query(normalised(text.mean(0, keepdim=True)), normalised(vision.mean(0, keepdim=True)))
        drawn = torch.randperm(len(text))[torch.arange(new) % len(text)].to(text.device)
        for name, pool in self.pools.items():
            nearest = None
            if old and self.options.value_init == "nearest":
                nearest = rank_gate(pool.scores("old", mean), min(new, old))[1][0]
            if self.options.key_init == "mean":
                keys = mean.text.expand(new, -1), mean.vision.expand(new, -1)
            else:
                keys = text[drawn], vision[drawn]
            pool.put("new", *keys, train=True)
            for path in self.members[name]:
                self._grow_layer(self.layers[path], new, nearest)

    def _grow_layer(self, layer: RankPoolLinear, new: int, nearest: Tensor | None) -> None:
        a, b = random_ranks(layer, new)
        if nearest is not None:
            a[: len(nearest)] = layer.part("old")[0][nearest].to(a)
            b[:, : len(nearest)] = layer.part("old")[1][:, nearest].to(b)
        layer.put("new", a, b, train=True)

    def _share(self, pool: RankPool, name: str) -> None:
        """Shared ranks, if the pool has none yet."""
        if not pool.shared:
            for path in self.members[name]:
                self.layers[path].put("shared", *random_ranks(self.layers[path], self.options.shared), train=False)
            pool.shared = self.options.shared

    def _train(self, *parts: str) -> None:
        """Let these parts' values require gradients, and the keys of new experts; of old ones where integrations train keys."""
        values = [t for layer in self.layers.values() for p in parts if p in layer.lora_A for t in layer.part(p)]
        keys = []
        if self.options.train_keys or not self.integrating:
            keys = [key for pool in self.pools.values() for p in parts if p in pool.text for key in pool.keys(p)]
        require_grad_only(self.model, *values, *keys)

    # --- training ---------------------------------------------------------------------------------------------------

    def loss(self, inputs: Inputs, cross_entropy: Callable[[], tuple[Tensor, Any]], grad_accum_weight: float) -> Tensor:
        if self.integrating:
            return grad_accum_weight * self._integration_loss(inputs)
        loss, outputs = cross_entropy()
        route = self.pool_tasks.last
        loss = loss + grad_accum_weight * self.options.key_weight * self._key_loss(route.query(), "new")
        if self.options.lwf and self.continuing:
            with torch.no_grad(), evaluating(self.model), self.pool_tasks.querying(None, teacher=True):
                teacher = self.model(**inputs).logits
            answered = answer_positions(inputs)
            distilled = divergence(outputs.logits[answered], teacher[answered], 2.0, self.options.vocabulary).mean()
            loss = loss + grad_accum_weight * self.options.lwf * distilled
        return loss

    def _key_loss(self, query: Query, part: str) -> Tensor:
        """How far the keys are from the queries, mean over pools; see PCLRSettings.key_loss."""
        terms = []
        pictured = (query.vision.square().sum(1, keepdim=True) > 0).float()
        for pool in self.pools.values():
            if self.options.key_loss == "all_new":
                text, vision = (normalised(key) for key in pool.keys(part))
                terms.append((1 - query.text @ text.T).mean() + (pictured * (1 - query.vision @ vision.T)).mean())
                continue
            near = torch.cat([pool.scores(p, query) for p in EXPERTS], 1)
            best = rank_gate(near.detach(), min(self.options.r, near.shape[1]))[1]
            terms.append((1 - near.gather(1, best)).abs().sum(1).mean())
        return torch.stack(terms).mean()

    # --- integration ------------------------------------------------------------------------------------------------

    def _begin_integration(self) -> None:
        for name, pool in self.pools.items():
            if self.options.shared:
                self._share(pool, name)
        self.fakes = self.queries
        if self.options.fake_queries == "keys":
            keys = [pool.teacher[part] for pool in self.pools.values() for part in EXPERTS]
            self.fakes = Query(*(normalised(torch.cat(kind).detach()) for kind in zip(*keys, strict=True)))
        self.chances = torch.ones(len(self.fakes.text), device=self.model.device)
        self._train("old", "shared")

    def progress(self) -> Tensors:
        return {"chances": self.chances} if self.integrating else {}

    def _integration_loss(self, inputs: Inputs) -> Tensor:
        """KL of the teacher's and the student's outputs under fake queries, drawn by the root of their last loss."""
        inputs = {name: value for name, value in without_labels(inputs).items() if name != "logits_to_keep"}
        by_task = self.options.fake_queries == "task"  # one for the batch, as published; keys: one for each sample
        drawn = torch.multinomial(self.chances, 1 if by_task else len(inputs["input_ids"]), replacement=True)
        query = Query(self.fakes.text[drawn], self.fakes.vision[drawn])
        newest = drawn >= self._newest() if by_task else None
        with torch.no_grad(), self.pool_tasks.querying(query, teacher=True, newest=newest):
            teacher = self.model(**inputs).logits
        with self.pool_tasks.querying(query):
            student = self.model(**inputs).logits
        losses = divergence(student, teacher, self.options.temperature, self.options.vocabulary)
        if self.options.distil_padding or inputs.get("attention_mask") is None:
            losses = losses.mean(1)  # [B]
        else:
            losses = (losses * inputs["attention_mask"]).sum(1) / inputs["attention_mask"].sum(1)
        self._set_chances(drawn.expand(len(losses)), losses.detach())
        loss = losses.mean()
        if self.options.train_keys:
            loss = loss + self.options.key_weight * self._key_loss(query, "old")
        return loss

    def _set_chances(self, drawn: Tensor, losses: Tensor) -> None:
        """The root of each drawn query's mean loss; in place, and without adding in an order that may change."""
        member = (drawn == torch.arange(len(self.chances), device=drawn.device)[:, None]).float()  # [queries, B]
        count = member.sum(1)
        mean = member @ losses / count.clamp_min(1)
        self.chances.copy_(torch.where(count > 0, (mean.clamp_min(0) + 1e-4).sqrt(), self.chances))

    # --- the bank ---------------------------------------------------------------------------------------------------

    def tensors(self, task: str) -> tuple[Tensors, Tensors]:
        stored = pool_tensors(self.layers)
        for name, pool in self.pools.items():
            for part in pool.text:
                stored[f"state.keys.{name}.{part}.text"], stored[f"state.keys.{name}.{part}.vision"] = pool.keys(part)
        stored["state.queries.text"], stored["state.queries.vision"] = self.queries.text, self.queries.vision
        return {}, stored

    @torch.no_grad()
    def restore(self, tasks: dict[str, tuple[Tensors, Tensors]]) -> None:
        if not tasks:
            return
        stored = {name: tensor.to(self.model.device) for name, tensor in list(tasks.values())[-1][1].items()}
        load_rank_pools(self.layers, stored)
        for name, pool in self.pools.items():
            for part in EXPERTS:
                keys = [stored.get(f"state.keys.{name}.{part}.{kind}") for kind in ("text", "vision")]
                if keys[0] is not None:
                    pool.put(part, *keys, train=False)
            pool.shared = self.layers[self.members[name][0]].part("shared")[0].shape[0]
        self.queries = Query(stored["state.queries.text"], stored["state.queries.vision"])
        self.tasks = list(tasks)
        self._switch()


def pool_name(path: str, pools: str) -> str:
    """Which pool a linear belongs to: its decoder layer's, or the one of all linears ahead of them."""
    layer = re.search(r"layers\.(\d+)\.", path)
    if pools == "global":
        return "global"
    return f"layer-{layer[1]}" if layer else "projector"


def random_ranks(layer: RankPoolLinear, ranks: int) -> tuple[Tensor, Tensor]:
    """A [ranks, K] normal of variance 1 / K and B [N, ranks] = 0: how PCLR starts ranks, in fp32 at least."""
    dtype = torch.promote_types(layer.empty(0).dtype, torch.float32)
    a, b = (layer.empty(*shape).to(dtype) for shape in ((ranks, layer.in_features), (layer.out_features, ranks)))
    return a.normal_(std=layer.in_features**-0.5), b.zero_()
