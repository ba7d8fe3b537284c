"""The training loop: one compiled step over a mesh, checkpoints, and nothing that a resumed run would do differently.

What a step does depends on (config, base, data, step) and on nothing else: its examples come from `order`, its random key is the
run's key folded with the step, its rate from the schedule. The batch, and activations with it, is split over the mesh's data and fsdp
axes, weights over fsdp and tensor, and the optimiser's moments follow the arrays they belong to.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from experiments import loss as losses
from experiments import optimizer, order
from experiments.config import Config
from experiments.config import Mesh as MeshSection
from experiments.preemption import Asked
from experiments.progress import Record
from experiments.spread import EXAMPLES, spread
from experiments.tasks.examples import Splits
from lora_jax.checkpoint import Checkpoints, State
from lora_jax.methods import orthogonality
from lora_jax.sharding import Rules, delta_specs, frozen_specs, partition_specs, shardings

# A step's batch is (accumulate, examples, tokens): the parts come one after the other, the examples of each are spread.
BATCH = P(None, EXAMPLES, None)


def make_mesh(section: MeshSection) -> Mesh:
    """A mesh with the axes data, fsdp and tensor over the first devices; one device is the trivial mesh."""
    shape = (section.data, section.fsdp, section.tensor)
    count, devices = math.prod(shape), jax.devices()
    if count > len(devices):
        raise ValueError(f"`mesh` {section.data} x {section.fsdp} x {section.tensor} needs {count} devices, but there are {len(devices)}")
    return Mesh(np.asarray(devices[:count]).reshape(shape), ("data", "fsdp", "tensor"))


def place(mesh: Mesh, params: Any, rules: Rules) -> tuple[Any, Any]:
    """The base's weights on the mesh, and their specs."""
    specs = partition_specs(params, rules)
    return jax.device_put(params, shardings(mesh, specs, params)), specs


@dataclass(frozen=True)
class Trainer:
    """Everything of a run that stays the same: the adapted forward pass, the update rule, the mesh and the frozen weights.

    `penalty` is a part of the loss that depends on what trains alone.
    """

    config: Config
    mesh: Mesh
    forward: Callable
    frozen: Any
    tx: optax.GradientTransformation
    penalty: Callable | None = None

    @classmethod
    def create(cls, config: Config, mesh: Mesh, apply: Callable, frozen: Any, delta: Any, specs: Any) -> "Trainer":
        """`specs`: of the base. What the method keeps beside the weights is placed as they are; quantised weights are everywhere."""
        if config.quantize is not None:
            frozen = lora_jax.quantize(frozen, config.quantize, delta=delta)
        frozen = jax.device_put(frozen, shardings(mesh, frozen_specs(frozen, specs), frozen))
        tx, budget = optimizer.for_adapters(config.optimizer, config.train, frozen, delta), config.optimizer.adalora
        penalty = None if budget is None else lambda delta: budget.orthogonality * orthogonality(delta)
        return cls(config, mesh, lora_jax.adapt(spread(apply, mesh)), frozen, tx, penalty)

    def of_full(self, frozen: Any) -> "Trainer":
        """The same for full fine-tuning: without the rules of a method."""
        return replace(self, frozen=frozen, tx=optimizer.create(self.config.optimizer, self.config.train), penalty=None)

    def start(self, delta: Any, specs: Any, key: jax.Array) -> State:
        """The state before the first step, every array where it belongs on the mesh."""
        placed = shardings(self.mesh, delta_specs(delta, specs), delta)
        # Copied, since steps give these buffers away: a leaf that trains itself would otherwise be the base's own.
        delta = jax.tree.map(jnp.copy, jax.device_put(delta, placed))
        shapes = jax.eval_shape(self.tx.init, delta)
        everywhere = NamedSharding(self.mesh, P())
        # Moments are trees like `delta`, and take its shardings, but for leaves that a rule passes over; counters and the like are everywhere.
        masked = lambda node: isinstance(node, optax.MaskedNode)  # noqa: E731
        follow = lambda leaf, where: leaf if masked(leaf) else where  # noqa: E731
        layout = optax.tree_map_params(self.tx, follow, shapes, placed, transform_non_params=lambda _: everywhere, is_leaf=masked)
        opt_state = jax.jit(self.tx.init, out_shardings=layout)(delta)
        return State(delta, opt_state, 0, (0, 0), key)

    def loss(self, delta: Any, frozen: Any, batch: dict, key: jax.Array | None = None, smoothing: float = 0.0) -> tuple:
        """Summed loss and number of counted tokens of one part of a batch; random only with a key."""
        params = lora_jax.combine(frozen, delta, key=key)
        logits = self.forward({"params": params}, batch["input_ids"])
        return losses.masked_sum(logits, batch["labels"], batch["mask"], smoothing)

    def step(self, delta: Any, opt_state: Any, frozen: Any, batch: dict, key: jax.Array) -> tuple:
        """One update. Gradients of the parts' sums are added and divided by the tokens of all parts: the whole batch's gradient."""
        smoothing, accumulate = self.config.train.label_smoothing, self.config.train.accumulate
        gradient = jax.value_and_grad(self.loss, has_aux=True)

        def part(index: jax.Array | int) -> tuple:
            piece = jax.tree.map(lambda array: array[index], batch)
            (total, count), grads = gradient(delta, frozen, piece, jax.random.fold_in(key, index), smoothing)
            return total, count, grads

        sums = part(0)
        if accumulate > 1:
            add = lambda index, sums: jax.tree.map(lambda old, new: old + new, sums, part(index))  # noqa: E731
            sums = jax.lax.fori_loop(1, accumulate, add, sums)
        total, count, grads = sums
        grads = jax.tree.map(lambda grad: losses.mean(grad, count.astype(grad.dtype)), grads)
        if self.penalty is not None:
            grads = jax.tree.map(jnp.add, grads, jax.grad(self.penalty)(delta))
        updates, opt_state = self.tx.update(grads, opt_state, delta)
        numbers = {"loss": losses.mean(total, count), "gradient_norm": optax.tree.norm(grads)}
        return optax.apply_updates(delta, updates), opt_state, numbers

    def compiled_step(self, state: State) -> Callable:
        """`step` compiled, its first two arguments donated, so that delta and moments are updated in place."""
        where = lambda tree: jax.tree.map(lambda leaf: leaf.sharding, tree)  # noqa: E731
        everywhere = NamedSharding(self.mesh, P())
        results = (where(state.delta), where(state.opt_state), {"loss": everywhere, "gradient_norm": everywhere})
        return jax.jit(self.step, donate_argnums=(0, 1), out_shardings=results)

    def device_batch(self, arrays: dict[str, np.ndarray], accumulate: int) -> dict[str, jax.Array]:
        """A host batch in `accumulate` parts, each spread over the mesh."""
        parts = {name: array.reshape(accumulate, -1, array.shape[-1]) for name, array in arrays.items()}
        return jax.device_put(parts, NamedSharding(self.mesh, BATCH))

    def evaluate(self, compiled: Callable, delta: Any, examples: Any) -> float:
        """Negative log-likelihood a counted token over the validation examples, without dropout or smoothing."""
        total = count = 0.0
        for batch in evaluation_batches(examples, self.config.train.batch, self.config.train.eval_batches):
            part = jax.tree.map(lambda array: array[0], self.device_batch(batch, 1))
            numbers = compiled(delta, self.frozen, part)
            total, count = total + float(numbers[0]), count + float(numbers[1])
        return float(losses.mean(total, count))

    def fit(self, state: State, splits: Splits, checkpoints: Checkpoints, record: Record, stop_after: int | None = None) -> State:
        """Trains from `state` to the last step, or until SIGTERM, after which it saves and returns what it has.

        `stop_after` ends it early, after that step's checkpoint, as a lost machine would.
        """
        train, config = self.config.train, self.config
        step, evaluate = self.compiled_step(state), jax.jit(self.loss)
        rate = optimizer.warmup_linear(train)
        size = len(splits.train)
        if state.step % train.eval_every == 0 and not record.evaluated(state.step):
            record.log(state.step, valid_loss=self.evaluate(evaluate, state.delta, splits.valid))
        started, since = time.perf_counter(), state.step
        with Asked() as asked:
            for number in range(state.step, train.steps):
                arrays = splits.train.batch(order.indices(config.seed, number, size, train.batch))
                batch = self.device_batch(arrays, train.accumulate)
                delta, opt_state, numbers = step(state.delta, state.opt_state, self.frozen, batch, jax.random.fold_in(state.key, number))
                done = number + 1
                state = State(delta, opt_state, done, order.epoch_and_position(done, size, train.batch), state.key)
                record.advance(done)
                if done % train.log_every == 0 or done == train.steps:
                    values = {name: float(value) for name, value in numbers.items()}
                    if not math.isfinite(values["loss"]):
                        raise ValueError(f"the loss of step {done} is {values['loss']}: lower `train.lr`, or set `optimizer.clip`")
                    now = time.perf_counter()
                    seconds = (now - started) / (done - since)
                    record.log(done, **values, lr=float(rate(number)), seconds_per_step=seconds, tokens=int(arrays["mask"].sum()))
                    started, since = now, done
                if (done % train.eval_every == 0 or done == train.steps) and not asked:
                    record.log(done, valid_loss=self.evaluate(evaluate, state.delta, splits.valid))
                    started, since = time.perf_counter(), done
                if done % train.checkpoint_every == 0 or done == train.steps or asked:
                    checkpoints.save(state)
                    started, since = time.perf_counter(), done
                if done == stop_after or asked:
                    break
        return state


def evaluation_batches(examples: Any, batch: int, limit: int | None) -> Iterator[dict[str, np.ndarray]]:
    """Every example once, in order; the last batch is filled with copies that count for nothing."""
    batches = order.batches_per_epoch(len(examples), batch)
    for number in range(batches if limit is None else min(limit, batches)):
        rows = np.arange(number * batch, (number + 1) * batch)
        arrays = examples.batch(np.minimum(rows, len(examples) - 1))
        arrays["mask"] = arrays["mask"] * (rows < len(examples))[:, None]
        yield arrays
