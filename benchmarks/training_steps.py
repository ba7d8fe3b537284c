"""The training steps that are compared, each as a function and the shapes of its arguments: nothing is
allocated.

One step is: the loss on tokens, its gradient with respect to what trains, and optax's AdamW, with what trains
and its optimiser state donated. The four ways of taking it:

* `adapt`: `lora_jax`, the model unchanged and never a weight formed;
* `handwritten`: LoRA written into the model (`handwritten_gpt2.py`), the same matrices and rank;
* `full`: every weight trains;
* `merge`: W + s·A·B formed inside the loss, what a parameter transform alone would do.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lora_jax
from lora_jax import LoRA
from lora_jax.models import GPT2, GPT2Config

from .handwritten_gpt2 import HandwrittenGPT2


RANK, ALPHA = 4, 32  # of GPT-2 in the paper (Hu et al., table 11)
WAYS = ("adapt", "handwritten", "full", "merge")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a step trains on and how the model is run: GPT-2 small, batch 4 of 128 tokens, unless told
    otherwise.
    """

    adapted: str = "qv"  # query and value of the fused projection, or "all" four projections of every layer
    checkpoint: bool = False
    scan: bool = False
    dtype: str = "float32"  # of the computation; the weights are float32
    batch: int = 4
    tokens: int = 128
    config: GPT2Config = GPT2Config.named("gpt2")
    method: Any = None  # other than LoRA, for all projections
    format: str | None = None  # in which the adapted projections are stored, if not as they are
    losses: bool = False  # the model is given the labels, and makes no array of all logits

    @property
    def name(self) -> str:
        which = {"qv": "q, v", "all": "all matrices"}[self.adapted]
        return ", ".join(
            [which, *(word for word in ("checkpoint", "scan") if getattr(self, word)), self.dtype]
        )


@dataclasses.dataclass(frozen=True)
class Step:
    """`function(trained, opt_state, fixed, ids)` and the shapes of what it takes."""

    function: Callable
    shapes: tuple

    def lower(self) -> Any:
        return jax.jit(self.function, donate_argnums=(0, 1)).lower(*self.shapes)

    @property
    def trained_bytes(self) -> int:
        return tree_bytes(self.shapes[0])

    @property
    def optimizer_bytes(self) -> int:
        return tree_bytes(self.shapes[1])


def tree_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def training_step(way: str, setting: Setting) -> Step:
    options = {"scan": setting.scan, "checkpoint": setting.checkpoint, "dtype": jnp.dtype(setting.dtype)}
    ids = jax.ShapeDtypeStruct((setting.batch, setting.tokens), jnp.int32)
    model = GPT2(setting.config, **options)
    if way == "handwritten":
        model = HandwrittenGPT2(
            setting.config, adapted=setting.adapted, rank=RANK, scale=ALPHA / RANK, **options
        )
    variables = jax.eval_shape(model.init, jax.random.key(0), ids)
    params = variables["params"]

    if way == "full":
        trained, fixed = params, {}
        logits_of = lambda trained, fixed, ids, **labels: model.apply({"params": trained}, ids, **labels)
    elif way == "handwritten":
        trained, fixed = variables["lora"], params
        logits_of = lambda trained, fixed, ids: model.apply({"params": fixed, "lora": trained}, ids)
    else:
        fixed, trained = lorafied(params, setting)
        forward = lora_jax.adapt(model.apply) if way == "adapt" else model.apply
        join = lora_jax.combine if way == "adapt" else lora_jax.merge
        draws = setting.method is not None and setting.method.random
        keyed = lambda ids: {"key": jax.random.key(ids[0, 0])} if draws else {}
        logits_of = lambda trained, fixed, ids, **labels: forward(
            {"params": join(fixed, trained, **keyed(ids))}, ids, **labels
        )

    tx = optax.adamw(2e-4)

    def loss(trained, fixed, ids):
        if setting.losses:
            return logits_of(trained, fixed, ids, labels=jnp.roll(ids, -1, axis=1))[:, :-1].mean()
        logits = logits_of(trained, fixed, ids)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]).mean()

    return Step(step_of(loss, tx), (trained, jax.eval_shape(tx.init, trained), fixed, ids))


def step_of(loss: Callable, tx: optax.GradientTransformation) -> Callable:
    """`step(trained, opt_state, *others)` for `loss(trained, *others)`: what trains, its state, the loss."""

    def step(trained: Any, opt_state: Any, *others: Any) -> tuple:
        value, gradient = jax.value_and_grad(loss)(trained, *others)
        updates, opt_state = tx.update(gradient, opt_state, trained)
        return optax.apply_updates(trained, updates), opt_state, value

    return step


def lorafied(params: Any, setting: Setting) -> lora_jax.Lorafied:
    blocks = (True, False, True) if setting.adapted == "qv" else None
    targets = "c_attn/kernel" if setting.adapted == "qv" else "h/.*/kernel"
    axes = "layer in out" if setting.scan else "in out"
    method = LoRA(rank=RANK, alpha=ALPHA, blocks=blocks) if setting.method is None else setting.method
    frozen, delta = lora_jax.lorafy(params, targets, method=method, axes=axes)
    if setting.format is not None:
        frozen = lora_jax.quantize(frozen, setting.format, targets=targets)
    return lora_jax.Lorafied(frozen, delta)
