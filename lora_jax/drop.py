"""LoRA-drop: Efficient LoRA Parameter Pruning based on Output Evaluation (Zhou et al., COLING 2025, arXiv
2402.07721).

A choice of adapters, in three calls: train LoRA for a few steps on a sample, `importance` of each layer,
`share` among the least important. From the paper's text alone, without the authors' code: unverified are the
power of the norm, the size of the sample (a tenth), and whether adapters that stay keep what they learned
(here they do).
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._adapt import adapt
from ._lorafy import combine
from ._lowrank.factored import Canonical
from ._lowrank.labels import widened
from ._paths import is_array, path_seed
from ._tree.method import Method, Spec
from ._tree.nodes import Adapter, adapters_of, is_node, method_of, Shared
from .methods.lora import LoRA
from .methods.slots import Slots


@dataclasses.dataclass(frozen=True)
class _Tapped(Method):
    """A LoRA adapter with a zero beside it whose derivative is the sum of squares of what the adapter
    adds.
    """

    method: LoRA

    def check(self, spec: Spec) -> None:
        self.method.check(spec)

    def split(self, weight: jax.Array, spec: Spec, key: jax.Array) -> tuple[Any, Any]:
        frozen, adapter = self.method.split(weight, spec, key)
        return frozen, _tapped(adapter)

    def array_axes(self, spec: Spec) -> dict[str, tuple[int | None, ...]]:
        return {**self.method.array_axes(spec), "tap": spec.axis_indices("layer")}

    def canonical(
        self, weight: Any, fixed: dict, trained: dict, spec: Spec, key: jax.Array | None
    ) -> Canonical:
        terms = self.method.canonical(weight, fixed, trained, spec, key).terms
        return Canonical(tuple(term.replace(tap=trained["tap"]) for term in terms))

    def at_rank(self, trained: dict, spec: Spec, rank: int) -> tuple[Method, dict]:
        raise ValueError(f"the adapter of {spec.path!r} is being measured; stack those of `lorafy`.")


def _tapped(node: Adapter) -> Adapter:
    tap = jnp.zeros(node.spec.sizes("layer"), widened(node.arrays["a"].dtype))
    return Adapter(
        {**node.arrays, "tap": tap}, dataclasses.replace(node.spec, method=_Tapped(method_of(node, LoRA)))
    )


def importance(fn: Callable, frozen: Any, delta: Any, batches: Iterable[tuple]) -> dict[str, np.ndarray]:
    """`Σ ‖s·x·A·B‖²` over a sample: how much each adapter adds to the output of its layer (paper, section
    3.2).

    >>> import jax.numpy as jnp, lora_jax
    >>> params = {"kernel": jnp.ones((4, 4))}
    >>> frozen, delta = lora_jax.lorafy(params, "kernel", method=lora_jax.LoRA(rank=1, alpha=1))
    >>> delta["kernel"].arrays.update(a=jnp.ones((4, 1)), b=jnp.ones((1, 4)))
    >>> fn, batches = lambda params, x: x @ params["kernel"], [(jnp.ones((2, 4)),)]
    >>> importance = lora_jax.drop.importance(fn, frozen, delta, batches)
    >>> float(importance["kernel"])  # 2 rows of 4 outputs, each 4
    128.0

    Args:
      fn: called as `fn(params, *batch)`; what it returns must depend on every adapter, and be differentiable
        in reverse.
      frozen, delta: the two trees of `lorafy`, after a few steps of training: at the start all is zero.
      batches: tuples of arguments, of equal shapes if it shall compile once. Padding counts, if the batch has
        any.

    Returns:
      A number for each adapted path, or for a stacked leaf one for each layer; not normalised.

    Raises:
      ValueError: an adapter that is not LoRA; no batch.
    """
    adapters = list(adapters_of(delta).values())
    _check(adapters)
    tapped = jax.tree.map(
        lambda node: _tapped(node) if isinstance(node, Adapter) else node, delta, is_leaf=is_node
    )
    paths = {node.spec.path for node in adapters}

    @jax.jit
    def squares(frozen: Any, delta: Any, batch: tuple) -> dict[str, jax.Array]:
        def total(taps: dict[str, jax.Array]) -> jax.Array:
            outputs = adapt(fn)(combine(frozen, _with_taps(delta, taps)), *batch)
            arrays = [
                output
                for output in jax.tree.leaves(outputs)
                if is_array(output) and jnp.issubdtype(output.dtype, jnp.inexact)
            ]
            return sum(
                (jnp.sum(jnp.real(array).astype(jnp.float32)) for array in arrays), jnp.zeros((), jnp.float32)
            )

        return jax.grad(total)(_taps(delta))

    sums: dict[str, Any] = {}
    for batch in batches:
        if not isinstance(batch, tuple | list):
            raise TypeError(
                f"`batches` holds a {type(batch).__name__}; each batch is a tuple of arguments, `(x,)` for "
                "`fn(params, x)`."
            )
        for path, value in squares(frozen, tapped, tuple(batch)).items():
            sums[path] = sums.get(path, 0.0) + np.asarray(value)
    if not sums:
        raise ValueError("`batches` is empty; pass a sample of the training data, a tenth of it for example.")
    for node in adapters:
        if not np.any(sums[node.spec.path]) and all(
            np.any(np.asarray(array)) for array in node.arrays.values()
        ):
            raise ValueError(
                f"nothing was measured of the adapter of {node.spec.path!r}, which is not zero: none of the "
                "floating-point outputs of `fn` depends on "
                "it, or their derivative is stopped on the way. Return what it leads to, the logits for "
                "example."
            )
    return {path: sums[path] for path in sums if path in paths}


def _taps(delta: Any) -> dict[str, jax.Array]:
    return {node.spec.path: node.arrays["tap"] for node in adapters_of(delta).values()}


def _with_taps(delta: Any, taps: Mapping[str, jax.Array]) -> Any:
    def placed(node: Any) -> Any:
        return (
            Adapter({**node.arrays, "tap": taps[node.spec.path]}, node.spec)
            if isinstance(node, Adapter)
            else node
        )

    return jax.tree.map(placed, delta, is_leaf=is_node)


def _check(adapters: list[Adapter]) -> None:
    shared = next(
        (node for node in adapters if any(isinstance(array, Shared) for array in node.arrays.values())), None
    )
    if shared is not None:
        raise ValueError(
            f"the adapter of {shared.spec.path!r} is shared already; make plain ones first: "
            "`lora_jax.arithmetic.as_lora(frozen, delta)`."
        )
    wrong = next((node for node in adapters if not isinstance(node.spec.method, LoRA)), None)
    if wrong is not None or not adapters:
        found = (
            f"{wrong.spec.path!r} has {type(wrong.spec.method).__name__}" if wrong else "it holds no adapter"
        )
        raise ValueError(
            f"`delta` must hold LoRA adapters, and {found}; LoRA-drop is a choice among those of "
            "`lorafy(..., method=LoRA(...))`."
        )


def share(
    delta: Any, importance: Mapping[str, Any], *, threshold: float = 0.9, key: jax.Array | None = None
) -> Any:
    """A delta in which the most important layers keep their adapters, and the others of a kind share one
    (paper, section 3.3).

    >>> import jax.numpy as jnp, lora_jax
    >>> params = {str(index): {"kernel": jnp.ones((8, 8))} for index in range(4)}
    >>> frozen, delta = lora_jax.lorafy(params, "kernel", method=lora_jax.LoRA(rank=1))
    >>> importance = {"0/kernel": 6.0, "1/kernel": 3.5, "2/kernel": 0.3, "3/kernel": 0.2}
    >>> smaller = lora_jax.drop.share(delta, importance)
    >>> lora_jax.count(delta), lora_jax.count(smaller)
    (64, 48)

    Layers are of one kind if their paths differ in numbers only (`h/0/attn/query` and `h/1/attn/query`,
    `Dense_0/kernel` and `Dense_1/kernel`), or if they are the layers of one stacked leaf. Of each kind the
    smallest set stays whose importance is at least `threshold` of the kind's; the rest is trained as one A
    and B, which starts anew, A random and B at zero. A kind of which a single layer would be left to share
    keeps all. `frozen` stays as it is.

    Args:
      delta: of `lorafy`, with LoRA adapters.
      importance: as `importance` returns it.
      threshold: in (0, 1].
      key: for the shared A; `jax.random.key(0)` if None.

    Raises:
      ValueError: a threshold out of range; an adapter whose importance is missing, negative or not finite, or
        all are zero.
    """
    if not 0.0 < threshold <= 1.0:
        raise ValueError(f"`threshold` is {threshold!r}; it must be above 0 and at most 1.")
    leaves = list(adapters_of(delta).items())
    _check([node for _, node in leaves])
    key = jax.random.key(0) if key is None else key
    kinds: dict[tuple, list[Adapter]] = {}
    for path, node in leaves:
        _check_importance(node, importance)
        stacked = path if node.spec.sizes("layer") else ""
        kinds.setdefault(
            (re.sub(r"\d+", "*", path), stacked, node.spec.shape, node.spec.axes, node.spec.method), []
        ).append(node)
    if all(len(nodes) == 1 and not nodes[0].spec.sizes("layer") for nodes in kinds.values()):
        raise ValueError(
            "`delta` has no two layers of one kind, whose paths differ in numbers only, among "
            f"{', '.join(repr(path) for path, _ in leaves[:8])}."
        )
    changed: dict[str, Adapter] = {}
    for nodes in kinds.values():
        values = np.concatenate(
            [np.asarray(importance[node.spec.path], np.float64).reshape(-1) for node in nodes]
        )
        kept = _kept(values, threshold)
        if len(values) - len(kept) < 2:
            continue
        own = jax.random.fold_in(key, path_seed(nodes[0].spec.path))
        changed |= (
            _stack_sharing(nodes[0], kept, own)
            if nodes[0].spec.sizes("layer")
            else _leaves_sharing(nodes, kept, own)
        )
    return jax.tree.map(
        lambda node: changed.get(node.spec.path, node) if isinstance(node, Adapter) else node,
        delta,
        is_leaf=is_node,
    )


def _check_importance(node: Adapter, importance: Mapping[str, Any]) -> None:
    path, layers = node.spec.path, node.spec.sizes("layer")
    value = np.asarray(importance.get(path, np.nan), np.float64)
    if value.shape != layers or not np.all(np.isfinite(value)) or np.any(value < 0):
        raise ValueError(
            f"`importance` has {importance.get(path)!r} for {path!r}; it needs "
            f"{'a number' if not layers else f'an array of shape {layers}'}, none negative."
        )


def _kept(values: np.ndarray, threshold: float) -> list[int]:
    """The indices of the smallest set whose sum is at least `threshold` of the whole."""
    total = values.sum()
    if total == 0.0:
        raise ValueError(
            "`importance` is zero everywhere: B is zero at the start, so train a few steps before measuring."
        )
    order = np.argsort(-values, kind="stable")
    count = int(np.searchsorted(np.cumsum(values[order]), threshold * total * (1 - 1e-12))) + 1
    return sorted(order[:count].tolist())


def _anew(node: Adapter, key: jax.Array) -> dict[str, jax.Array]:
    """The start of one more adapter like this one, without its layers."""
    own = [
        (size, axis) for size, axis in zip(node.spec.shape, node.spec.axes, strict=True) if axis != "layer"
    ]
    shape, axes = tuple(size for size, _ in own), tuple(axis for _, axis in own)
    spec = dataclasses.replace(node.spec, shape=shape, axes=axes)
    # LoRA's start needs the dtype of the weight, not its numbers.
    _, fresh = spec.method.split(jax.ShapeDtypeStruct(shape, node.arrays["a"].dtype), spec, key)
    return fresh.arrays


def _leaves_sharing(nodes: list[Adapter], kept: list[int], key: jax.Array) -> dict[str, Adapter]:
    rest = [node for index, node in enumerate(nodes) if index not in kept]
    owner = Adapter(_anew(rest[0], key), rest[0].spec)
    borrowed = {name: Shared(owner.spec.path) for name in owner.arrays}
    return {owner.spec.path: owner, **{node.spec.path: Adapter(borrowed, node.spec) for node in rest[1:]}}


def _stack_sharing(node: Adapter, kept: list[int], key: jax.Array) -> dict[str, Adapter]:
    spec, layers = node.spec, node.spec.sizes("layer")
    method = method_of(node, LoRA)
    if method.blocks is not None:
        raise ValueError(
            f"{spec.path!r} is stacked and adapted in `blocks`, whose layers cannot share; adapt it without "
            "`blocks`."
        )
    slots = tuple(kept.index(index) if index in kept else len(kept) for index in range(math.prod(layers)))
    flat = lambda array: array.reshape(-1, *array.shape[len(layers) :])
    fresh = _anew(node, key)
    arrays = {
        name: jnp.concatenate([flat(array)[np.array(kept)], fresh[name][None].astype(array.dtype)])
        for name, array in node.arrays.items()
    }
    return {spec.path: Adapter(arrays, dataclasses.replace(spec, method=Slots(method, slots)))}
