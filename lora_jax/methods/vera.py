"""VeRA: Vector-based Random Matrix Adaptation (Kopiczko et al., ICLR 2024, arXiv 2310.11454)."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._lowrank.factored import Canonical, Term
from .._tree.method import Method, Spec
from .._tree.nodes import Adapter, Fixed, Shared
from . import _lowrank


@dataclasses.dataclass(frozen=True)
class Pool:
    """Where the shared projections are, and the largest sizes among the leaves that share them."""

    owner: str
    ins: int
    outs: int
    seed: int


@dataclasses.dataclass(frozen=True)
class VeRA(Method):
    r"""`W' = W + A₀·diag(d)·B₀·diag(b)` with A₀ and B₀ random, frozen and shared by all leaves of this
    method; each leaf trains two vectors (paper, equation 2).

    >>> import jax.numpy as jnp, lora_jax
    >>> params = {"kernel": jnp.ones((64, 32))}
    >>> frozen, delta = lora_jax.lorafy(params, "kernel", method=lora_jax.VeRA(rank=16))
    >>> {name: array.shape for name, array in delta["kernel"].arrays.items()}
    {'b': (32,), 'd': (16,)}

    b starts at zero, so training starts from the base exactly. The vectors multiply `x·A₀` and the result,
    never the projections: no gradient of a projection's size is computed. A₀ and B₀ are as large as the
    largest leaf needs; others use their first rows and columns. They are PEFT's own draws for this seed, bit
    for bit, so that an adapter stored without its projections can be read. There is no alpha. Every layer of
    a stacked leaf has vectors of its own; there, the projections are repeated for the layers while the
    function runs, and the loop over them belongs inside of the adapted function: the tree itself cannot be
    scanned over, since the projections have no layers.

    Args:
      rank: of the projections; may exceed min(in, out), since it costs only `rank` numbers a leaf.
      d_initial: the start of d.
      seed: of the projections; PEFT's `projection_prng_key`.
      dropout: as in `LoRA`.
      dtype: of the vectors and projections. None means float32, or float64 for a float64 weight.

    Shapes, for a weight (in, out): `d` (rank,), `b` (out,), layer axes first; in `frozen`, at the first leaf,
    `shared_a` (largest in, rank) and `shared_b` (rank, largest out).

    Raises:
      ValueError: an option out of range.
    """

    rank: int = 256
    d_initial: float = 0.1
    seed: int = 0
    dropout: float = 0.0
    dtype: Any = None

    sided = True
    needs_whole_weight = True
    proportional = True

    def __post_init__(self) -> None:
        _lowrank.check_options(self)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(
                f"`seed` is {self.seed!r}; it must be an integer from 0 to 2**32 - 1, because it is static."
            )

    @property
    def random(self) -> bool:
        return self.dropout > 0.0

    def grouped(self, specs: tuple[Spec, ...]) -> tuple[Spec, ...]:
        ins, outs = (max(math.prod(spec.sizes(word)) for spec in specs) for word in ("in", "out"))
        return tuple(
            dataclasses.replace(spec, group=Pool(specs[0].path, ins, outs, self.seed)) for spec in specs
        )

    def split(self, weight: jax.Array, spec: Spec, key: jax.Array) -> tuple[Any, Any]:
        dtype, sizes, pool = _lowrank.dtype_of(self, weight), _lowrank.shapes(spec, self.rank), spec.group
        trained = {
            "b": jnp.zeros(sizes["outer"], dtype),
            "d": jnp.full(sizes["inner"], self.d_initial, dtype),
        }
        if pool.owner != spec.path:
            borrowed = {name: Shared(pool.owner) for name in ("shared_a", "shared_b")}
            return Fixed(weight, borrowed, spec), Adapter(trained, spec)
        draw = lambda: projections(self.seed, self.rank, pool.ins, pool.outs)
        shapes = ((pool.ins, self.rank), (self.rank, pool.outs))
        if isinstance(weight, jax.core.Tracer):  # `lorafy` from shapes allocates nothing
            found = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
            a, b = jax.pure_callback(draw, found)
        else:
            a, b = draw()
        shared = {"shared_a": jnp.asarray(a, dtype), "shared_b": jnp.asarray(b, dtype)}
        return Fixed(weight, shared, spec), Adapter(trained, spec)

    def array_axes(self, spec: Spec) -> dict[str, tuple[int | None, ...]]:
        axes = _lowrank.axes_of(spec)
        return {"b": axes["outer"], "d": axes["inner"], "shared_a": (None, None), "shared_b": (None, None)}

    def canonical(
        self, weight: Any, fixed: dict, trained: dict, spec: Spec, key: jax.Array | None
    ) -> Canonical:
        layers, ins, outs = (spec.sizes(word) for word in ("layer", "in", "out"))
        a = fixed["shared_a"][: math.prod(ins)].reshape(*ins, self.rank)
        b = fixed["shared_b"][:, : math.prod(outs)].reshape(self.rank, *outs)
        a, b = (jax.lax.stop_gradient(jnp.broadcast_to(array, (*layers, *array.shape))) for array in (a, b))
        return Canonical((Term(a, b, inner=trained["d"], outer=trained["b"]),), dropout=self.dropout)

    def at_rank(self, trained: dict, spec: Spec, rank: int) -> tuple[Method, dict]:
        _lowrank.check_own_rank(self, spec, rank, "the pair of projections")
        return dataclasses.replace(self, d_initial=0.1, dtype=trained["b"].dtype), trained


def projections(seed: int, rank: int, ins: int, outs: int) -> tuple[np.ndarray, np.ndarray]:
    """A₀ (ins, rank) and B₀ (rank, outs) in float32, as PEFT draws them with PyTorch's CPU generator.

    Kaiming-uniform of gain √2 on (rank, ins), then on (outs, rank), from one Mersenne Twister. PyTorch takes
    24 bits of each of its 32-bit words for a float.
    """
    generator = np.random.RandomState(seed)

    def uniform(rows: int, columns: int) -> np.ndarray:
        bound = float(np.float32(math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(columns))))
        words = generator.randint(0, 2**32, size=rows * columns, dtype=np.uint32)
        unit = (words & np.uint32(0xFFFFFF)) * 2.0**-24
        return (unit * float(np.float32(2 * bound)) - bound).astype(np.float32).reshape(rows, columns)

    a, b = uniform(rank, ins), uniform(outs, rank)
    return np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)
