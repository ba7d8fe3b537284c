"""`hf.load` reads a Hugging Face directory as a model and its parameters."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from ...models._config import numbered_labels
from ...processes import all_or_none, spanning
from ...sharding import Rules
from .. import _state_dict
from .._families import chosen_head, Family, family_of
from .._files import read_json
from .._placing import Placer, shardings_of
from .._safetensors import facts_of, stored_tensors
from .._strict import check_beside, check_finite, check_tensors, DTYPES, on_device, renamed
from .._tensors import Tensor, tensors_of


def load(
    dir: str | Path,
    *,
    tie: str = "share",
    head: str | None = None,
    num_labels: int | None = None,
    vocab_size: int | None = None,
    key: jax.Array | None = None,
    scan: bool = False,
    checkpoint: bool = False,
    dtype: Any = None,
    param_dtype: Any = None,
    place: Callable[[str, np.ndarray], Any] = on_device,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    verify: bool = True,
) -> tuple[nn.Module, dict]:
    """The model that a directory's `config.json` names, with the head that it names, and its parameters.

    ```python
    model, params = hf.load("path/to/gpt2")
    logits = model.apply({"params": params}, input_ids)

    model, params = hf.load("path/to/gpt2", tie="untie")   # the head as a leaf of its own, lm_head/kernel
    model, params = hf.load("path/to/gpt2", scan=True, checkpoint=True, dtype=jnp.bfloat16)
    model, params = hf.load("path/to/gpt2", place=lambda path, array: array)  # on disk until it is used
    model, params = hf.load("path/to/gpt2", mesh=mesh, scan=True)  # split over a mesh from the start

    # The pretrained encoder with a new head, drawn from `key`: where fine-tuning begins.
    model, params = hf.load(
        "path/to/roberta-base", head="sequence_classification", num_labels=3, key=jax.random.key(0)
    )
    ```

    The tensors are read from safetensors, in one file or in shards, or else from `pytorch_model.bin`, of
    which no code is run. Parameters keep the dtype of the file, unless `param_dtype` is given. With a mesh
    that spans several processes, all of them call this with the same arguments; each reads the parts of its
    own devices, and an error in one is raised in all.

    Args:
      dir: has a `config.json` and the tensors. A model on Hugging Face's hub is downloaded first:
        `huggingface_hub.snapshot_download("gpt2")` returns its directory.
      tie: `"share"` follows the config: a tied head is the embedding, used twice. `"untie"` always gives the
        head a leaf of its own: the file's, if it has one, and otherwise with the embedding's values.
      head: one of `lora_jax.models.HEADS`, in place of the head that the config names. The encoder is read as
        strictly as ever, and tensors of other heads are passed over. Unless the file has the whole new head,
        for as many labels, all of it is drawn as the model draws it; so is a pooler before the head that a
        masked LM's file lacks.
      num_labels: the number of labels of that head.
      vocab_size: the number of tokens, where an adapter was trained with more than the base has. The rows of
        the added tokens are zero until `peft.load` brings them.
      key: for a head that is drawn; None is `jax.random.key(0)`.
      scan, checkpoint, dtype: of the model; `dtype` is that of the computation.
      param_dtype: a dtype to which parameters are cast as they are read, each part before it goes to its
        device.
      place: a function of a leaf's path and array that puts the leaf on its devices. The default copies it to
        JAX's default device. Unless the model is scanned, the array is a read-only memory map of the file:
        returned as it is, it takes no memory, and `save` merges and writes models that are larger than that.
        `jax.device_put` on a CPU may keep the map, too.
      mesh: a mesh with the axes data, fsdp and tensor. Each weight is split over it: every device gets its
        own part and no other.
      rules: how weights are split (see `lora_jax.sharding`); None is the model's `partition_rules`.
      verify: whether to compare the files with the checksums of `save`, if they carry any, and to look for
        values that are not finite. Both read everything once.

    Raises:
      ValueError: a file, key or tensor that is missing, unexpected, damaged, or of another shape or dtype; a
        head that the model does not have; a mesh that does not divide a weight.
    """
    if tie not in ("share", "untie"):
        raise ValueError(f"`tie` is {tie!r}; it must be 'share' or 'untie'.")
    directory = Path(dir)
    span = mesh is not None and spanning(mesh)
    with all_or_none(span):
        settings = read_json(directory / "config.json")
        family = family_of(settings)
        named: Any = family.config.from_hf(settings)
        config = named if num_labels is None else _with_labels(named, head, num_labels)
        if vocab_size is not None:
            config = _with_tokens(config, vocab_size)
        chosen = chosen_head(settings, family, head)
        # Where `head` is the config's own head, its tensors are read as strictly as all others.
        own = {family.heads.get(name) for name in settings.get("architectures") or ()}
        replaced = head is not None and (own != {head} or config != named)
        stored = renamed(directory, _stored(directory, verify, divided=span), family.full_name)
        build = functools.partial(family.build, head=chosen, dtype=dtype, scan=scan, checkpoint=checkpoint)
        config = _tied_or_untied(directory, family, build, config, stored, tie)
        model = build(config)
        tensors = tensors_of(model, family)
        layout = None if mesh is None else shardings_of(model, mesh, rules)
        expected = {tensor.name for tensor in tensors}
        stored = {
            name: tensor
            for name, tensor in stored.items()
            if name in expected or not family.leftovers.fullmatch(name)
        }
        stored, fresh = _head_of_file_or_new(family, tensors, stored) if replaced else (stored, set())
        kept = [tensor for tensor in tensors if tensor.path not in fresh]
        if config.vocab_size > named.vocab_size:
            stored = _with_rows(kept, stored, named.vocab_size, config.vocab_size)
        check_tensors(
            f"{directory} does not hold the model that its config.json describes",
            {tensor.name: tensor.shape for tensor in kept},
            stored,
        )
        # The model makes caches and new heads in `param_dtype`; float32 would not fit parameters of another
        # dtype.
        model = model.clone(
            param_dtype=DTYPES[stored[family.embedding].dtype]
            if param_dtype is None
            else jnp.dtype(param_dtype)
        )

        placer = Placer(
            (lambda name, array: check_finite(directory, name, array)) if verify else lambda _, array: array,
            None if param_dtype is None else model.param_dtype,
            place,
            layout,
        )
        drawn = _drawn(model, fresh, key)
        flat = {path: placer.leaf(path, [path], [array], False) for path, array in drawn.items()}
        flat |= placer.leaves(kept, stored)
        return model, traverse_util.unflatten_dict(flat, sep="/")


def _stored(directory: Path, verify: bool, *, divided: bool) -> Mapping[str, Any]:
    """The tensors in the directory, not read yet, with their `name`, `shape`, `dtype` and `read()`.

    A file that is verified is read as a whole. With `divided`, each process verifies its share of the files.
    """
    if any(directory.glob("pytorch_model.bin*")) and not any(directory.glob("model.safetensors*")):
        return _state_dict.stored_binaries(directory, "pytorch_model")
    stored = stored_tensors(directory)
    if verify:
        files = sorted({tensor.file for tensor in stored.values()})
        for file in files[jax.process_index() :: jax.process_count()] if divided else files:
            check_beside(file, facts_of(file))
    return stored


def _with_labels(config: Any, head: str | None, count: int) -> Any:
    if head is None:
        raise ValueError(
            f"`num_labels` is {count} without a `head`: the config's own head has the {config.num_labels} "
            "labels it was trained for. Pass `head` too, for a new one."
        )
    return (
        config if count == config.num_labels else dataclasses.replace(config, labels=numbered_labels(count))
    )


class _Padded(NamedTuple):
    """A tensor of the file with zeros for the rows of added tokens. Its interface is that of `Stored`."""

    tensor: Any
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def dtype(self) -> str:
        return self.tensor.dtype

    def read(self) -> np.ndarray:
        array = self.tensor.read()
        return np.concatenate([array, np.zeros((self.shape[0] - len(array), *self.shape[1:]), array.dtype)])


def _with_tokens(config: Any, count: int) -> Any:
    if isinstance(count, bool) or not isinstance(count, int) or count < config.vocab_size:
        raise ValueError(
            f"`vocab_size` is {count!r}, and the base has {config.vocab_size} tokens: pass the number that "
            "the adapter was trained with, which is larger, or leave it out."
        )
    return dataclasses.replace(config, vocab_size=count)


def _with_rows(tensors: list[Tensor], stored: Mapping[str, Any], before: int, after: int) -> dict[str, Any]:
    """`stored` with the rows of added tokens, in every tensor that has a row for each token."""
    grown = {
        tensor.name: _Padded(stored[tensor.name], tensor.shape)
        for tensor in tensors
        if tensor.name in stored
        and tensor.shape[:1] == (after,)
        and stored[tensor.name].shape == (before, *tensor.shape[1:])
    }
    return {**stored, **grown}


def _tied_or_untied(
    directory: Path, family: Family, build: functools.partial, config: Any, stored: dict[str, Any], tie: str
) -> Any:
    """The config that `tie` asks for. `stored` is changed to fit it: each tensor has one name, and a head
    that is not tied has a tensor of its own.
    """
    decoder, embedding = family.decoder, family.embedding
    tied = config.tie_word_embeddings
    if tied and tie == "untie":
        apart = dataclasses.replace(config, tie_word_embeddings=False)
        if any(tensor.name == decoder for tensor in tensors_of(build(apart), family)):
            config, tied = apart, False
            if decoder not in stored and embedding in stored:
                stored[decoder] = stored[embedding]
        elif build.keywords["head"] == "masked_lm":
            raise ValueError(
                f"`tie` is 'untie', and the head of {directory} is the embedding by definition "
                "(`legacy`=false); leave it out."
            )
    elif tied and decoder in stored and embedding in stored:
        _check_equal(
            directory, stored, decoder, embedding, "keep both with `tie='untie'`, or remove the tensor"
        )
        del stored[decoder]
    for alias, name in family.aliases.items():
        if alias in stored:
            if tied and name in stored:
                _check_equal(directory, stored, alias, name, "remove the first")
            # Where the two are not tied, PyTorch uses the value under the second name.
            stored[name] = stored.pop(alias)
    return config


def _check_equal(directory: Path, stored: dict[str, Any], one: str, other: str, fix: str) -> None:
    if not np.array_equal(stored[one].read(), stored[other].read()):
        raise ValueError(
            f"{directory} has a {one!r} that differs from its {other!r}, though its config.json ties them; "
            f"{fix}."
        )


def _head_of_file_or_new(
    family: Family, tensors: list[Tensor], stored: dict[str, Any]
) -> tuple[dict[str, Any], set[str]]:
    """`stored` without the tensors of other heads, and the paths of leaves to be drawn: the whole head if any
    of its tensors is missing or has another shape, and a pooler before it that the file does not have.
    """
    found = {name: tensor for name, tensor in stored.items() if name.startswith(family.prefix)}
    own = [tensor for tensor in tensors if not tensor.name.startswith(family.prefix)]
    pooler = [tensor for tensor in tensors if own and tensor.name.startswith(family.pooler)]
    fresh = set() if any(tensor.name in stored for tensor in pooler) else {tensor.path for tensor in pooler}
    if any(tensor.name not in stored or stored[tensor.name].shape != tensor.shape for tensor in own):
        return found, fresh | {tensor.path for tensor in own}
    return found | {tensor.name: stored[tensor.name] for tensor in own}, fresh


def _drawn(model: nn.Module, paths: set[str], key: jax.Array | None) -> dict[str, np.ndarray]:
    """These leaves of freshly drawn parameters; the others are never computed."""
    if not paths:
        return {}

    def draw(key: jax.Array) -> dict[str, jax.Array]:
        flat = traverse_util.flatten_dict(model.init(key, jnp.zeros((1, 1), jnp.int32))["params"], sep="/")
        return {path: flat[path] for path in sorted(paths)}

    return jax.device_get(jax.jit(draw)(jax.random.key(0) if key is None else key))
