"""`train` and `optimizer`: the steps and their update rule."""

import math
from dataclasses import dataclass
from typing import Literal

from experiments.checks import at_least


@dataclass(frozen=True)
class Budget:
    """AdaLoRA's: the average rank at the end, when ranks begin to be given up and how long before the end
    that is over, at every how many steps; and the weight of `lora_jax.methods.orthogonality` in the loss."""

    target_rank: int
    initial_steps: int = 0
    final_steps: int = 0
    every: int = 1
    orthogonality: float = 0.5

    def __post_init__(self):
        at_least(1, "optimizer.adalora", self, "target_rank", "every")
        at_least(0, "optimizer.adalora", self, "initial_steps", "final_steps", "orthogonality")


@dataclass(frozen=True)
class Optimizer:
    """The update rule. `adamw_authors` is that of LoRA's authors, `adamw` is optax's; `OPTIMIZERS` in
    `training/optimizer.py` lists the names.

    `loraplus`: B's rate is so many times A's. `lorafa`: the corrected gradient of LoRA-FA. `adalora`: the
    budget that the method AdaLoRA needs.
    """

    name: Literal["adamw", "adamw_authors"] = "adamw"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = None
    loraplus: float | None = None
    lorafa: bool = False
    adalora: Budget | None = None

    def __post_init__(self):
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"`optimizer.{name}` must be at least 0 and below 1, got {getattr(self, name)}."
                )
        at_least(0, "optimizer", self, "eps", "weight_decay", "clip")
        if self.loraplus is not None and not (math.isfinite(self.loraplus) and self.loraplus > 0):
            raise ValueError(f"`optimizer.loraplus` must be positive, got {self.loraplus}.")


@dataclass(frozen=True)
class Train:
    """`batch` examples make one step, in `accumulate` parts; intervals are in steps; `eval_batches` limits
    each evaluation.

    `pack`: the number of rows that hold the examples of a step, several in each; null: a row each. The loss
    and the gradient are the same, with less padding. Fewer rows have less of it, and attention costs more the
    longer they are. It is a multiple of the devices along data and fsdp times `accumulate`. Evaluation has a
    row for each example.

    `buckets`: of so many batches in a row, the examples are sorted by length before they are cut into
    batches, so that short ones do not pay for long ones; null: the batches are drawn at random. Each epoch
    has every example once either way.

    `dropout`: of the base's own layers in training, attention's included, and `head_dropout` before a head of
    classes; null is 0. Both are of tasks of labels. `patience`: training stops after so many evaluations
    without a better one, by the metric or the loss.

    `not_finite`: a step whose loss or gradient is not finite changes nothing; "stop" then ends the run,
    "skip" goes on, and either keeps the batch in the work directory. `result`: what is exported: "last", what
    the last step left; "best", what was the best in validation, by the task's metric or the loss; "mean", the
    mean of the `keep_checkpoints` newest checkpoints.
    """

    steps: int
    batch: int
    lr: float
    warmup: int = 0
    accumulate: int = 1
    pack: int | None = None
    buckets: int | None = None
    dropout: float | None = None
    head_dropout: float | None = None
    patience: int | None = None
    label_smoothing: float = 0.0
    log_every: int = 10
    eval_every: int = 500
    eval_batches: int | None = None
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    not_finite: Literal["stop", "skip"] = "stop"
    result: Literal["last", "best", "mean"] = "last"

    def __post_init__(self):
        at_least(
            1,
            "train",
            self,
            "steps",
            "batch",
            "accumulate",
            "pack",
            "buckets",
            "patience",
            "log_every",
            "eval_every",
            "eval_batches",
            "checkpoint_every",
            "keep_checkpoints",
        )
        at_least(0, "train", self, "lr")
        if self.batch % self.accumulate:
            raise ValueError(
                f"`train.batch` ({self.batch}) must be a multiple of `train.accumulate` ({self.accumulate})."
            )
        if self.pack is not None and self.pack > self.batch:
            raise ValueError(
                f"`train.pack` is {self.pack}, the rows that the examples of a step share, and "
                "`train.batch` is "
                f"{self.batch}: set fewer rows, or leave `train.pack` out for a row each."
            )
        if self.pack is not None and self.buckets is not None:
            raise ValueError(
                f"`train.pack` is {self.pack} and `train.buckets` is {self.buckets}: rows that examples "
                "share "
                "are about equally long already, so leave `train.buckets` out."
            )
        for name in ("dropout", "head_dropout"):
            rate = getattr(self, name)
            if rate is not None and not 0 <= rate < 1:
                raise ValueError(f"`train.{name}` must be at least 0 and less than 1, got {rate}.")
        if not 0 <= self.warmup <= self.steps:
            raise ValueError(
                f"`train.warmup` must be between 0 and `train.steps` ({self.steps}), got {self.warmup}."
            )
        if self.result == "mean" and -(-self.steps // self.checkpoint_every) < self.keep_checkpoints:
            raise ValueError(
                f'`train.result` "mean" is of `train.keep_checkpoints` ({self.keep_checkpoints}), '
                f"and {self.steps} steps with `train.checkpoint_every` "
                f"{self.checkpoint_every} make fewer: save more often, or keep fewer."
            )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"`train.label_smoothing` must be at least 0 and less than 1, got {self.label_smoothing}."
            )
