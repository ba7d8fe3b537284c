"""PiSSA starts with the principal part of each matrix."""

import dataclasses

import numpy as np
import pytest
from method_rows import adapters_of, AXES, BY_NAME, literal, parameters, precision, quickly

from lora_jax._paths import named_leaves


@pytest.mark.parametrize("name, tolerance", [("PiSSA", 1e-12), ("PiSSA, iterations", 0.01)])
def test_pissa_starts_with_the_principal_part(name, tolerance):
    """s·A·B is the best approximation of W of that rank, of every layer."""
    row = BY_NAME[name]
    scaled = dataclasses.replace(row, equation=lambda w, a, b, start_a, start_b: 1.5 * a @ b)
    with precision("float64"):
        params = parameters("float64")
        found = quickly(lambda params: literal(scaled, *adapters_of(row, params)))(params)
    for path, axes in AXES.items():
        kinds = [("layer", "in", "out").index(word) for word in axes.split()]
        for product, matrix in zip(
            *(_matrices(dict(named_leaves(tree))[path], kinds) for tree in (found, params)), strict=True
        ):
            u, values, v = np.linalg.svd(matrix)
            best = (u[:, :2] * values[:2]) @ v[:2]
            assert np.linalg.norm(product - best) <= tolerance * np.linalg.norm(best), path


def _matrices(array, kinds):
    """Those of every layer, (in, out)."""
    rows = np.prod([size for size, kind in zip(array.shape, kinds, strict=True) if kind == 1])
    layers = np.prod([size for size, kind in zip(array.shape, kinds, strict=True) if kind == 0], dtype=int)
    return np.asarray(array).transpose(np.argsort(kinds, kind="stable")).reshape(layers, rows, -1)
