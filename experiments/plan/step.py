"""One training step of a plan: the function, the shapes of what it takes, and where on the mesh each of them
lies.

It is the trainer's step (`training/step.py`) of the loss on counted tokens (or on labels, for an encoder).
Layers are under `scan`, and activations are kept split by example (`spread`). A plan's dtype is that of
parameters and computation; the rest of the precision is a run's default. Left out: label smoothing and
clipping, and dropout outside of the adapters, which no run has.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import lora_jax
from experiments.config import Budget, Mesh as MeshSection, Optimizer, Precision, Train
from experiments.plan.devices import AXES
from experiments.plan.models import Subject
from experiments.training import loss as losses, optimizer
from experiments.training.spread import EXAMPLES, spread
from experiments.training.step import compiled_for, step_of
from lora_jax import Full
from lora_jax.methods import orthogonality
from lora_jax.sharding import delta_specs, frozen_specs, gather_codes, partition_specs, shardings


@dataclass(frozen=True)
class Workload:
    """What a step is asked to do. `targets`: None for the model's own, query and value."""

    batch: int
    tokens: int
    method: Any
    targets: tuple[str, ...] | None = None
    optimizer: str = "adamw"
    accumulate: int = 1
    quantize: str | None = None


@dataclass(frozen=True)
class Step:
    """`function(delta, opt_state, frozen, batch, key)`, and shapes with shardings for its arguments."""

    function: Callable
    mesh: Mesh
    params: Any
    delta: Any
    opt_state: Any
    frozen: Any
    batch: Any
    key: Any

    @property
    def arguments(self) -> tuple:
        return self.delta, self.opt_state, self.frozen, self.batch, self.key

    def lower(self) -> Any:
        return compiled_for(self.function, self.delta, self.opt_state, self.mesh).lower(*self.arguments)


def make_mesh(section: MeshSection) -> Mesh:
    shape = tuple(getattr(section, name) for name in AXES)
    return Mesh(np.asarray(jax.devices()[: np.prod(shape)]).reshape(shape), AXES)


def training_step(subject: Subject, mesh: Mesh, work: Workload) -> Step:
    """The step, from shapes alone. Raises `ValueError` for a workload that the model or the mesh does not
    allow.
    """
    params = shapes_of(subject)
    frozen, delta = lora_jax.lorafy(
        params, targets_of(subject, work), method=work.method, fn=applied(subject), args=(_ids(1, 2),)
    )
    specs = partition_specs(params, subject.model.partition_rules)
    if work.quantize is not None:
        frozen = gather_codes(lora_jax.quantize(frozen, work.quantize, delta=delta), specs, mesh)
    adalora = type(work.method).__name__ == "AdaLoRA"
    section = Optimizer(work.optimizer, adalora=Budget(target_rank=work.method.rank) if adalora else None)
    tx = optimizer.for_adapters(section, Train(steps=1000, batch=work.batch, lr=1e-4), frozen, delta)

    placed = shardings(mesh, delta_specs(delta, specs), delta)
    everywhere = NamedSharding(mesh, P())
    opt_state = jax.eval_shape(tx.init, delta)
    layout = optimizer.state_shardings(tx, opt_state, placed, everywhere)
    return Step(
        _function(subject, mesh, work, tx, orthogonality if adalora else None),
        mesh,
        params,
        _at(delta, placed),
        _at(opt_state, layout),
        _at(frozen, shardings(mesh, frozen_specs(frozen, specs), frozen)),
        _batch(subject, mesh, work),
        _at(jax.eval_shape(lambda: jax.random.key(0)), everywhere),
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


def _ids(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _batch(subject: Subject, mesh: Mesh, work: Workload) -> dict[str, Any]:
    # The parts come one after the other, the examples of each are spread.
    examples, tokens = (work.accumulate, work.batch // work.accumulate), work.tokens
    names = {"input_ids": (tokens,), "labels": (tokens,), "mask": (tokens,)}
    if subject.classifies:
        names = {"input_ids": (tokens,), "labels": (), "attention_mask": (tokens,)}
    return {
        name: _at(_ids(*examples, *rest), NamedSharding(mesh, P(None, EXAMPLES)))
        for name, rest in names.items()
    }


def _at(tree: Any, where: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, where
    )


def _function(
    subject: Subject, mesh: Mesh, work: Workload, tx: optax.GradientTransformation, penalty: Callable | None
) -> Callable:
    forward = lora_jax.adapt(spread(subject.model.apply, mesh), reduce=Precision().reduce)

    def loss(delta: Any, frozen: Any, piece: dict, key: jax.Array) -> tuple:
        params = {"params": lora_jax.combine(frozen, delta, key=key)}
        if subject.classifies:
            logits = forward(params, piece["input_ids"], piece["attention_mask"])
            return losses.masked_sum(logits, piece["labels"], jnp.ones(piece["labels"].shape))
        return losses.masked_sum(forward(params, piece["input_ids"]), piece["labels"], piece["mask"])

    return step_of(loss, tx, work.accumulate, penalty)
