"""What a task's loss can be: the loss of everything that a part of a batch counts, and the mask of it.

JAX is imported where it is used: `plan` reads a config, and with it every task, before JAX may start.
"""

from collections.abc import Callable
from typing import Any


def of_labels(model: Callable, piece: dict[str, Any], smoothing: float = 0.0) -> tuple[Any, Any]:
    """The cross-entropy of each label: of tokens, or of an example's class.

    Labels with a `mask` of 1 are counted. Without a `mask`, each label is: the class of an example, then.
    With `columns`, the labels are of these positions, and the head computes no other logits. With
    `segment_ids`, a row has several texts.
    """
    inputs = [piece[name] for name in ("input_ids", "attention_mask") if name in piece]
    if "mask" in piece:
        named = {"logits_at": "columns", "segment_ids": "segment_ids"}
        some = {name: piece[array] for name, array in named.items() if array in piece}
        return model(*inputs, labels=piece["labels"], label_smoothing=smoothing, **some), piece["mask"]
    import jax.numpy as jnp

    from lora_jax.models import cross_entropy

    found = cross_entropy(model(*inputs), piece["labels"], smoothing)
    return found, jnp.ones(found.shape)


def of_classes(model: Callable, piece: dict[str, Any], smoothing: float = 0.0) -> tuple[Any, Any]:
    """The cross-entropy of each example's class, or of a single output the squared difference to its score;
    and the weight of each in the mean, which is its class's.
    """
    import jax.numpy as jnp

    from lora_jax.models import cross_entropy

    logits, target = model(piece["input_ids"], **extras(piece)), piece["labels"][:, 0]
    if logits.shape[-1] == 1:
        found = (logits[:, 0] - target.astype(logits.dtype)) ** 2
    else:
        found = cross_entropy(logits, target, smoothing)
    return found, piece["mask"][:, 0].astype(jnp.float32)


def of_candidates(
    count: int, model: Callable, piece: dict[str, Any], smoothing: float = 0.0
) -> tuple[Any, Any]:
    """The cross-entropy of the right one of a question's candidates, of which the head has one output each.
    A row of the piece has the tokens of all `count` candidates, one after the other.
    """

    def beside(ids: Any, **more: Any) -> Any:
        rows = {name: array.reshape(-1, ids.shape[1] // count) for name, array in more.items()}
        return model(ids.reshape(-1, ids.shape[1] // count), **rows).reshape(-1, count)

    return of_classes(beside, piece, smoothing)


def of_spans(model: Callable, piece: dict[str, Any], smoothing: float = 0.0) -> tuple[Any, Any]:
    """The mean of the cross-entropies of an answer's first and last token, of each window.

    Padding is no token that could be either, so that the width of a batch changes nothing.
    """
    import jax
    import jax.numpy as jnp

    logits = jnp.swapaxes(model(piece["input_ids"], **extras(piece)), 1, 2)  # (B, 2, T)
    shown = jnp.broadcast_to(piece["attention_mask"][:, None, :] != 0, logits.shape)
    chosen = jnp.take_along_axis(logits, piece["labels"][:, :, None], axis=-1)[..., 0]
    found = jax.nn.logsumexp(jnp.where(shown, logits, -jnp.inf), axis=-1) - (1 - smoothing) * chosen
    if smoothing:
        found -= smoothing * jnp.mean(logits, axis=-1, where=shown)
    return jnp.mean(found, axis=-1), piece["mask"][:, 0].astype(jnp.float32)


def extras(piece: dict[str, Any]) -> dict[str, Any]:
    """What a model takes beside the ids of a batch."""
    return {name: piece[name] for name in ("attention_mask", "token_type_ids") if name in piece}
