"""One training step of a plan: the function, and the shapes of its arguments with their places on the mesh.

It is the trainer's step (`training/sharded.py`), of shapes. The loss is on counted tokens, or on labels for
an encoder. Layers are under `scan`. A plan's dtype is that of parameters and computation; the rest of the
precision is a run's default. Left out: label smoothing and
clipping, and dropout outside of the adapters, which no run has.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

import lora_jax
from experiments.config import Budget, Optimizer, Precision, Train
from experiments.plan.models import Subject
from experiments.training.sharded import BATCH, ShardedStep
from lora_jax import AdaLoRA, Full
from lora_jax.sharding import partition_specs


@dataclass(frozen=True)
class Workload:
    """What a step is asked to do. `targets`: None for the model's own, query and value. `counted`: the tokens
    of an example that have a loss; None for all. `packed`: the rows hold several examples each, so that
    `batch`, `tokens` and `counted` are of rows."""

    batch: int
    tokens: int
    method: Any
    targets: tuple[str, ...] | None = None
    optimizer: Literal["adamw", "adamw_authors"] = "adamw"
    accumulate: int = 1
    quantize: str | None = None
    counted: int | None = None
    packed: bool = False


@dataclass(frozen=True)
class Step:
    """A step of shapes: the base's `params`, and the arguments of the step with their shardings."""

    sharded: ShardedStep
    params: Any
    delta: Any
    opt_state: Any
    batch: Any
    key: Any

    @property
    def mesh(self) -> Mesh:
        return self.sharded.mesh

    @property
    def frozen(self) -> Any:
        return self.sharded.frozen

    @property
    def function(self) -> Callable:
        return self.sharded.function

    @property
    def arguments(self) -> tuple:
        return self.delta, self.opt_state, self.frozen, self.batch, self.key

    def lower(self) -> Any:
        return self.sharded.compiled(self.delta, self.opt_state).lower(*self.arguments)


def training_step(subject: Subject, mesh: Mesh, work: Workload) -> Step:
    """The step, from shapes alone.

    Raises:
      ValueError: the model or the mesh does not allow the workload.
    """
    params = shapes_of(subject)
    frozen, delta = lora_jax.lorafy(
        params,
        targets_of(subject, work),
        method=work.method,
        fn=applied(subject),
        args=(jax.ShapeDtypeStruct((1, 2), jnp.int32),),
    )
    adalora = isinstance(work.method, AdaLoRA)
    section = Optimizer(work.optimizer, adalora=Budget(target_rank=work.method.rank) if adalora else None)
    train = Train(steps=1000, batch=work.batch, lr=1e-4, accumulate=work.accumulate)
    specs = partition_specs(params, subject.model.partition_rules)
    sharded = ShardedStep.create(
        mesh,
        subject.model.apply,
        frozen,
        delta,
        specs,
        section=section,
        train=train,
        quantize=work.quantize,
        reduce=Precision().reduce,
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    return Step(
        sharded,
        params,
        *sharded.start(delta, specs),
        _batch(subject, mesh, work),
        jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharded.everywhere),
    )


def shapes_of(subject: Subject) -> Any:
    return jax.eval_shape(subject.model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]


def applied(subject: Subject) -> Callable:
    return lambda params, ids: subject.model.apply({"params": params}, ids)


def targets_of(subject: Subject, work: Workload) -> Any:
    """With an encoder's head, which is new and has to train whatever else does."""
    if isinstance(work.method, Full) and work.targets is None:
        return ".*"
    targets = dict.fromkeys(work.targets or (subject.targets,), work.method)
    if "all-linear" in targets:
        return "all-linear"
    return targets if subject.head is None else {subject.head: Full(), **targets}


def _batch(subject: Subject, mesh: Mesh, work: Workload) -> dict[str, Any]:
    examples, tokens = (work.accumulate, work.batch // work.accumulate), work.tokens
    counted = tokens if work.counted is None else work.counted
    names: dict[str, tuple[int, ...]] = {"input_ids": (tokens,), "labels": (counted,), "mask": (counted,)}
    if work.counted is not None:
        names["columns"] = (counted,)
    if work.packed:
        names["segment_ids"] = (tokens,)
    if subject.classifies:
        names = {
            "input_ids": (tokens,),
            "labels": (),
            "attention_mask": (tokens,),
        }
    sharding = NamedSharding(mesh, BATCH)
    return {
        name: jax.ShapeDtypeStruct((*examples, *rest), jnp.int32, sharding=sharding)
        for name, rest in names.items()
    }
