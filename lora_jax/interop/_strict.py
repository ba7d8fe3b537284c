"""The checks that all readers share: no tensor is missing, unexpected, of another shape or dtype, or not
finite.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._paths import nearest
from ._files import digest


DTYPES = {"F16": jnp.float16, "BF16": jnp.bfloat16, "F32": jnp.float32, "F64": jnp.float64}


def check_tensors(summary: str, expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, Any]) -> None:
    """Raises `ValueError` unless `stored` has exactly these tensors, floating point and of these shapes.

    `stored`: by the expected name, tensors with the `name`, `shape` and `dtype` that they have in the file.
    """
    unexpected = [name for name in stored if name not in expected]
    problems = []
    for name in expected.keys() - stored.keys():
        close = nearest(name, [stored[other].name for other in unexpected], 1)
        problems.append(f"{name!r} is missing" + (f" (is it {close[0]!r}?)" if close else ""))
    problems += [f"{stored[name].name!r} is unexpected" for name in unexpected]
    for name in expected.keys() & stored.keys():
        wanted, found = expected[name], stored[name]
        if found.shape != wanted:
            problems.append(f"{found.name!r} has shape {found.shape} and must have {wanted}")
        if found.dtype not in DTYPES:
            problems.append(f"{found.name!r} has dtype {found.dtype} and must have one of {list(DTYPES)}")
    report(summary, problems)


def renamed(source: Any, stored: Mapping[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    """The tensors in `source` under other names. Raises `ValueError` where two of them get the same."""
    found: dict[str, Any] = {}
    for name, tensor in stored.items():
        other = found.setdefault(rename(name), tensor)
        if other is not tensor:
            raise ValueError(
                f"{source} holds one tensor under two names, {other.name!r} and {name!r}; remove one."
            )
    return found


def report(summary: str, problems: Iterable[str], shown: int = 8) -> None:
    """Raises `ValueError` if there are any problems, naming the first ones."""
    problems = sorted(problems)
    if problems:
        more = f"; and {len(problems) - shown} more" if len(problems) > shown else ""
        raise ValueError(f"{summary}: {'; '.join(problems[:shown])}{more}.")


def check_finite(file: Path, name: str, array: np.ndarray) -> np.ndarray:
    """The array, or `ValueError` if any of it is infinite or not a number."""
    if not np.isfinite(array).all():
        count = int(array.size - np.isfinite(array).sum())
        raise ValueError(
            f"{file} has {count} values in {name!r} that are infinite or no numbers: the training or the "
            "program that wrote them went wrong. Take an earlier file, or pass `verify=False`."
        )
    return array


def check_writable(name: str, array: np.ndarray) -> np.ndarray:
    """The array, or `ValueError` if `load` would refuse it."""
    if not np.isfinite(array).all():
        raise ValueError(
            f"{name!r} has values that are infinite or no numbers, so nothing is written: the training that "
            "made them went wrong. Save an earlier state."
        )
    return array


def check_beside(file: Path, facts: Mapping[str, Any] | None) -> None:
    """Raises `ValueError` if a file beside this one has changed since both were written."""
    for name, digits in (facts or {}).get("beside", {}).items():
        other = file.parent / Path(name).name
        if not other.is_file() or digest(other) != digits:
            raise ValueError(
                f"{other} {'has changed since it was' if other.is_file() else 'is missing, which was'} saved "
                f"with {file.name}; copy it again, or pass `verify=False` if you changed it on purpose."
            )


def on_device(path: str, array: np.ndarray) -> jax.Array:
    """A copy of an array from a file, in its own dtype, where JAX puts arrays by default."""
    check_width(path, array.dtype)
    return jnp.array(array)


def check_width(path: str, dtype: Any) -> None:
    """Raises `ValueError` for a dtype that JAX would narrow."""
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(
            f"{path!r} is {dtype} in the file and would be narrowed; call "
            "`jax.config.update('jax_enable_x64', True)` first, or convert the file."
        )
