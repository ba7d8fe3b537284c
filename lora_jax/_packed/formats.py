"""How quantised weights are stored: NF4 with double quantisation, from QLoRA (Dettmers et al., NeurIPS 2023,
arXiv 2305.14314), and int8.

NF4 is laid out as bitsandbytes lays it out, byte for byte, so that what it has stored is read as it is:
quantised again, it would lose again. Left out: fp4, and the columns of outliers that LLM.int8() keeps in 16
bits. The NF4 of qwix 0.1.8 does not serve: it has one scale for each tile of an axis, which tiles must
divide, and does not quantise the scales in turn.

Bytes and values are the same compiled or not, alone or in a stack: where XLA would choose the order of a sum,
or contract a product and a sum, it is not left the choice. (On GPUs its division may round differently, and
so may a code on the edge.)
"""

import abc
import dataclasses
import json
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


_TINY = np.finfo(
    np.float32
).tiny  # XLA may flush to zero what is smaller, as is the inverse of what is above 2**126
# The 16 quantiles of appendix E.
_NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
    ]
    + [
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
    ]
    + [0.7229568362236023, 1.0],
    np.float32,
)


def _dynamic_map() -> np.ndarray:
    """bitsandbytes' signed dynamic map: 0, 1, and for the powers 10^-6…10^0, of either sign, 1, 2, 4, …,
    64 fractions.
    """
    values = [np.array([0.0, 1.0], np.float32)]
    first, last = np.float32(0.1), np.float32(1)
    for exponent in range(7):
        count = 2**exponent
        index, step = np.arange(count + 1), np.float64((last - first) / np.float32(count))
        # torch.linspace counts from the nearer end and rounds once, by a fused multiply-add.
        edges = np.where(
            index < (count + 1) // 2, first + step * index, last - step * (count - index)
        ).astype(np.float32)
        fractions = np.float32(10.0 ** (exponent - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        values += [fractions, -fractions]
    return np.sort(np.concatenate(values))


_DYNAMIC = _dynamic_map()


class Format(abc.ABC):
    """A way to store weights in fewer bits. Its values are hashable: they are static where arrays are traced.

    `in_order`: the arrays whose numbers are in the order of the weight's, and which are split over devices as
    it is.
    """

    in_order: ClassVar[tuple[str, ...]] = ("codes",)

    @abc.abstractmethod
    def ndims(self, own: tuple[int, ...]) -> dict[str, int]:
        """How many axes each array has for one weight of the shape `own`."""

    @abc.abstractmethod
    def pack(self, weight: jax.Array, stack: int) -> dict[str, jax.Array]:
        """The arrays that hold `weight`. Its first `stack` axes lead in each: every index of them is packed
        by itself.

        Raises:
          ValueError: `weight` is not of floats, has no numbers, has fewer axes than are needed, or, unless it
            is traced, has a value that is not finite or is beyond 2**126. Traced, one that is not finite
            makes all that share its scale so when they are unpacked.
        """

    @abc.abstractmethod
    def unpack(self, arrays: dict[str, jax.Array], shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """One weight, of `shape` and without stacked axes, computed in float32 and rounded once to
        `dtype`.
        """


@dataclasses.dataclass(frozen=True)
class NF4(Format):
    """`w̃ = quantile[code] · absmax` for each block of 64 numbers, in row-major order, whose code is that of
    the quantile nearest to `w / absmax`; and with `double`, `absmax = map[code] · nested_absmax + offset`
    (section 3).

    >>> import jax.numpy as jnp
    >>> arrays = NF4().pack(jnp.linspace(-1, 1, 4 * 128).reshape(4, 128), 0)
    >>> {name: f"{array.dtype}{list(array.shape)}" for name, array in arrays.items()}
    {'absmax': 'uint8[8]', 'codes': 'uint8[256]', 'nested_absmax': 'float32[1]', 'nested_offset': 'float32[]'}
    >>> NF4().unpack(arrays, (4, 128), jnp.float32)[0, :3].tolist()
    [-1.0, -1.0, -1.0]

    4 + 8/64 + 32/(64·256) = 4.127 bits a number. What bitsandbytes has packed brings a `nested_map` of its
    own, 1 kB a weight: its values depend on the instruction set of the machine.

    As in bitsandbytes, two codes make a byte, the first in its high bits; the last block may be shorter; an
    odd number of codes is made even with that of 0. Its kernel for the CPU divides in a last, shorter block
    where those for GPUs, and this, multiply by the inverse.

    Args:
      block: how many numbers share an absmax; even.
      nested_block: how many of these share a nested absmax.
      double: whether absmax is quantised. Else it is stored in float32, for 4.5 bits a number.
    """

    block: int = 64
    nested_block: int = 256
    double: bool = True

    in_order: ClassVar[tuple[str, ...]] = ("codes", "absmax")

    def __post_init__(self) -> None:
        for name, divisor in (("block", 2), ("nested_block", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1 or value % divisor:
                raise ValueError(
                    f"`{name}` is {value!r}; it must be a positive "
                    f"{'even ' if divisor == 2 else ''}integer, as 64 or 256."
                )

    def ndims(self, own: tuple[int, ...]) -> dict[str, int]:
        nested = {"nested_absmax": 1, "nested_offset": 0} if self.double else {}
        return {"codes": 1, "absmax": 1, **nested}

    def pack(self, weight: jax.Array, stack: int) -> dict[str, jax.Array]:
        _check(weight, stack, 0)
        return self._pack(weight, stack)

    @partial(jax.jit, static_argnums=(0, 2))
    def _pack(self, weight: jax.Array, stack: int) -> dict[str, jax.Array]:
        layers = weight.shape[:stack]
        flat = weight.astype(jnp.float32).reshape(*layers, -1)
        scaled, absmax = _normalised(flat, self.block)
        middles = ((_NF4[:-1] + _NF4[1:]) / 2).reshape((1,) * scaled.ndim + (-1,))
        codes = jnp.sum(scaled[..., None] > middles, axis=-1, dtype=jnp.uint8).reshape(*layers, -1)
        codes = codes[..., : flat.shape[-1] + flat.shape[-1] % 2]
        arrays = {"codes": codes[..., ::2] << 4 | codes[..., 1::2], "absmax": absmax}
        if not self.double:
            return arrays
        offset = _mean(absmax)
        scaled, nested_absmax = _normalised(absmax - offset[..., None], self.nested_block)
        nearest = (
            jnp.searchsorted((_DYNAMIC[:-1] + _DYNAMIC[1:]) / 2, scaled)
            .astype(jnp.uint8)
            .reshape(*layers, -1)
        )
        nested = {"nested_absmax": nested_absmax, "nested_offset": offset}
        return {**arrays, "absmax": nearest[..., : absmax.shape[-1]], **nested}

    @partial(jax.jit, static_argnums=(0, 2, 3))
    def unpack(self, arrays: dict[str, jax.Array], shape: tuple[int, ...], dtype: Any) -> jax.Array:
        absmax = arrays["absmax"]
        if self.double:
            nested_absmax = jnp.repeat(arrays["nested_absmax"], self.nested_block)[: absmax.size]
            absmax = (
                _rounded(_look_up(arrays.get("nested_map", jnp.asarray(_DYNAMIC)), absmax) * nested_absmax)
                + arrays["nested_offset"]
            )
        # By rows where these are whole blocks. A device that needs some columns can then unpack these alone.
        rows = shape[:-1] if shape and shape[-1] % self.block == 0 else ()
        length, half = math.prod(shape[len(rows) :]), self.block // 2
        codes, absmax = arrays["codes"], absmax.reshape(*rows, -1, 1)
        if codes.size % half:  # the last block is shorter
            codes = jnp.pad(codes, (0, -codes.size % half))
        codes = codes.reshape(*rows, -1, half)
        # Both numbers of a byte at once, next to each other: a loop over numbers would be one that no
        # processor takes in steps of several, because two read the same byte.
        pairs = [_look_up(jnp.asarray(_NF4), code) * absmax for code in (codes >> 4, codes & 15)]
        values = jnp.stack(pairs, axis=-1).reshape(*rows, -1)[..., :length]
        return values.reshape(shape).astype(jax.dtypes.canonicalize_dtype(dtype))


@dataclasses.dataclass(frozen=True)
class Int8(Format):
    """`w̃ = code · scale`, `code = round(w / scale)` and `scale = max |w| / 127` over all but the last axis:
    8 bits a number.

    >>> import jax.numpy as jnp
    >>> arrays = Int8().pack(jnp.array([[127.0, 0.1], [-3.4, -0.2]]), 0)
    >>> arrays["codes"].tolist(), arrays["scale"].shape
    ([[127, 64], [-3, -127]], (1, 2))
    """

    def ndims(self, own: tuple[int, ...]) -> dict[str, int]:
        return {"codes": len(own), "scale": len(own)}

    def pack(self, weight: jax.Array, stack: int) -> dict[str, jax.Array]:
        _check(weight, stack, 1)
        return self._pack(weight, stack)

    @partial(jax.jit, static_argnums=(0, 2))
    def _pack(self, weight: jax.Array, stack: int) -> dict[str, jax.Array]:
        weight = weight.astype(jnp.float32)
        # XLA makes this product of a division by a constant, but only when it compiles one.
        scale = jnp.max(
            jnp.abs(weight), axis=tuple(range(stack, weight.ndim - 1)), keepdims=True
        ) * np.float32(1 / 127)
        scale = jnp.where(scale < _TINY, jnp.float32(0), scale)  # false for NaN, which stays
        inverse = jnp.float32(1) / jnp.where(
            scale == 0, jnp.float32(1), scale
        )  # XLA chooses by itself whether it divides by the inverse
        codes = jnp.round(weight * inverse).astype(jnp.int8)
        return {"codes": codes, "scale": scale}

    @partial(jax.jit, static_argnums=(0, 2, 3))
    def unpack(self, arrays: dict[str, jax.Array], shape: tuple[int, ...], dtype: Any) -> jax.Array:
        values = arrays["codes"].astype(jnp.float32) * arrays["scale"]
        return values.reshape(shape).astype(jax.dtypes.canonicalize_dtype(dtype))


FORMATS = {"nf4": NF4(), "int8": Int8()}


def from_bitsandbytes(
    tensors: Mapping[str, np.ndarray], name: str = "weight"
) -> tuple[NF4, dict[str, jax.Array], tuple[int, ...], Any]:
    """The format, arrays, shape and dtype of the weight that bitsandbytes (0.50.2) has stored as `name`,
    without a change to its bytes: `format.unpack(arrays, shape, dtype)` is bit for bit what bitsandbytes
    makes of them.

    `tensors` are those of its file; other weights' keys are ignored. The shape is PyTorch's: (out, in).

    Raises:
      ValueError: a key is missing, or what it holds has another dtype, shape or meaning; the text names the
        key.
    """
    key = f"{name}.quant_state.bitsandbytes__nf4"
    if key not in tensors:
        others = [other for other in tensors if other.startswith(f"{name}.quant_state.")]
        raise ValueError(
            f"`{key}` is missing{f'; there is {others}, but only NF4 is read' if others else ''}."
        )
    try:
        state = dict(json.loads(np.asarray(tensors[key]).tobytes()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{key}` is not the bytes of a JSON object: {error}.") from error

    def entry(field: str, expected: type | tuple[str, ...]) -> Any:
        value = state.get(field)
        if not (isinstance(value, expected) if isinstance(expected, type) else value in expected):
            raise ValueError(f"`{key}` has {value!r} for {field!r}; {expected} was expected.")
        return value

    def read(key: str, dtype: Any, *shape: int) -> np.ndarray:
        if key not in tensors:
            raise ValueError(f"`{key}` is missing.")
        array = np.asarray(tensors[key])
        if array.dtype != dtype or array.shape != shape:
            raise ValueError(
                f"`{key}` is {array.dtype}{list(array.shape)}; of a weight of shape {list(own)}, "
                f"{np.dtype(dtype)}{list(shape)} was expected. "
                "If it was stored as a wider dtype (`bnb_4bit_quant_storage`), view it as uint8 first."
            )
        return array

    entry("quant_type", ("nf4",))
    own, dtype = tuple(entry("shape", list)), jnp.dtype(entry("dtype", ("float32", "float16", "bfloat16")))
    double = any(field.startswith("nested_") for field in state)
    try:
        format = NF4(
            entry("blocksize", int), entry("nested_blocksize", int) if double else NF4.nested_block, double
        )
    except ValueError as error:
        raise ValueError(f"`{key}`: {error}") from error
    blocks = -(-math.prod(own) // format.block)
    # bitsandbytes never looks into this map: its kernels contain the quantiles.
    if not np.allclose(read(f"{name}.quant_map", np.float32, 16), _NF4, rtol=0, atol=1e-6):
        raise ValueError(
            f"`{name}.quant_map` is not that of NF4, by which bitsandbytes unpacks whatever it finds here."
        )
    arrays = {
        "codes": read(name, np.uint8, -(-math.prod(own) // 2), 1)[:, 0],
        "absmax": read(f"{name}.absmax", np.uint8 if double else np.float32, blocks),
    }
    if double:
        entry("nested_dtype", ("float32",))
        arrays["nested_map"] = read(f"{name}.nested_quant_map", np.float32, 256)
        arrays["nested_absmax"] = read(f"{name}.nested_absmax", np.float32, -(-blocks // format.nested_block))
        arrays["nested_offset"] = np.asarray(entry("nested_offset", float), np.float32)
    return format, {part: jnp.asarray(array) for part, array in arrays.items()}, own, dtype


def _check(weight: jax.Array, stack: int, needed: int) -> None:
    if (
        not jnp.issubdtype(weight.dtype, jnp.floating)
        or weight.size == 0
        or not 0 <= stack <= weight.ndim - needed
    ):
        raise ValueError(
            f"`weight` has shape {tuple(weight.shape)} and dtype {weight.dtype}, of which {stack} stacked "
            "axes; what is quantised must be floats, "
            f"at least one, with {needed} or more axes that are not stacked."
        )
    if not isinstance(weight, jax.core.Tracer) and not _in_range(weight):
        raise ValueError(
            "`weight` has a value that is NaN, infinite or beyond 2**126, which no scale can represent. "
            "Quantise trained weights."
        )


@jax.jit
def _in_range(weight: jax.Array) -> jax.Array:
    return jnp.all(jnp.abs(weight.astype(jnp.float32)) <= 1 / _TINY)


def _normalised(flat: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """`flat` (…, n) in blocks (…, blocks, block), padded with zeros and divided by their absmax, and this
    (…, blocks).
    """
    widths = [(0, 0)] * (flat.ndim - 1) + [(0, -flat.shape[-1] % block)]
    blocks = jnp.pad(flat, widths).reshape(*flat.shape[:-1], -1, block)
    absmax = jnp.max(jnp.abs(blocks), axis=-1)
    # The absmax of zeros has no inverse. 1 has: their code is that of 0.
    inverse = jnp.float32(1) / jnp.where(absmax < _TINY, jnp.float32(1), absmax)
    return blocks * inverse[..., None], absmax


def _mean(array: jax.Array) -> jax.Array:
    """The mean along the last axis, summed by halves: in the same order alone and stacked, compiled and
    not, everywhere.
    """
    size = array.shape[-1]
    total = jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, 2 ** (size - 1).bit_length() - size)])
    while total.shape[-1] > 1:
        half = total.shape[-1] // 2
        total = total[..., :half] + total[..., half:]
    return _rounded(total[..., 0] * np.float32(1 / size))


def _rounded(product: jax.Array) -> jax.Array:
    """The same, through an operation that a compiler cannot leave out, so that what follows has a rounded
    product.

    XLA contracts a product and a sum to one operation that rounds once, and does so through
    `optimization_barrier` and `reduce_precision`: of a fifth of all sums the last bit is then another.
    """
    limit = np.finfo(np.float32).max
    return lax.clamp(-limit, product, limit)


def _look_up(table: jax.Array, index: jax.Array) -> jax.Array:
    return table.at[index].get(mode="promise_in_bounds")
