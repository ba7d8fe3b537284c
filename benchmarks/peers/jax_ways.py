"""The steps of the ways in JAX, compiled for the arrays of a row."""

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

import lora_jax
from benchmarks.handwritten_gpt2 import HandwrittenGPT2
from benchmarks.training_steps import step_of
from experiments.plan import flops
from lora_jax import DoRA, LoRA
from lora_jax.interop import hf
from lora_jax.models import cross_entropy, GPT2

from .models import batch, TARGETS
from .rows import ALPHA, Cannot, RANK, RATE, Row


def prepared(
    way: str, row: Row, directory: Path, device: str = "cpu"
) -> tuple[Callable[[], float], dict[str, Any]]:
    """A function that takes one step and returns its loss, and what the compiler says of it. `device`: where
    JAX computes anyway.
    """
    head = {"head": "sequence_classification"} if row.model == "roberta-base" else {}
    model, params = hf.load(directory, checkpoint=row.checkpoint, **head)
    ids, labels = batch(row.model, row.batch, row.tokens)
    trained, fixed, apply = _WAYS[way](model, params, row)
    tx = optax.adamw(RATE)

    def loss(trained: Any, fixed: Any, ids: jax.Array, labels: jax.Array) -> jax.Array:
        if row.model == "roberta-base":
            return cross_entropy(apply(trained, fixed, ids), labels).mean()
        if way != "handwritten JAX":  # which has a head of its own, and makes all logits
            return apply(trained, fixed, ids, labels=jnp.roll(labels, -1, 1))[:, :-1].mean()
        return cross_entropy(apply(trained, fixed, ids)[:, :-1], labels[:, 1:]).mean()

    step = step_of(loss, tx)
    # Copies, since steps give their buffers away.
    trained = jax.tree.map(jnp.copy, trained)
    held = [trained, tx.init(trained)]
    started = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*held, fixed, ids, labels).compile()
    figures = {
        "compile s": time.perf_counter() - started,
        # XLA would count one chunk of the losses once.
        "GFLOP": flops.of(step, *held, fixed, ids, labels) / 1e9,
        "temporary MB": compiled.memory_analysis().temp_size_in_bytes / 1e6,
        "optimizer MB": sum(leaf.nbytes for leaf in jax.tree.leaves(held[1])) / 1e6,
    }

    def one() -> float:
        held[0], held[1], value = compiled(*held, fixed, ids, labels)
        return float(jax.block_until_ready((value, held))[0])

    return one, figures


def peak_bytes() -> int | None:
    """The most memory of the device; None on a CPU, which has none of its own."""
    found = jax.local_devices()[0].memory_stats()
    return None if found is None else found["peak_bytes_in_use"]


def _adapted(model: Any, params: Any, row: Row, join: Callable, forward: Callable) -> tuple:
    targets = TARGETS[row.model, row.adapted]
    blocks = (True, False, True) if (row.model, row.adapted) == ("gpt2", "q, v") else None
    if row.method == "DoRA" and blocks is not None:
        raise Cannot("DoRA has no blocks of a fused projection")
    method: Any = DoRA(RANK, ALPHA) if row.method == "DoRA" else LoRA(RANK, ALPHA, blocks=blocks)
    frozen, delta = lora_jax.lorafy(params, targets, method=method, key=jax.random.key(0))
    if row.method == "QLoRA":
        frozen = lora_jax.quantize(frozen, "nf4", delta=delta)
    apply = lambda delta, frozen, *args, **options: forward({"params": join(frozen, delta)}, *args, **options)
    return delta, frozen, apply


def _lora_jax(model: Any, params: Any, row: Row) -> tuple:
    return _adapted(model, params, row, lora_jax.combine, lora_jax.adapt(model.apply))


def _merge(model: Any, params: Any, row: Row) -> tuple:
    return _adapted(model, params, row, lora_jax.merge, model.apply)


def _full(model: Any, params: Any, row: Row) -> tuple:
    return params, {}, lambda params, _, *args, **options: model.apply({"params": params}, *args, **options)


def _handwritten(model: Any, params: Any, row: Row) -> tuple:
    if not isinstance(model, GPT2) or row.method != "LoRA":
        raise Cannot("written for LoRA in GPT-2")
    which = "qv" if row.adapted == "q, v" else "all"
    options = {"adapted": which, "rank": RANK, "scale": ALPHA / RANK, "checkpoint": row.checkpoint}
    hand = HandwrittenGPT2(model.config, **options)
    factors = jax.jit(hand.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["lora"]
    draw = lambda path, leaf: (
        0.02 * jax.random.normal(jax.random.key(0), leaf.shape)
        if jax.tree_util.keystr(path).endswith("_a']")
        else leaf
    )
    factors = jax.tree_util.tree_map_with_path(draw, factors)
    return factors, params, lambda factors, params, ids: hand.apply({"params": params, "lora": factors}, ids)


def _qwix(model: Any, params: Any, row: Row) -> tuple:
    if importlib.util.find_spec("qwix") is None:
        raise Cannot("qwix is not installed")
    if row.method != "LoRA":
        raise Cannot(f"qwix is not set up here for {row.method}")
    if (row.model, row.adapted) == ("gpt2", "q, v"):
        raise Cannot("qwix adapts a fused projection as a whole")
    import qwix

    modules = TARGETS[row.model, row.adapted].removesuffix("/kernel")
    adapted = qwix.apply_lora_to_model(model, qwix.LoraProvider(module_path=modules, rank=RANK, alpha=ALPHA))
    is_lora = lambda path: "lora" in path[-1]
    flat = flatten_dict(jax.jit(adapted.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])
    factors = unflatten_dict({path: leaf for path, leaf in flat.items() if is_lora(path)})

    def apply(factors: Any, params: Any, *args: Any, **options: Any) -> jax.Array:
        variables = {"params": unflatten_dict(flatten_dict(params) | flatten_dict(factors))}
        return adapted.apply(variables, *args, **options)

    return factors, params, apply


_WAYS = {
    "lora_jax": _lora_jax,
    "qwix": _qwix,
    "merge in the loss, JAX": _merge,
    "full fine-tuning, JAX": _full,
    "handwritten JAX": _handwritten,
}
