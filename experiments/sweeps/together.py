"""Many adapters as one: their arrays stacked, and a step that trains all of them.

The step is the run's under `vmap`, with the base unbatched. What differs between members is data: rate and
decay are arrays, and ranks are padded to the largest with zeros. The gradient of a zero column of A is a
product with the zero row of B, and the other way round, so that padding stays exactly zero. A scale
multiplies B where it is used, whose gradient is then the run's.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

import lora_jax
from experiments import config as configs, tasks
from experiments.progress import Record
from experiments.sweeps.guards import EachGuards, lost_at
from experiments.sweeps.members import Member
from experiments.training import loop, loss as losses, optimizer, order
from experiments.training.ahead import one_behind
from experiments.training.guards import Guards, not_finite_steps
from experiments.training.spread import EXAMPLES
from experiments.training.step import compiled_for, step_of
from experiments.training.trainer import evaluated_batches, judged, Trainer
from lora_jax.checkpoint import State


class Own(NamedTuple):
    """What the program needs of a member beside its arrays: (members,) each. `scale`: None where all have
    that of their common method.
    """

    lr: Any
    weight_decay: Any
    scale: Any


@dataclasses.dataclass(frozen=True)
class Together:
    """Members that one program trains. `trainer`: of the first, whose base and loss are those of all.
    `padded`: whether ranks or scales differ.
    """

    trainer: Trainer
    members: tuple[Member, ...]
    padded: bool

    @property
    def names(self) -> list[str]:
        return [member.name for member in self.members]

    def of(self, places: Sequence[int]) -> "Together":
        """These of the members."""
        return dataclasses.replace(self, members=tuple(self.members[place] for place in places))

    def start(self) -> State:
        """The state before the first step: every array has the members as its first axis."""
        deltas = [member.delta for member in self.members]
        delta = lora_jax.stack(deltas) if self.padded else jax.tree.map(_stacked, *deltas)
        init = lambda delta: self._rule(delta, self.trainer.frozen).init(delta)
        where = self.trainer.step.everywhere
        opt_state = jax.jit(jax.vmap(init), out_shardings=where)(delta)
        key = jnp.stack([member.key for member in self.members])
        return State(jax.device_put(delta, where), opt_state, 0, (0, 0), key)

    def single(self, place: int, state: State) -> State:
        """The state of one member as its own run would have it: of its own rank, with its own scale."""
        member = self.members[place]
        opt_state = jax.eval_shape(
            lambda delta: self._rule(delta, self.trainer.frozen).init(delta), member.delta
        )
        like = (member.delta, opt_state)

        def cut(whole: jax.Array, part: Any) -> jax.Array:
            return whole[place][tuple(slice(size) for size in part.shape)]

        leaves = map(cut, jax.tree.leaves((state.delta, state.opt_state)), jax.tree.leaves(like))
        delta, opt_state = jax.tree.unflatten(jax.tree.structure(like), list(leaves))
        position = order.epoch_and_position(state.step, len(member.train), member.config.train.batch)
        return State(delta, opt_state, state.step, position, state.key[place])

    def own(self) -> Own:
        numbers = lambda of: jnp.asarray([of(member) for member in self.members], jnp.float32)
        return Own(
            numbers(lambda member: member.config.train.lr),
            numbers(lambda member: member.config.optimizer.weight_decay),
            numbers(lambda member: configs.method_value(member.config.method).scale) if self.padded else None,
        )

    def outcome(self, own: Own, delta: Any, frozen: Any, piece: dict) -> tuple[jax.Array, ...]:
        """Of one member: its loss, and of a task that is judged the head's outputs too."""
        step, delta = self.trainer.step, _scaled(delta, own.scale)
        judged = tasks.of(self.trainer.config.data).judge is not None
        return (step.judged if judged else step.loss)(delta, frozen, piece)

    def loss(
        self, own: Own, delta: Any, frozen: Any, piece: dict, key: Any = None, smoothing: float = 0.0
    ) -> tuple[jax.Array, jax.Array]:
        """Of one member: as `ShardedStep.loss`."""
        return self.trainer.step.loss(_scaled(delta, own.scale), frozen, piece, key, smoothing)

    def function(
        self, delta: Any, opt_state: Any, frozen: Any, batch: dict, key: jax.Array, own: Own
    ) -> tuple:
        """The step of one member: `step_of` its loss and its update rule."""
        sharded = self.trainer.step
        loss = functools.partial(self.loss, own, smoothing=sharded.smoothing)
        tx = self._rule(delta, frozen, lr=own.lr, weight_decay=own.weight_decay)
        step = step_of(loss, tx, sharded.accumulate, sharded.penalty, sharded.reduce)
        return step(delta, opt_state, frozen, batch, key)

    def _rule(self, delta: Any, frozen: Any, **numbers: Any) -> Any:
        config = self.trainer.config
        return optimizer.for_adapters(config.optimizer, config.train, frozen, delta, **numbers)

    def compiled(self, state: State, memory: Callable[[Any], None]) -> Callable:
        """`function` of all members, compiled once for each shape of a batch; `memory` is told what each
        program needs.
        """
        every = jax.vmap(self.function, in_axes=(0, 0, None, 0, 0, 0))
        step = compiled_for(every, state.delta, state.opt_state, self.trainer.mesh)
        programs: dict[tuple, Any] = {}

        def call(*arguments: Any) -> tuple:
            batch = arguments[3]
            shapes = tuple(batch[name].shape for name in sorted(batch))
            if shapes not in programs:
                programs[shapes] = step.lower(*arguments).compile()
                memory(programs[shapes].memory_analysis())
            return programs[shapes](*arguments)

        return call

    def batch(self, examples: Sequence[Any], rows: Sequence[np.ndarray], parts: int | None) -> dict[str, Any]:
        """The examples of each member, as wide as the widest needs: (members, parts, rows, ...), or without
        parts.
        """
        sizes = [each.size(chosen) for each, chosen in zip(examples, rows, strict=True)]
        size = jax.tree.map(lambda *each: max(each), *sizes)
        arrays = [each.batch(chosen, size) for each, chosen in zip(examples, rows, strict=True)]
        # An example may have several rows, which lie one after the other in its own.
        stacked = jax.tree.map(lambda *each: np.stack([a.reshape(len(rows[0]), -1) for a in each]), *arrays)
        if parts is not None:
            split = lambda array: array.reshape(len(arrays), parts, -1, *array.shape[2:])
            stacked = jax.tree.map(split, stacked)
        spec = P(None, EXAMPLES) if parts is None else P(None, None, EXAMPLES)
        return jax.device_put(stacked, NamedSharding(self.trainer.mesh, spec))

    def evaluate(self, compiled: Callable, delta: Any, own: Own) -> dict[str, dict[str, float | None]]:
        """What an evaluation finds, by its names and then by members: `valid_loss`, and the metrics of a task
        that is judged, as each one's run has them; None where a number is not finite.
        """
        valid = [member.splits.valid for member in self.members]
        batches = [evaluated_batches(member.config, member.splits.valid) for member in self.members]
        nothing = np.full(self.trainer.config.train.batch, -1)

        def of_batch(rows: Sequence[np.ndarray]) -> tuple[jax.Array, ...]:
            return compiled(own, delta, self.trainer.frozen, self.batch(valid, rows, None))

        sums, outputs = np.zeros((2, len(self.members))), []
        for numbers in one_behind(map(of_batch, itertools.zip_longest(*batches, fillvalue=nothing))):
            sums += np.asarray(jax.device_get(numbers[:2]), np.float64)
            outputs += [np.asarray(array, np.float32) for array in numbers[2:]]
        found = [{"valid_loss": float(losses.mean(*each))} for each in sums.T]
        for place, member in enumerate(self.members if outputs else ()):
            mine = [each[place] for each in outputs[: len(batches[place])]]
            found[place] |= judged(member.config, mine, valid[place], batches[place])
        names = dict.fromkeys(name for each in found for name in each)
        return {
            name: dict(zip(self.names, (_finite(each.get(name, math.nan)) for each in found), strict=True))
            for name in names
        }

    def work(self, state: State, directory: Path, record: Record, memory: Callable[[Any], None]) -> loop.Work:
        """What the loop trains. `directory`: below which each member has one of its own."""
        config, frozen, own = self.trainer.config, self.trainer.frozen, self.own()
        train, keys = config.train, state.key
        of_batch = jax.jit(
            jax.vmap(self.outcome, in_axes=(0, 0, None, 0)), out_shardings=self.trainer.step.everywhere
        )
        examples = [member.train for member in self.members]
        fold = jax.jit(jax.vmap(jax.random.fold_in, (0, None)), out_shardings=self.trainer.step.everywhere)
        rate = optimizer.warmup_linear(train, own.lr)
        guards = self._guards(state, directory, record)

        def step_inputs(done: int) -> tuple:
            rows = [member.rows(done) for member in self.members]
            return frozen, self.batch(examples, rows, train.accumulate), fold(keys, done - 1), own

        def described(done: int, numbers: dict[str, jax.Array]) -> dict[str, Any]:
            read = jax.device_get({name: numbers[name] for name in ("loss", "gradient_norm", "tokens")})
            read["lr"] = np.asarray(rate(done - 1 - np.asarray(guards.skipped)))
            return {
                name: dict(zip(self.names, map(_finite, values.tolist()), strict=True))
                for name, values in read.items()
            }

        return loop.Work(
            train,
            step_inputs,
            self.compiled(state, memory),
            lambda delta: self.evaluate(of_batch, delta, own),
            described,
            lambda done: order.epoch_and_position(done, len(examples[0]), train.batch),
            guards,
        )

    def _guards(self, state: State, directory: Path, record: Record) -> EachGuards:
        skip, guards, lost = self.trainer.config.train.not_finite == "skip", {}, set()
        for place, member in enumerate(self.members):
            mine = directory / member.name
            mine.mkdir(parents=True, exist_ok=True)
            guards[member.name] = Guards(
                state.delta,
                mine,
                member.host_batch,
                skip=skip,
                # What all have in common is said once.
                say=record.note if place == 0 else lambda step, text: None,
                before=not_finite_steps(mine, state.step),
            )
            if lost_at(mine, state.step, skip) is not None:
                lost.add(member.name)
        return EachGuards(guards, lost, record.note)


def _stacked(*leaves: jax.Array) -> jax.Array:
    return jnp.stack(leaves)


def _scaled(delta: Any, scale: jax.Array | None) -> Any:
    """`delta` with its B's multiplied."""
    if scale is None:
        return delta
    is_adapter = lambda node: isinstance(node, lora_jax.Adapter)

    def of(node: Any) -> Any:
        if not is_adapter(node):
            return node
        b = node.arrays["b"]
        return lora_jax.Adapter({**node.arrays, "b": b * scale.astype(b.dtype)}, node.spec)

    return jax.tree.map(of, delta, is_leaf=is_adapter)


def _finite(number: float) -> float | None:
    return float(number) if math.isfinite(number) else None
