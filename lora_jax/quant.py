"""QLoRA: Efficient Finetuning of Quantized LLMs (Dettmers et al., NeurIPS 2023, arXiv 2305.14314): adapters
beside a base that is stored in 4 or 8 bits.

Any method goes with any storage. What is packed is the frozen weight, and `adapt` unpacks it where it is
used. `_packed/formats.py` says how the bytes are laid out, `_packed/lazy.py` when they are unpacked. Left
out: paged optimisers, which are not needed here, because Adam state exists for A and B alone; and quantised
matrix products, because a product is computed in the weight's own dtype.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _axes
from ._packed.blocks import Blocks as Blocks
from ._packed.formats import (
    Format,
    FORMATS,
    from_bitsandbytes as _read_bitsandbytes,
    Int8 as Int8,
    NF4 as NF4,
)
from ._packed.packed import Packed as Packed
from ._paths import ALL_LINEAR, is_floating, is_shape, named_leaves, resolve_targets
from ._tree.nodes import Adapter, Fixed, is_node, weight_of


# A component of a path that names a table of rows to look up, or a vector, which may be stacked.
_TABLE_OR_VECTOR = re.compile(r".*embed.*|wte|wpe|lm_head|(.*_)?(bias|scale)")


def quantize(
    frozen: Any,
    format: str | Format,
    *,
    targets: Any = ALL_LINEAR,
    delta: Any = None,
    fn: Callable | None = None,
    args: tuple = (),
) -> Any:
    """`frozen` with its weights packed: 4.13 bits a number in `"nf4"`, 8 in `"int8"`.

    >>> import jax.numpy as jnp, lora_jax
    >>> params = {"kernel": jnp.linspace(-1, 1, 64 * 64).reshape(64, 64), "bias": jnp.zeros(64)}
    >>> frozen, delta = lora_jax.lorafy(params, "kernel")
    >>> frozen = lora_jax.quantize(frozen, "nf4")
    >>> forward = lora_jax.adapt(lambda params, x: x @ params["kernel"] + params["bias"][None])
    >>> forward(lora_jax.combine(frozen, delta), jnp.ones((1, 64))).shape
    (1, 64)

    Adapt first, then quantise. The adapted function unpacks a weight where it is used, and again for the
    backward pass. It never holds two unpacked weights, and goes through a scanned stack layer by layer. A
    quantised leaf without an adapter needs `adapt` too. DoRA's norm follows from the weight, and is made
    again for the quantised one. PiSSA's start is not, so that training starts from the quantised base
    exactly.

    Args:
      frozen: of `lorafy`; of arrays, or of shapes, and then nothing is allocated.
      format: `"nf4"` (blocks of 64, their scales quantised in turn), `"int8"` (one scale for each index of
        the last axis), or a value, `NF4(double=False)` for example. Stacked axes are packed index by index:
        those that the adapters (of `frozen` or `delta`) call `layer`, and where no adapter says, all but the
        last two.
      targets: as in `lorafy`, without methods. `"all-linear"` with `fn`: every weight that `fn` contracts
        with and does not look rows up in. Without `fn`, names decide. Every floating leaf of two or more axes
        is packed, except where a component of its path contains `embed`; is `wte`, `wpe`, `lm_head`, `bias`
        or `scale`; or ends in `_bias` or `_scale`. A stack of vectors by another name counts as a matrix:
        pass `fn`, or patterns.
      delta: the other tree. It says which axes are stacked, and with `fn`, what trains itself (`Full`) and is
        not in `frozen`.
      fn, args: as in `lorafy`.

    Raises:
      ValueError: an unknown format; a pattern that matches nothing; a leaf that is quantised already, or has
        a value that is not finite; `"all-linear"` that finds nothing.
    """
    format = _format(format)
    if isinstance(targets, Mapping):
        raise TypeError(
            "`targets` is a mapping, of patterns to methods; there is one format: pass the patterns, and "
            "call `quantize` again for another."
        )
    nodes = named_leaves(frozen, is_leaf=is_node)
    weights = [(path, weight_of(node)) for path, node in nodes]
    leaves = [(path, weight) for path, weight in weights if weight is not None]
    packed = [path for path, weight in leaves if isinstance(weight, Packed)]
    linear = lambda taken: _linear(frozen, delta, leaves, fn, args)
    chosen = (
        resolve_targets(
            [(path, leaf) for path, leaf in leaves if path not in packed], targets, format, linear
        )
        if len(packed) < len(leaves)
        else {}
    )
    if not chosen:
        raise ValueError(
            f"`frozen` is quantised already, at {packed[0]!r} for example; quantise the tree that `lorafy` "
            "returned."
        )

    layers = _layers(nodes, frozen, delta)

    def quantised(path: str, node: Any, weight: Any) -> Any:
        if path not in chosen:
            return node
        try:
            result = Packed.of(weight, format, layers.get(path))
        except ValueError as error:
            raise ValueError(f"{path!r} cannot be quantised: {error}") from error
        return _with_weight(node, result) if isinstance(node, Fixed) else result

    results = [
        quantised(path, node, weight) for (path, node), (_, weight) in zip(nodes, weights, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(frozen, is_leaf=is_node), results)


def _format(format: Any) -> Format:
    if isinstance(format, Format):
        return format
    if isinstance(format, str) and format in FORMATS:
        return FORMATS[format]
    raise ValueError(
        f"`format` is {format!r}; pass one of {', '.join(map(repr, FORMATS))}, or a value such as "
        "`lora_jax.quant.NF4(double=False)`."
    )


def _with_weight(node: Fixed, weight: Packed) -> Fixed:
    derived = lambda weight: node.spec.method.derived(weight, node.spec)
    shapes = any(map(is_shape, jax.tree.leaves(weight)))
    own = jax.eval_shape(derived, weight) if shapes else derived(weight)
    return Fixed(weight, {**node.arrays, **own}, node.spec)


def _linear(
    frozen: Any, delta: Any, leaves: list[tuple[str, Any]], fn: Callable | None, args: tuple
) -> list[str]:
    if fn is None:
        return [
            path
            for path, leaf in leaves
            if is_floating(leaf) and len(leaf.shape) > 1 and not _is_table_or_vector(path)
        ]
    treedef: Any
    nodes, treedef = jax.tree.flatten(frozen, is_leaf=is_node)
    others = [None] * len(nodes) if delta is None else treedef.flatten_up_to(delta)
    plain = [other if node is None else weight_of(node) for node, other in zip(nodes, others, strict=True)]
    try:
        readings = _axes.read(fn, jax.tree.unflatten(treedef, plain), tuple(args))
    except Exception as error:
        absent = [path for path, leaf in named_leaves(frozen, is_leaf=is_node) if leaf is None]
        if delta is None and absent:
            raise ValueError(
                f"`fn` failed on `frozen`, in which {absent[0]!r} is None. If it trains itself (`Full`), "
                "pass `delta=` too."
            ) from error
        raise
    return [path for path, _ in leaves if path in readings and readings[path].linear]


def _is_table_or_vector(path: str) -> bool:
    return any(_TABLE_OR_VECTOR.fullmatch(component) for component in path.split("/"))


def _layers(nodes: list[tuple[str, Any]], frozen: Any, delta: Any) -> dict[str, int]:
    """For each path that an adapter speaks of, how many stacked axes lead."""
    treedef: Any = jax.tree.structure(frozen, is_leaf=is_node)
    others = [] if delta is None else treedef.flatten_up_to(delta)
    adapters = [node for node in (*(node for _, node in nodes), *others) if isinstance(node, Adapter | Fixed)]
    leading = lambda axes: next((index for index, axis in enumerate(axes) if axis != "layer"), len(axes))
    return {node.spec.path: leading(node.spec.axes) for node in adapters}


def from_bitsandbytes(
    tensors: Mapping[str, np.ndarray], name: str = "weight", *, transpose: bool = True
) -> Packed:
    """A weight as bitsandbytes has stored it in NF4, for a place in `frozen`: bit for bit what bitsandbytes
    makes of its bytes.

    ```python
    tensors = safetensors.numpy.load_file("model.safetensors")
    packed = lora_jax.quant.from_bitsandbytes(tensors, "model.layers.0.self_attn.q_proj.weight")
    ```

    `tensors` are those of a file, among them `name`, `name.absmax` and the others that belong to it.
    PyTorch's Linear stores (out, in); `transpose` makes that (in, out), as Flax has it.

    Raises:
      ValueError: a tensor is missing or is not what it should be; the text names it.
    """
    format, arrays, shape, dtype = _read_bitsandbytes(tensors, name)
    return Packed(arrays, format, shape[::-1] if transpose else shape, dtype, turned=transpose)


def from_gguf(data: np.ndarray, kind: str, *, transpose: bool = True, dtype: Any = "float32") -> Packed:
    """A weight as a GGUF file has it, for a place in `frozen`: bit for bit what `gguf.dequantize` makes of
    its bytes, rounded once where `dtype` is not float32.

    >>> import numpy as np, lora_jax
    >>> rows = np.zeros((8, 2 * 34), np.uint8)  # 8 outputs; 34 bytes are 32 numbers of Q8_0
    >>> lora_jax.quant.from_gguf(rows, "Q8_0").shape
    (64, 8)

    `data` is what `gguf.GGUFReader` has for the tensor: (out, bytes of a row), with the axes of a stack
    before these. `kind` is llama.cpp's name of its type, for example "Q4_K". GGUF stores (out, in);
    `transpose` makes that (in, out), as Flax has it.

    Raises:
      ValueError: a type that is not kept packed; data of another dtype or shape.
    """
    format = Blocks(kind)
    if data.dtype != np.uint8 or data.ndim < 2 or data.shape[-1] % format.width:
        raise ValueError(
            f"`data` is {data.dtype}{list(data.shape)}; of {kind}, rows of whole blocks of {format.width} "
            "bytes (uint8) were expected."
        )
    own = (data.shape[-2], data.shape[-1] // format.width * format.size)
    codes = data.reshape(*data.shape[:-2], -1)
    return Packed({"codes": codes}, format, own[:: -1 if transpose else 1], jnp.dtype(dtype), transpose)


def nbytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, packed ones as they are stored.

    >>> import jax, lora_jax
    >>> base = {"kernel": jax.ShapeDtypeStruct((4096, 4096), "bfloat16")}
    >>> lora_jax.quant.nbytes(base), lora_jax.quant.nbytes(lora_jax.quantize(base, "nf4"))
    (33554432, 8654852)
    """
    return sum(int(leaf.size) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
