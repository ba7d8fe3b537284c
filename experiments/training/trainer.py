"""The training of one run: one compiled step over a mesh, checkpoints, and nothing that a resumed run would
do differently.

What a step does depends on (config, base, data, step) and on nothing else: its examples come from `order`,
its random key is the run's key folded with the step, its rate from the schedule. Where its arrays lie on the
mesh is said in `sharded`, and what follows what in `loop`.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from experiments import tasks
from experiments.config import Config
from experiments.progress import Record
from experiments.tasks.examples import Splits
from experiments.training import loop, loss as losses, optimizer, order, patience, precision
from experiments.training.ahead import one_behind
from experiments.training.guards import Guards, not_finite_steps
from experiments.training.patience import exhausted, worth
from experiments.training.sharded import BATCH, ShardedStep
from lora_jax.checkpoint import Checkpoints, State
from lora_jax.processes import on_first


@dataclass(frozen=True)
class Trainer:
    """Everything of a run that stays the same: its config and its step."""

    config: Config
    step: ShardedStep

    @classmethod
    def create(
        cls, config: Config, mesh: Mesh, apply: Callable, frozen: Any, delta: Any, specs: Any
    ) -> "Trainer":
        """`specs`: of the base."""
        step = ShardedStep.create(
            mesh,
            apply,
            frozen,
            delta,
            specs,
            section=config.optimizer,
            train=config.train,
            quantize=config.quantize,
            reduce=config.precision.reduce,
            losses_of=tasks.of(config.data).loss,
        )
        return cls(config, step)

    @property
    def mesh(self) -> Mesh:
        return self.step.mesh

    @property
    def frozen(self) -> Any:
        return self.step.frozen

    def of_full(self, frozen: Any) -> "Trainer":
        """The same for full fine-tuning: without the rules of a method."""
        return replace(self, step=self.step.of_full(frozen, self.config.optimizer, self.config.train))

    def start(self, delta: Any, specs: Any, key: jax.Array) -> State:
        """The state before the first step, every array where it belongs on the mesh."""
        delta, opt_state = self.step.start(precision.trained(delta, self.config.precision), specs)
        return State(delta, opt_state, 0, (0, 0), key)

    def loss(self, delta: Any, frozen: Any, batch: dict, key: jax.Array | None = None) -> tuple:
        """Summed loss and number of counted tokens of one part of a batch, without smoothing; random only
        with a key.
        """
        return self.step.loss(delta, frozen, batch, key)

    def compiled_step(self, state: State) -> jax.stages.Wrapped:
        """The step, compiled for arrays that lie as those of `state` do."""
        return self.step.compiled(state.delta, state.opt_state)

    def in_rows(self, examples: Any, indices: np.ndarray) -> np.ndarray:
        """The examples of a step as `device_batch` takes them: in the rows that they share, with
        `train.pack`.
        """
        rows = self.config.train.pack
        return indices if rows is None else examples.packed(indices, rows)

    def device_batch(self, examples: Any, indices: np.ndarray, accumulate: int = 1) -> dict[str, jax.Array]:
        """These examples in `accumulate` parts, each spread over the mesh: one a row, or with `indices` of
        two axes those of each row. A process reads the rows of its own devices.
        """
        several = indices.shape[1:]
        rows, size = indices.reshape(accumulate, -1, *several), examples.size(indices)
        read: dict[str, dict[str, np.ndarray]] = {}

        def part(name: str, index: tuple[slice, ...]) -> np.ndarray:
            key = str(index)  # slices can be keys from Python 3.12 on
            if key not in read:
                wanted = rows[index[:2]]
                arrays = examples.batch(wanted.reshape(-1, *several), size)
                read[key] = {name: array.reshape(*wanted.shape[:2], -1) for name, array in arrays.items()}
            return read[key][name]

        make = functools.partial(jax.make_array_from_callback, sharding=NamedSharding(self.mesh, BATCH))
        # An example may have several rows, which lie one after the other in its own.
        widths = {name: array.size for name, array in examples.batch(rows[0, :1], size).items()}
        return {
            name: make((*rows.shape[:2], width), data_callback=functools.partial(part, name))
            for name, width in widths.items()
        }

    def evaluation(self) -> Callable:
        """What `validated` is given: the loss of a batch, compiled, and for a task that is judged the outputs
        too.
        """
        judged = tasks.of(self.config.data).judge is not None
        return jax.jit(self.step.judged if judged else self.loss, out_shardings=self.step.everywhere)

    def evaluate(self, compiled: Callable, delta: Any, examples: Any) -> float:
        """The loss of everything that is counted in the validation examples (`validated`)."""
        return self.validated(compiled, delta, examples)["valid_loss"]

    def validated(self, compiled: Callable, delta: Any, examples: Any) -> dict[str, float]:
        """`valid_loss`, the loss of everything that is counted in the validation examples, without dropout or
        smoothing, such as the negative log-likelihood a token; and the metrics of a task that is judged.
        """

        def of_batch(indices: np.ndarray) -> tuple[jax.Array, ...]:
            part = jax.tree.map(lambda array: array[0], self.device_batch(examples, indices))
            return compiled(delta, self.frozen, part)

        total, count, outputs = 0.0, 0.0, []
        batches = evaluated_batches(self.config, examples)
        for numbers in one_behind(map(of_batch, batches)):
            total, count = total + float(numbers[0]), count + float(numbers[1])
            outputs += [np.asarray(array, np.float32) for array in numbers[2:]]
        found = {"valid_loss": float(losses.mean(total, count))}
        return found | (judged(self.config, outputs, examples, batches) if outputs else {})

    def fit(
        self,
        state: State,
        splits: Splits,
        checkpoints: Checkpoints,
        record: Record,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> State:
        """Trains from `state` to the last step, or until `stop_requested()`, which is called after each step:
        then it saves the state and returns it.

        Raises:
          NotFinite: a step was not finite, and `train.not_finite` is "stop", or many were in a row.
        """
        train, config, size, key = self.config.train, self.config, len(splits.train), state.key
        evaluate = self.evaluation()
        rate = optimizer.warmup_linear(train)

        batch_of = order.of_run(config.seed, train, splits.train)

        def indices(done: int) -> np.ndarray:
            return self.in_rows(splits.train, batch_of(done - 1))

        def host_batch(done: int) -> tuple[np.ndarray, dict]:
            return indices(done), splits.train.batch(indices(done))

        def inputs(done: int) -> tuple[Any, dict[str, jax.Array], jax.Array]:
            batch = self.device_batch(splits.train, indices(done), train.accumulate)
            return self.frozen, batch, jax.random.fold_in(key, done - 1)

        def described(done: int, numbers: dict[str, jax.Array]) -> dict[str, float]:
            values = {name: float(numbers[name]) for name in ("loss", "gradient_norm")}
            lr = float(rate(done - 1 - guards.skipped))
            return {**values, "lr": lr, "tokens": int(numbers["tokens"])}

        guards = Guards(
            state.delta,
            record.directory,
            host_batch,
            skip=train.not_finite == "skip",
            say=record.note,
            before=on_first(lambda: not_finite_steps(record.directory, state.step)),
        )
        worths = on_first(lambda: patience.worths(record.directory, state.step))

        def enough(done: int, found: dict[str, float] | None) -> bool:
            if found is not None and done:
                worths.append(worth(found))
            return exhausted(worths, train.patience)

        work = loop.Work(
            train,
            inputs,
            self.compiled_step(state),
            lambda delta: self.validated(evaluate, delta, splits.valid),
            described,
            lambda done: order.epoch_and_position(done, size, train.batch),
            guards,
            lambda found: -worth(found),
            enough,
        )
        return loop.fit(work, state, checkpoints, record, stop_requested)


def evaluated_batches(config: Config, examples: Any) -> list[np.ndarray]:
    """The batches of an evaluation; of a task that is judged, inputs of like length together."""
    train, lengths = config.train, None if tasks.of(config.data).judge is None else examples.lengths
    return list(evaluation_batches(len(examples), train.batch, train.eval_batches, lengths))


def judged(
    config: Config, outputs: Sequence[np.ndarray], examples: Any, batches: Sequence[np.ndarray]
) -> dict[str, float]:
    """The task's metrics of the head's outputs for these batches of the examples."""
    judge, rows = tasks.of(config.data).judge, np.concatenate(batches)
    assert judge is not None  # or there were no outputs
    real = rows >= 0
    return judge(config.data, together(outputs)[real], examples, rows[real])


def together(outputs: Sequence[np.ndarray]) -> np.ndarray:
    """The outputs of all batches, (rows, ...); those of tokens, (rows, columns, ...), as wide as the widest.

    >>> together([np.ones((1, 2, 1)), np.ones((1, 3, 1))])[..., 0].tolist()
    [[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]
    """
    if outputs[0].ndim == 2:
        return np.concatenate(outputs)
    widest = max(array.shape[1] for array in outputs)
    whole = np.zeros((sum(map(len, outputs)), widest, *outputs[0].shape[2:]), outputs[0].dtype)
    start = 0
    for array in outputs:
        whole[start : start + len(array), : array.shape[1]] = array
        start += len(array)
    return whole


def evaluation_batches(
    size: int, batch: int, limit: int | None, lengths: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """The indices of every example once, in order, or with `lengths` the shortest first; the last batch is
    filled with -1. `limit`: of the first so many batches.
    """
    batches = order.batches_per_epoch(size, batch)
    chosen = batches if limit is None else min(limit, batches)
    rows = np.arange(min(size, chosen * batch))
    if lengths is not None:
        rows = rows[np.argsort(lengths[rows], kind="stable")]
    for part in np.pad(rows, (0, chosen * batch - len(rows)), constant_values=-1).reshape(chosen, batch):
        yield part
