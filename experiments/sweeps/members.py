"""The members of a sweep: each is what a run of its own config would be, with its start, its examples and its
keys, on one frozen base that all share.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.config import Config
from experiments.running import baselines, inputs
from experiments.running.base import Loaded
from experiments.tasks.examples import Splits
from experiments.training import order, precision
from lora_jax.checkpoint import fingerprint


@dataclasses.dataclass(frozen=True)
class Member:
    """One adapter: what a run of `config` would have. `delta`: before its first step."""

    name: str
    values: dict[str, Any]
    config: Config
    splits: Splits
    identity: dict[str, str]
    delta: Any

    @property
    def key(self) -> jax.Array:
        return inputs.keys(self.config.seed)["dropout"]

    @property
    def train(self) -> Any:
        return self.splits.train

    @functools.cached_property
    def order(self) -> Callable[[int], np.ndarray]:
        return order.of_run(self.config.seed, self.config.train, self.train)

    def rows(self, done: int) -> np.ndarray:
        """The examples of a step, counted from 1, in the rows that they share."""
        rows, found = self.config.train.pack, self.order(done - 1)
        return found if rows is None else self.train.packed(found, rows)

    def host_batch(self, done: int) -> tuple[np.ndarray, dict]:
        """The same, and their arrays."""
        return self.rows(done), self.train.batch(self.rows(done))


def members(
    found: dict[str, Config],
    values: dict[str, dict[str, Any]],
    loaded: Loaded,
    splits_of: Callable[[Config], Splits],
    base: str,
) -> tuple[Member, ...]:
    """A new head is each one's own, and so are the arrays of a baseline. `base`: the fingerprint of its
    weights, with the head of the first.

    Raises `ValueError` where they would not share one frozen base.
    """
    made, shared = [], None
    first = next(iter(found.values())).seed
    bases = {first: (loaded, base)}
    for name, config in found.items():
        drawn = loaded.again is not None or config.baseline is not None
        seed = config.seed if drawn else first
        if seed not in bases:
            keys = inputs.keys(seed)
            own = baselines.bare(loaded).with_head_of(keys["base"])
            bases[seed] = baselines.attached(config, own, keys["adapter"]), fingerprint(own.params)
        of_seed, identity_of_seed = bases[seed]
        splits = splits_of(config)
        frozen, delta = inputs.adapted(config, of_seed, splits)
        if shared is None:
            shared = frozen
        elif not _same(shared, frozen):
            raise ValueError(
                f"`--over seed` draws what {config.method['name']} keeps beside the base, which all adapters "
                "of a sweep share: start a sweep for each seed, with `--set seed=VALUE`."
            )
        identity = inputs.identity_of(config, identity_of_seed, splits)
        delta = precision.trained(delta, config.precision)
        made.append(Member(name, values[name], config, splits, identity, delta))
    return tuple(made)


def _same(one: Any, other: Any) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(mine is its or bool(jnp.array_equal(mine, its)) for mine, its in pairs)
