"""The training loop: one compiled step over a mesh, checkpoints, and nothing that a resumed run would do
differently.

What a step does depends on (config, base, data, step) and on nothing else: its examples come from `order`,
its random key is the run's key folded with the step, its rate from the schedule. The batch, and activations
with it, is split over the mesh's data and fsdp axes, weights over fsdp and tensor, and the optimiser's
moments follow the arrays they belong to.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import lora_jax
from experiments.config import Config, Mesh as MeshSection
from experiments.running.preemption import Asked
from experiments.running.progress import Record
from experiments.tasks.examples import Splits
from experiments.training import loss as losses, optimizer, order, precision
from experiments.training.due import due
from experiments.training.guards import BY, Guards, not_finite_steps
from experiments.training.spread import EXAMPLES, spread
from experiments.training.step import compiled_for, step_of
from lora_jax.checkpoint import Checkpoints, State
from lora_jax.methods import orthogonality
from lora_jax.processes import on_first
from lora_jax.sharding import delta_specs, frozen_specs, gather_codes, partition_specs, Rules, shardings


# A step's batch is (accumulate, examples, tokens): the parts come one after the other, the examples of each
# are spread.
BATCH = P(None, EXAMPLES, None)


def make_mesh(section: MeshSection) -> Mesh:
    """A mesh with the axes data, fsdp and tensor over the first devices, or over all of several
    processes; one device is the trivial mesh.
    """
    shape = (section.data, section.fsdp, section.tensor)
    count, devices = math.prod(shape), jax.devices()
    asked = f"`mesh` {section.data} x {section.fsdp} x {section.tensor}"
    if count > len(devices):
        raise ValueError(f"{asked} needs {count} devices, but there are {len(devices)}")
    if jax.process_count() > 1 and count < len(devices):
        raise ValueError(
            f"{asked} takes {count} devices, and the {jax.process_count()} processes have {len(devices)}, "
            "of which none may be idle: "
            f"set `mesh.data` to {len(devices) // (section.fsdp * section.tensor)}, for example, or start "
            "fewer processes"
        )
    return Mesh(np.asarray(devices[:count]).reshape(shape), ("data", "fsdp", "tensor"))


def place(mesh: Mesh, params: Any, rules: Rules) -> tuple[Any, Any]:
    """The base's weights on the mesh, and their specs."""
    specs = partition_specs(params, rules)
    return jax.device_put(params, shardings(mesh, specs, params)), specs


@dataclass(frozen=True)
class Trainer:
    """Everything of a run that stays the same: the adapted forward pass, the update rule, the mesh and the
    frozen weights.

    `penalty` is a part of the loss that depends on what trains alone.
    """

    config: Config
    mesh: Mesh
    forward: Callable
    frozen: Any
    tx: optax.GradientTransformation
    penalty: Callable | None = None

    @classmethod
    def create(
        cls, config: Config, mesh: Mesh, apply: Callable, frozen: Any, delta: Any, specs: Any
    ) -> "Trainer":
        """`specs`: of the base. What the method keeps beside the weights, and the codes of quantised
        ones, are placed as they are.
        """
        if config.quantize is not None:
            frozen = gather_codes(lora_jax.quantize(frozen, config.quantize, delta=delta), specs, mesh)
        frozen = jax.device_put(frozen, shardings(mesh, frozen_specs(frozen, specs), frozen))
        tx, budget = (
            optimizer.for_adapters(config.optimizer, config.train, frozen, delta),
            config.optimizer.adalora,
        )
        penalty = None if budget is None else lambda delta: budget.orthogonality * orthogonality(delta)
        return cls(
            config,
            mesh,
            lora_jax.adapt(spread(apply, mesh), reduce=config.precision.reduce),
            frozen,
            tx,
            penalty,
        )

    def of_full(self, frozen: Any) -> "Trainer":
        """The same for full fine-tuning: without the rules of a method."""
        return replace(
            self, frozen=frozen, tx=optimizer.create(self.config.optimizer, self.config.train), penalty=None
        )

    def start(self, delta: Any, specs: Any, key: jax.Array) -> State:
        """The state before the first step, every array where it belongs on the mesh."""
        placed = shardings(self.mesh, delta_specs(delta, specs), delta)
        delta = precision.trained(delta, self.config.precision)
        # Copied, since steps give these buffers away: a leaf that trains itself would otherwise be the base's
        # own.
        delta = jax.tree.map(jnp.copy, jax.device_put(delta, placed))
        layout = optimizer.state_shardings(
            self.tx, jax.eval_shape(self.tx.init, delta), placed, NamedSharding(self.mesh, P())
        )
        opt_state = jax.jit(self.tx.init, out_shardings=layout)(delta)
        return State(delta, opt_state, 0, (0, 0), key)

    def loss(
        self, delta: Any, frozen: Any, batch: dict, key: jax.Array | None = None, smoothing: float = 0.0
    ) -> tuple:
        """Summed loss and number of counted tokens of one part of a batch; random only with a key."""
        params = lora_jax.combine(frozen, delta, key=key)
        logits = self.forward({"params": params}, batch["input_ids"])
        return losses.masked_sum(
            logits, batch["labels"], batch["mask"], smoothing, self.config.precision.reduce
        )

    def compiled_step(self, state: State) -> Callable:
        """`step_of` this run's loss, compiled for arrays that lie as those of `state` do."""
        train = self.config.train
        smoothed = functools.partial(self.loss, smoothing=train.label_smoothing)
        return compiled_for(
            step_of(smoothed, self.tx, train.accumulate, self.penalty, self.config.precision.reduce),
            state.delta,
            state.opt_state,
            self.mesh,
        )

    def device_batch(self, examples: Any, indices: np.ndarray, accumulate: int = 1) -> dict[str, jax.Array]:
        """These examples in `accumulate` parts, each spread over the mesh. A process reads the rows of
        its own devices; of `-1`, which is none, nothing is counted.
        """
        rows, width, sharding = (
            indices.reshape(accumulate, -1),
            examples.width(indices),
            NamedSharding(self.mesh, BATCH),
        )
        read: dict[str, dict[str, np.ndarray]] = {}

        def part(name: str, index: tuple[slice, ...]) -> np.ndarray:
            key = str(index)  # slices can be keys from Python 3.12 on
            if key not in read:
                wanted = rows[index[:2]]
                arrays = examples.batch(wanted.reshape(-1), width)
                arrays["mask"] = arrays["mask"] * (wanted.reshape(-1, 1) >= 0)
                read[key] = {name: array.reshape(*wanted.shape, width) for name, array in arrays.items()}
            return read[key][name]

        make = functools.partial(jax.make_array_from_callback, (*rows.shape, width), sharding)
        return {name: make(functools.partial(part, name)) for name in ("input_ids", "labels", "mask")}

    def evaluate(self, compiled: Callable, delta: Any, examples: Any) -> float:
        """Negative log-likelihood a counted token over the validation examples, without dropout or
        smoothing.
        """
        total = count = 0.0
        for indices in evaluation_batches(
            len(examples), self.config.train.batch, self.config.train.eval_batches
        ):
            part = jax.tree.map(lambda array: array[0], self.device_batch(examples, indices))
            numbers = compiled(delta, self.frozen, part)
            total, count = total + float(numbers[0]), count + float(numbers[1])
        return float(losses.mean(total, count))

    def fit(
        self,
        state: State,
        splits: Splits,
        checkpoints: Checkpoints,
        record: Record,
        stop_after: int | None = None,
    ) -> State:
        """Trains from `state` to the last step, or until SIGTERM, after which it saves and returns what it
        has.

        `stop_after` ends it early, after that step's checkpoint, as a lost machine would. Raises `NotFinite`
        as `train.not_finite` says.
        """
        train, config, size = self.config.train, self.config, len(splits.train)
        step, evaluate = (
            self.compiled_step(state),
            jax.jit(self.loss, out_shardings=NamedSharding(self.mesh, P())),
        )
        rate = optimizer.warmup_linear(train)

        def indices(done: int) -> np.ndarray:
            return order.indices(config.seed, done - 1, size, train.batch)

        def host_batch(done: int) -> tuple[np.ndarray, dict]:
            return indices(done), splits.train.batch(indices(done))

        before = on_first(lambda: not_finite_steps(record.directory, state.step))
        guards = Guards(
            state.delta,
            record.directory,
            host_batch,
            skip=train.not_finite == "skip",
            say=record.note,
            before=before,
        )
        with Asked() as asked:
            if state.step % train.eval_every == 0 and not on_first(lambda: record.evaluated(state.step)):
                record.log(state.step, valid_loss=self.evaluate(evaluate, state.delta, splits.valid))
            started, since = time.perf_counter(), state.step
            for number in range(state.step, train.steps):
                done = number + 1
                batch = self.device_batch(splits.train, indices(done), train.accumulate)
                delta, opt_state, numbers = step(
                    state.delta, state.opt_state, self.frozen, batch, jax.random.fold_in(state.key, number)
                )
                state = State(
                    delta, opt_state, done, order.epoch_and_position(done, size, train.batch), state.key
                )
                guards.add(done, numbers)
                record.advance(done)
                stop = asked()
                now_due = due(done, train, stop)
                if now_due.any() or done == BY:
                    guards.check()
                if now_due.log:
                    now = time.perf_counter()
                    values = {name: float(numbers[name]) for name in ("loss", "gradient_norm")}
                    record.log(
                        done,
                        **values,
                        lr=float(rate(number - guards.skipped)),
                        seconds_per_step=(now - started) / (done - since),
                        tokens=int(numbers["tokens"]),
                    )
                    started, since = now, done
                valid_loss = None
                if now_due.evaluate:
                    valid_loss = self.evaluate(evaluate, state.delta, splits.valid)
                    record.log(done, valid_loss=valid_loss)
                if now_due.save:
                    checkpoints.save(state, valid_loss, passing=now_due.passing)
                if now_due.evaluate or now_due.save:
                    started, since = time.perf_counter(), done
                if stop or done == stop_after:
                    break
        return state


def evaluation_batches(size: int, batch: int, limit: int | None) -> Iterator[np.ndarray]:
    """The indices of every example once, in order; the last batch is filled with -1."""
    batches = order.batches_per_epoch(size, batch)
    for number in range(batches if limit is None else min(limit, batches)):
        rows = np.arange(number * batch, (number + 1) * batch)
        yield np.where(rows < size, rows, -1)
