"""A training step on a mesh, assembled once: of arrays, as a run trains them, and of their shapes, as a plan
compiles them.

The batch, and activations with it, is split over the mesh's data and fsdp axes, weights over fsdp and
tensor, and the optimiser's moments follow the arrays they belong to. Left out: which examples make a step
and how often it is done, which is the trainer's.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import lora_jax
from experiments.config import AXES, Mesh as MeshSection, Optimizer, Train
from experiments.tasks.losses import of_labels
from experiments.training import loss as losses, optimizer
from experiments.training.spread import EXAMPLES, spread
from experiments.training.step import compiled_for, step_of
from lora_jax.methods import orthogonality
from lora_jax.sharding import delta_specs, frozen_specs, gather_codes, partition_specs, Rules, shardings


# The parts of a batch come one after the other, and the examples of each are spread.
BATCH = P(None, EXAMPLES)
# Folds the key of a step into that of the model's own dropout.
DROPOUT = 0x64726F70


def make_mesh(section: MeshSection) -> Mesh:
    """A mesh with the axes data, fsdp and tensor over the first devices, or over all of several
    processes; one device is the trivial mesh.

    Raises:
      ValueError: there are fewer devices; several processes would leave one of theirs idle.
    """
    shape = tuple(getattr(section, name) for name in AXES)
    count, devices = math.prod(shape), jax.devices()
    asked = f"`mesh` {' x '.join(map(str, shape))}"
    if count > len(devices):
        virtual = (
            ""
            if devices[0].platform != "cpu"
            else ", or try it on virtual ones: set the environment variable "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
        raise ValueError(
            f"{asked} needs {count} devices, but there are {len(devices)}. "
            f"Set smaller sizes in `mesh`{virtual}."
        )
    if jax.process_count() > 1 and count < len(devices):
        raise ValueError(
            f"{asked} takes {count} devices, and the {jax.process_count()} processes have {len(devices)}, "
            "of which none may be idle: "
            f"set `mesh.data` to {len(devices) // (section.fsdp * section.tensor)}, for example, or start "
            "fewer processes."
        )
    return Mesh(np.asarray(devices[:count]).reshape(shape), AXES)


def on_mesh(mesh: Mesh, params: Any, rules: Rules) -> tuple[Any, Any]:
    """The base's weights on the mesh, and their specs."""
    specs = partition_specs(params, rules)
    return _put(params, shardings(mesh, specs, params)), specs


def dropping(model: Any, train: Train) -> Any:
    """`model` with the dropout of training, which its config names for other tools as it was."""
    rates = dict.fromkeys(_DROPOUT, train.dropout or 0.0) | dict.fromkeys(
        _HEAD_DROPOUT, train.head_dropout or 0.0
    )
    known = {field.name for field in fields(model.config)}
    changed = {name: rate for name, rate in rates.items() if name in known}
    return model.clone(config=replace(model.config, **changed))


_DROPOUT = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "embd_pdrop", "attn_pdrop", "resid_pdrop"),
    *("attention_dropout", "pooler_dropout"),
)
_HEAD_DROPOUT = ("classifier_dropout", "cls_dropout")


@dataclass(frozen=True)
class ShardedStep:
    """A step on a mesh: the adapted forward pass, the update rule and the frozen weights, which are arrays or
    shapes.

    `penalty`: a part of the loss that depends on what trains alone. `accumulate`: the parts of a batch.
    `smoothing`: of the labels, in training. `reduce`: the dtype of sums (`precision.reduce`). `losses_of`:
    the task's loss. `drops`: whether the model's own layers have dropout in training.
    """

    mesh: Mesh
    forward: Callable
    frozen: Any
    tx: optax.GradientTransformation
    penalty: Callable | None
    accumulate: int
    smoothing: float
    reduce: Any
    losses_of: Callable
    drops: bool = False

    @classmethod
    def create(
        cls,
        mesh: Mesh,
        apply: Callable,
        frozen: Any,
        delta: Any,
        specs: Any,
        *,
        section: Optimizer,
        train: Train,
        quantize: str | None = None,
        reduce: Any = "float32",
        losses_of: Callable = of_labels,
    ) -> "ShardedStep":
        """`specs`: of the base. What the method keeps beside the weights, and the codes of quantised
        ones, lie where their weights do.
        """
        if quantize is not None:
            frozen = gather_codes(lora_jax.quantize(frozen, quantize, delta=delta), specs, mesh)
        frozen = _put(frozen, shardings(mesh, frozen_specs(frozen, specs), frozen))
        budget = section.adalora
        return cls(
            mesh,
            lora_jax.adapt(spread(apply, mesh), reduce=reduce),
            frozen,
            optimizer.for_adapters(section, train, frozen, delta),
            None if budget is None else lambda delta: budget.orthogonality * orthogonality(delta),
            train.accumulate,
            train.label_smoothing,
            reduce,
            losses_of,
            bool(train.dropout or train.head_dropout),
        )

    def of_full(self, frozen: Any, section: Optimizer, train: Train) -> "ShardedStep":
        """The same for full fine-tuning: without the rules of a method."""
        return replace(self, frozen=frozen, tx=optimizer.create(section, train), penalty=None)

    def start(self, delta: Any, specs: Any) -> tuple[Any, Any]:
        """`delta` and the optimiser's state before the first step, where they lie on the mesh."""
        placed = shardings(self.mesh, delta_specs(delta, specs), delta)
        delta = _put(delta, placed)
        state = jax.eval_shape(self.tx.init, delta)
        layout = optimizer.state_shardings(self.tx, state, placed, self.everywhere)
        if _are_shapes(delta):
            return delta, _put(state, layout)
        # Copied, since steps give these buffers away: a leaf that trains itself would otherwise be the base's
        # own.
        delta = jax.tree.map(jnp.copy, delta)
        return delta, jax.jit(self.tx.init, out_shardings=layout)(delta)

    @property
    def everywhere(self) -> NamedSharding:
        """Whole on every device."""
        return NamedSharding(self.mesh, P())

    def loss(
        self, delta: Any, frozen: Any, piece: dict, key: jax.Array | None = None, smoothing: float = 0.0
    ) -> tuple[jax.Array, jax.Array]:
        """Summed loss and number of what is counted, of one part of a batch; random only with a key."""
        params = lora_jax.combine(frozen, delta, key=key)
        model = functools.partial(self.forward, {"params": params})
        if self.drops and key is not None:
            # Other draws than the adapters', which have folds of the key of their own.
            rngs = {"dropout": jax.random.fold_in(key, DROPOUT)}
            model = functools.partial(model, deterministic=False, rngs=rngs)
        return losses.masked_sum(*self.losses_of(model, piece, smoothing), self.reduce)

    def judged(self, delta: Any, frozen: Any, piece: dict) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`loss` without a key, and what the model returned to the task's loss: of each example, where one
        has several rows.
        """
        params, found = lora_jax.combine(frozen, delta), []

        def model(*args: Any, **kwargs: Any) -> jax.Array:
            found.append(self.forward({"params": params}, *args, **kwargs))
            return found[-1]

        total, count = losses.masked_sum(*self.losses_of(model, piece, 0.0), self.reduce)
        outputs, examples = found[-1], len(piece["labels"])
        return total, count, outputs if len(outputs) == examples else outputs.reshape(examples, -1)

    def function(self, delta: Any, opt_state: Any, frozen: Any, batch: dict, key: jax.Array) -> tuple:
        """`step_of` this loss: delta, opt_state and numbers."""
        smoothed = functools.partial(self.loss, smoothing=self.smoothing)
        step = step_of(smoothed, self.tx, self.accumulate, self.penalty, self.reduce)
        return step(delta, opt_state, frozen, batch, key)

    def compiled(self, delta: Any, opt_state: Any) -> jax.stages.Wrapped:
        """`function`, compiled for arrays that lie as these do."""
        return compiled_for(self.function, delta, opt_state, self.mesh)


def _are_shapes(tree: Any) -> bool:
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def _put(tree: Any, where: Any) -> Any:
    """Arrays are moved to `where`; shapes say that they lie there."""
    if not _are_shapes(tree):
        return jax.device_put(tree, where)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, where
    )
