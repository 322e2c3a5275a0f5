"""What PCLR can be told, and its presets."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from lilora.errors import UserError
from lilora.methods.settings import MethodSettings, alpha_field

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "released": {
        "query": "two",
        "scope": "batch",
        "value": "binary",
        "reuse": "top_up",
        "key_init": "mean",
        "key_loss": "all_new",
        "prune": "stride",
        "merge_keys": True,
        "fake_queries": "task",
        "vocabulary": 100,
        "temperature": 2.0,
        "distil_padding": True,
        "train_keys": False,
        "newest_switch": 8,
        "schedule": [(64, 1.0)] * 4 + [(64, 0.75)] * 2 + [(32, 0.875)] * 2,
    },
}
PRESETS["continual_next"] = PRESETS["released"] | {
    "pools": "global",
    "vision_query": "pooled",
    "key_weight": 1.0,
    "vocabulary": 500,
    "integration_rate": 0.2,
    "shared_learns": "after_integration",
    "newest_switch": 15,
    "schedule": [(64, 1.0)] * 4 + [(64, 0.75)] * 7 + [(32, 0.875)] * 4,
}
TRAIN_PRESETS: dict[str, dict[str, float]] = {
    "released": {"max_grad_norm": 0.0},
    "continual_next": {"max_grad_norm": 0.0, "warmup": 0.05, "gradient_accumulation": 16},
}


class PCLRSettings(MethodSettings):
    """PCLR (ICLR 2026). Where the paper and its code differ the default is the paper's; preset "released" is the code of its
    first suite (CoIN), "continual_next" that of its second.

    r: ranks chosen of the pool; cap: most ranks the pool ever has; shared: ranks that are always on; the experts'
    scale is alpha / r, that of the shared ranks alpha / shared. schedule: new ranks and retention at compression,
    task by task: a table of (new ranks, share kept), whose last line holds for all further tasks; "progressive": the
    T trained tasks keep T / (T + 1) of the cap and the next gets the rest; "constant": three quarters stay. pools:
    keys per decoder "layer" or one "global" pool. query, scope, value, reuse: see lilora.methods.pclr.pool.GateRule;
    vision_weight None is d_vision / d_text; vision_query: see lilora.methods.pclr.queries.VisionSource. key_init: new
    keys are queries of training "samples", or all the task's "mean". value_init: new experts start as the old ones
    "nearest" to the task, or "random". key_loss: the L1 distance of the `r` best keys' similarities to 1 ("top_r"), or
    the mean over all new keys ("all_new"), weighed by key_weight. prune: ranks go by "redundancy" or by "stride";
    merge_keys: task queries are added to the kept keys. integrate: distil the old pool into the compressed one, with
    fake queries that are trained "keys" or "task" means, over the teacher's `vocabulary` largest logits (None: all) at
    `temperature`, on all tokens (distil_padding: and padding), with integration_rate and integration_epochs times the
    run's learning rate and epochs; train_keys: keys follow the fake queries then. shared_learns: shared ranks are made
    at the first "integration" and trained in integrations only, or from then on in every stage ("after_integration"),
    or exist and are trained "always". newest_switch: from so many tasks on inference gives new experts only to samples
    nearest to the newest task, or to one of its group; 0: never. groups (PCLR-LwF): tasks come in groups of this size,
    or of these sizes and the last for all further ones. Compression, integration and new ranks are for the first task
    of each group; the others train its new ranks further, with `lwf` times a distillation from the model before the
    task (our reading). The schedule's tasks are groups then.
    """

    r: int = Field(64, ge=1)
    cap: int = Field(256, ge=1)
    shared: int = Field(32, ge=0)
    alpha: float = alpha_field()
    dropout: float = Field(0.0, ge=0, lt=1)
    schedule: Literal["progressive", "constant"] | list[tuple[int, float]] = "progressive"
    pools: Literal["layer", "global"] = "layer"
    query: Literal["concatenated", "two"] = "concatenated"
    vision_weight: float | None = Field(None, ge=0)
    vision_query: Literal["tokens", "pooled"] = "tokens"
    scope: Literal["sample", "batch"] = "sample"
    value: Literal["score", "binary"] = "score"
    reuse: Literal["all", "top_up"] = "all"
    key_init: Literal["samples", "mean"] = "samples"
    value_init: Literal["nearest", "random"] = "nearest"
    key_loss: Literal["top_r", "all_new"] = "top_r"
    key_weight: float = Field(0.2, ge=0)
    prune: Literal["redundancy", "stride"] = "redundancy"
    merge_keys: bool = False
    integrate: bool = True
    fake_queries: Literal["keys", "task"] = "keys"
    vocabulary: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, gt=0)
    distil_padding: bool = False
    train_keys: bool = True
    integration_rate: float = Field(0.25, gt=0)
    integration_epochs: float = Field(1.0, gt=0)
    shared_learns: Literal["always", "after_integration", "integration"] = "integration"
    newest_switch: int = Field(0, ge=0)
    groups: int | list[int] = 1
    lwf: float = Field(1.0, ge=0)

    @field_validator("schedule")
    @classmethod
    def _lines(cls, schedule):
        for new, retention in schedule if isinstance(schedule, list) else ():
            if new < 1 or not 0 < retention <= 1:
                raise ValueError(
                    f"a line is ({new}, {retention}); it must be at least 1 new rank and a retention in (0, 1]"
                )
        return schedule

    @field_validator("groups")
    @classmethod
    def _sizes(cls, groups):
        sizes = [groups] if isinstance(groups, int) else groups
        if not sizes or min(sizes) < 1:
            raise ValueError("it must be a number of tasks, at least 1, or a list of such numbers")
        return groups

    @field_validator("newest_switch", mode="before")
    @classmethod
    def _switched(cls, value):
        """Banks of earlier versions say whether, which was from the second task on."""
        return 2 * value if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _fits(self):
        if self.groups == 1 and self.lwf and "lwf" in self.model_fields_set:
            raise ValueError(f"lwf is {self.lwf} and groups is 1; lwf acts within groups of tasks, so give groups too")
        if self.cap < self.r:
            raise ValueError(f"cap is {self.cap}, less than the {self.r} ranks of one task; raise cap or lower r")
        if isinstance(self.schedule, list):
            if not self.schedule:
                raise ValueError("schedule is empty; give (new ranks, retention) for each task")
            self._walk()
            if self.schedule[0][0] < self.r:
                raise ValueError(
                    f"r is {self.r} and the pool has {self.schedule[0][0]} ranks after the first task; r must fit into it"
                )
        return self

    def group(self, trained: int) -> tuple[int, int]:
        """(number of the group, number within it) of the task after `trained` ones, both from 0."""
        sizes = [self.groups] if isinstance(self.groups, int) else self.groups
        number = 0
        while trained >= (size := sizes[min(number, len(sizes) - 1)]):
            trained, number = trained - size, number + 1
        return number, trained

    def _walk(self) -> None:
        """Raise UserError where the table would exceed the cap."""
        ranks = 0
        for trained in range(len(self.schedule) + 1):
            ranks = sum(self.plan(trained, ranks))

    def plan(self, trained: int, ranks: int) -> tuple[int, int]:
        """(ranks that stay, new ranks) for the next group of tasks after `trained` ones that have `ranks` in all."""
        if isinstance(self.schedule, list):
            new, retention = self.schedule[min(trained, len(self.schedule) - 1)]
            keep = ranks if retention == 1 else round(ranks * retention)
            if keep + new > self.cap:
                raise UserError(
                    f"pclr: schedule gives task {trained + 1} {new} new ranks beside {keep}, more than the cap {self.cap}; "
                    "lower one of them or raise cap"
                )
            return keep, new
        if ranks + self.r <= self.cap:
            return ranks, self.r
        keep = self.cap * trained // (trained + 1) if self.schedule == "progressive" else round(0.75 * ranks)
        keep = min(ranks, max(keep, self.cap - self.r))
        return keep, self.cap - keep
