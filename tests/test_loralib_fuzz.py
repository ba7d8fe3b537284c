"""Any change of the tensors in a file of loralib's format: refused, or the result says what the file says."""

import hypothesis
import hypothesis.strategies as st
import jax
import loralib_files
import numpy as np
import pytest
from loralib_files import adapters, Ours

import lora_jax
from lora_jax import LoRA
from lora_jax._paths import named_leaves
from lora_jax._tree.nodes import is_node
from lora_jax.interop import hf


bases = loralib_files.bases


_OTHER_NAMES = [
    "lora_A",
    "extra",
    "module.{}",
    "{}.weight",
    "{}_",
    "base_model.model.{}",
    "model.{}",
    " {}",
    "{}.",
    "transformer.{}",
    "module.module.{}",
]
_RESHAPES = {
    "transposed": lambda array: array.T,
    "flat": lambda array: array.reshape(-1),
    "row": lambda array: array.reshape(1, -1),
    "halves": lambda array: array.reshape(2, -1),
    "thirds": lambda array: array.reshape(-1, 3),
    "first half": lambda array: array[: len(array) // 2],
    "twice": lambda array: np.concatenate([array, array]),
    "one more": lambda array: array[None],
    "number": lambda array: array.reshape(-1)[0],
    "nothing": lambda array: array[:0],
}
_DTYPES = ["float16", "bfloat16", "float32", "float64", "int32", "int64", "uint8", "bool"]
_CHANGES = st.one_of(
    st.just(("drop", None)),
    st.tuples(st.just("rename"), st.sampled_from(_OTHER_NAMES)),
    st.tuples(st.just("reshape"), st.sampled_from(sorted(_RESHAPES))),
    st.tuples(st.just("retype"), st.sampled_from(_DTYPES)),
)


@pytest.fixture(scope="module", params=[False, True], ids=["unscanned", "scanned"])
def full(request, bases, tmp_path_factory):
    """With all weights of the base in the file, adapters of blocks, and biases that train."""
    made = Ours(
        bases("gpt2"),
        tmp_path_factory.mktemp("full"),
        LoRA(rank=2, blocks=(True, False, True)),
        scan=request.param,
    )
    _, params = hf.load(bases("gpt2"))
    made.theirs = dict(_theirs(params))
    made.tensors = {**made.theirs, **made.tensors, "lm_head.weight": made.theirs["transformer.wte.weight"]}
    return made


def _theirs(params):
    """The parameters by PyTorch's names. Written apart from `interop`, so that neither vouches for the
    other.
    """
    for path, leaf in named_leaves(params):
        name = "transformer." + path.replace("/", ".")
        for ours in ("kernel", "scale", "embedding"):
            name = name.removesuffix(ours) + "weight" if name.endswith(f".{ours}") else name
        yield name, np.asarray(leaf)


def _told(trees):
    """What trees say, by the names of the file: every weight, and every A and B."""
    frozen, delta = trees
    joined = jax.tree.map(
        lambda one, other: other if one is None else one,
        frozen,
        delta,
        is_leaf=lambda leaf: leaf is None or is_node(leaf),
    )
    found = dict(_theirs(_unstacked(joined)))
    for path, leaf in adapters(delta).items():
        stacked = bool(leaf.spec.sizes("layer"))
        for index in range(2) if stacked else [None]:
            a, b = (
                np.asarray(leaf.arrays[name] if index is None else leaf.arrays[name][index]) for name in "ab"
            )
            name = "transformer." + path.removesuffix("/kernel").replace(
                "h/", "h/0/" if index == 0 else "h/1/" if index else "h/"
            ).replace("/", ".")
            found[f"{name}.lora_A"] = np.concatenate([block.T for block in a])
            found[f"{name}.lora_B"] = np.concatenate([block.T for block in b])
    return {**found, "lm_head.weight": found["transformer.wte.weight"]}


def _unstacked(params):
    return params if "0" in params["h"] else lora_jax.models.unstack_layers(params)


@hypothesis.given(
    changes=st.dictionaries(st.integers(0, 10**6), _CHANGES, min_size=1, max_size=3),
    adapters_only=st.booleans(),
)
@hypothesis.settings(max_examples=80, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_a_changed_file_is_refused_or_the_result_says_what_it_says(full, changes, adapters_only):
    """Nothing in between: no tensor of the file is passed over, cast or reshaped, and what it lacks is
    the base's.
    """
    tensors = dict(full.tensors)
    names = sorted(name for name in tensors if "lora_" in name or not adapters_only)
    for place, (kind, argument) in changes.items():
        name = names[place % len(names)]
        if name not in tensors:
            continue
        array = tensors.pop(name)
        if kind == "rename":
            tensors[argument.format(name)] = array
        elif kind == "retype":
            tensors[name] = array.astype(argument)
        elif kind == "reshape":
            try:
                tensors[name] = np.ascontiguousarray(_RESHAPES[argument](array)).reshape(
                    _RESHAPES[argument](array).shape
                )
            except (ValueError, TypeError, IndexError):  # what was reshaped before cannot be again
                tensors[name] = array
    try:
        trees = full.load(tensors)
    except ValueError as error:
        hypothesis.event("refused")
        assert "other.pt" in str(error) or "float64" in str(error)
        return
    hypothesis.event("accepted")
    told = _told(trees)
    said = {name.removeprefix("module."): array for name, array in tensors.items()}
    for name, array in said.items():
        assert name in told and told[name].shape == array.shape and np.array_equal(told[name], array), name
    for name, array in told.items():
        assert name in said or np.array_equal(
            array, full.theirs[name.replace("lm_head", "transformer.wte")]
        ), name
