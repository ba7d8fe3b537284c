"""The two layouts of a model's layers: a dict with one subtree a layer, and stacked arrays for `scan`."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np


def stack_layers(params: Mapping, at: str = "h") -> dict:
    """The parameters of an unrolled model in the layout of the scanned one.

    ```python
    params["h"]["11"]["attn"]["c_attn"]["kernel"].shape    # (768, 2304), one of "0" .. "11"
    stacked = stack_layers(params)
    stacked["h"]["attn"]["c_attn"]["kernel"].shape         # (12, 768, 2304)
    ```

    Args:
      params: with leaves that are arrays, of which NumPy's stay NumPy's, or `None`.
      at: the path of the dict of layers, components joined by `/`.

    Raises:
      ValueError: layers that are not numbered from 0 without a gap, as in a tree that is stacked already.
    """

    def stack(layers):
        # Sorted as numbers: as strings, layer 10 would come before layer 2.
        expected = [str(i) for i in range(len(layers))]
        if not layers or set(layers) != set(expected):
            raise ValueError(
                f"`params` has {sorted(layers)} under {at!r}, not layers numbered from 0; use them as they "
                "are if they are stacked already."
            )
        return jax.tree.map(_stack, *(layers[i] for i in expected))

    return _with_change(params, at.split("/"), stack)


def unstack_layers(params: Mapping, at: str = "h") -> dict:
    """The parameters of a scanned model in the layout of the unrolled one: undoes `stack_layers`.

    ```python
    unstack_layers(stacked)["h"]["11"]["attn"]["c_attn"]["kernel"].shape    # (768, 2304)
    ```

    Raises:
      ValueError: leaves whose first axes differ, as in a tree that is not stacked.
    """

    def unstack(layers):
        lengths = {leaf.shape[0] for leaf in jax.tree.leaves(layers) if leaf.ndim}
        if len(lengths) != 1 or "0" in layers:
            raise ValueError(
                f"`params` is not stacked under {at!r}: the first axes there are {sorted(lengths)}, and all "
                "must be the number of layers; use them as they are if they are unstacked already."
            )
        return {str(i): jax.tree.map(lambda leaf: leaf[i], layers) for i in range(*lengths)}

    return _with_change(params, at.split("/"), unstack)


def _stack(*leaves):
    return (np if isinstance(leaves[0], np.ndarray) else jnp).stack(leaves)


def _with_change(tree, path, change):
    head, *rest = path
    if head not in tree:
        raise ValueError(
            f"`params` has no {head!r}; it has {sorted(tree)}. Pass `at`, the path of the layers."
        )
    return {**tree, head: _with_change(tree[head], rest, change) if rest else change(tree[head])}
