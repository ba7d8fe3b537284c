"""The weights a run starts from, and the tokenizer that belongs to them."""

import dataclasses
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import lora_jax
from experiments import catalogue
from experiments.config import Architecture, Base, Precision
from experiments.tasks import fast_tokenizer
from experiments.training import precision
from lora_jax.interop import gguf, hf
from lora_jax.models import BertConfig, DebertaV2Config, RobertaConfig
from lora_jax.models.gpt2 import GPT2, GPT2Config
from lora_jax.processes import on_first
from lora_jax.sharding import partition_specs, shardings


# Says which GGUF file the tokenizer beside it was written out of; written last.
UNPACKED = "unpacked.json"


@dataclass(frozen=True)
class Places:
    """Where a base may come from. `data`: where the config's paths start; `beside`: the config's directory,
    where a `path` that begins with a dot starts; `bases`: where a `name` is; `run`: the finished work
    directory of a base that is another config's result; `tokenizer`: this run's own, which was trained for a
    `vocabulary` or is written out of a GGUF file.
    """

    data: Path
    beside: Path
    bases: Path
    run: Path | None
    tokenizer: Path


@dataclass(frozen=True)
class Loaded:
    """`directory` holds the tokenizer's files, which an export carries along; `origin` says in words where
    the weights are from. `name` is what an adapter calls its base: the hub's name, or a whole path, which
    PEFT finds from any directory. None: the weights were drawn, and are in no file. `gguf`: the name of the
    file that they were read from, where llama.cpp reads it too. `again(key)`: the parameters with the head
    that this key draws; None: the base keeps its own.
    """

    model: Any
    params: Any
    tokenizer: Any
    directory: Path
    origin: str
    name: str | None = None
    gguf: str | None = None
    again: Callable[[jax.Array], Any] | None = None

    @property
    def head(self) -> str | None:
        """The pattern of the head that the task has given, which is new and trains whole; None: the model has
        its own.
        """
        head = getattr(self.model, "head", None)
        if head == "question_answering":
            return "qa_outputs/.*"
        if head != "sequence_classification":
            return None
        if isinstance(self.model.config, DebertaV2Config):
            return "(classifier|pooler)/.*"  # a pretrained DeBERTa has no pooler
        return "classifier/.*" if isinstance(self.model.config, ENCODERS) else "score/.*"

    def with_head_of(self, key: jax.Array) -> "Loaded":
        """The same base with the head that a run of this key has; its other arrays are not copied."""
        if self.again is None:
            return self
        new = {self.head: lora_jax.Full()}
        rest, head = lora_jax.lorafy(self.params, new).frozen, lora_jax.lorafy(self.again(key), new).delta
        return dataclasses.replace(self, params=lora_jax.merge(rest, head))


# Of models without a next token.
ENCODERS = (BertConfig, RobertaConfig, DebertaV2Config)
# Kinds of models, as a config.json has them, whose head can be one of spans.
SPANNING = ("bert", "roberta", "deberta-v2")


def load(
    section: Base,
    places: Places,
    key: jax.Array,
    mesh: Mesh,
    policy: Precision,
    labels: tuple[str, ...] | None = None,
    head: str = "sequence_classification",
) -> Loaded:
    """The base that `section` describes, in the dtypes of `policy`; with a `head` of `labels`, which is drawn
    unless the base has it, if the task has some.

    The weights are cast and split over `mesh` as they are read or drawn: no device holds more than its part.

    Raises:
      ValueError: the base has not the head that the task needs, and cannot be given it.
    """
    if labels is not None:
        return _with_labels(section, places, key, mesh, policy, labels, head)
    if section.architecture is not None:
        words = places.data / section.tokenizer if section.tokenizer is not None else places.tokenizer
        if not words.is_dir():
            raise FileNotFoundError(
                f"`base.tokenizer`: no directory `{words}`. {where_paths_start(places.data)}"
            )
        return _random(section, words, key, mesh, policy)
    source, origin, name = _source(section, places)
    how = {"mesh": mesh, "param_dtype": policy.parameters, "scan": section.scan}
    packed = source.name if source.suffix == ".gguf" else None
    if packed is not None:
        model, params = gguf.load(source, **how)
        tokenizer, directory = _with_end(_unpacked(source, places.tokenizer), source), places.tokenizer
    else:
        model, params = hf.load(source, **how)
        if isinstance(model.config, ENCODERS):
            raise ValueError(
                f"`base` is {origin}, a {type(model).__name__}, which has no next token: a task of labels, "
                "such as glue/mrpc, gives it a head; for texts take a GPT-2 or a Llama."
            )
        tokenizer, directory = load_tokenizer(source), source
    _check_vocabulary(tokenizer, model, source)
    return Loaded(precision.computing(model, policy), params, tokenizer, directory, origin, name, packed)


def _check_vocabulary(tokenizer: Any, model: Any, source: Path) -> None:
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer in `{source}` has {len(tokenizer)} tokens, more than the model's vocabulary "
            f"({model.config.vocab_size})."
        )


def _with_labels(
    section: Base,
    places: Places,
    key: jax.Array,
    mesh: Mesh,
    policy: Precision,
    labels: tuple[str, ...],
    head: str,
) -> Loaded:
    """A base with a head of these outputs, and the tokenizer that puts special tokens around a text or a
    pair.
    """
    if section.architecture is not None:
        raise ValueError(
            "`base.architecture` is a GPT-2 to be pretrained, and the task has labels: take `base.name`, "
            "`base.path` or `base.run`."
        )
    source, origin, name = _source(section, places)
    if source.suffix == ".gguf":
        raise ValueError(
            f"`base.path` is {source.name}, a file of llama.cpp's, which has no head of classes: take a "
            "directory of Hugging Face's."
        )
    if head == "question_answering":
        _check_spans(source, origin)
    load = functools.partial(
        hf.load,
        source,
        head=head,
        num_labels=len(labels),
        mesh=mesh,
        param_dtype=policy.parameters,
        scan=section.scan,
    )
    model, params = load(key=key)
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=True)
    _check_vocabulary(tokenizer, model, source)
    config = model.config
    if getattr(config, "type_vocab_size", 0) < 2:
        # Some tokenizers tell a pair's texts apart for a model that does not.
        tokenizer.model_input_names = [
            name for name in tokenizer.model_input_names if name != "token_type_ids"
        ]
    kind = "regression" if len(labels) == 1 else "single_label_classification"
    problem = kind if head == "sequence_classification" else None
    changes: dict[str, Any] = {"labels": labels, "problem_type": problem}
    if not isinstance(config, ENCODERS):
        # A decoder's head reads the last token before the padding.
        end = tokenizer.eos_token if tokenizer.pad_token is None else tokenizer.pad_token
        tokenizer.pad_token = end
        changes["pad_token_id"] = tokenizer.pad_token_id
    known = {field.name for field in dataclasses.fields(config)}
    changed = {field: value for field, value in changes.items() if field in known}
    model = model.clone(config=dataclasses.replace(config, **changed))
    again = lambda key: load(key=key)[1]
    return Loaded(precision.computing(model, policy), params, tokenizer, source, origin, name, again=again)


def _check_spans(source: Path, origin: str) -> None:
    """Raises `ValueError` for a base whose head cannot point at the tokens of an answer."""
    file = source / "config.json"
    kind = json.loads(file.read_text("utf-8")).get("model_type") if file.is_file() else None
    if kind is not None and kind not in SPANNING:
        raise ValueError(
            f"`base` is {origin}, a model of the kind {kind!r}, which has no head of the start and the end "
            f"of an answer: take one of {', '.join(SPANNING)}."
        )


def _source(section: Base, places: Places) -> tuple[Path, str, str]:
    """The directory or the GGUF file of a base that is not drawn; where it is from, in words; and what an
    adapter calls it.
    """
    if section.name is not None:
        found = catalogue.entry(section.name, "base.name")
        return catalogue.verified(section.name, places.bases), section.name, found.adapts
    if places.run is not None:
        merged = places.run / "merged"
        return merged, f"merged result of {section.run}", str(merged.resolve())
    assert section.path is not None  # what is left, as the config has checked
    source, on_hub = find(section.path, places.data, places.beside)
    return source, section.path, section.path if on_hub else str(source.resolve())


def where_paths_start(data: Path) -> str:
    """What to do about a path of a config that names nothing."""
    return (
        f"The config's paths start at `{data}`: pass `--data DIR`, or set LORA_JAX_DATA, if they are "
        "elsewhere."
    )


def find(path: str, data: Path, beside: Path) -> tuple[Path, bool]:
    """A directory or a GGUF file below `data`, or below `beside` if the path begins with a dot, or else a
    snapshot of the hub's repository of that name; and whether it is the last.
    """
    dotted = path.startswith(".")
    local = (beside / path).resolve() if dotted else data / path
    if path.endswith(".gguf"):
        if not local.is_file():
            raise FileNotFoundError(f"`base.path`: no file `{local}`. {where_paths_start(data)}")
        return local, False
    if local.is_dir():
        return local, False
    if Path(path).is_absolute() or dotted:
        raise FileNotFoundError(f"`base.path`: no directory `{local}`.")
    if path.count("/") > 1:
        raise FileNotFoundError(f"`base.path`: no directory `{local}`. {where_paths_start(data)}")
    try:
        found = _snapshot(path, ["*.json", "*.safetensors", "*.txt", "*.model"])
        # Some encoders are there as PyTorch's files only.
        return (found if any(found.glob("*.safetensors")) else _snapshot(path, ["pytorch_model*.bin*"])), True
    except (
        Exception
    ) as error:  # whatever the hub's client raises: offline, unknown name, refused, broken connection
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"`base.path`: `{path}` is no directory below `{data}`, and the hub does not give it: "
            f"{reason.rstrip('.')}. {where_paths_start(data)}"
        ) from error


def _snapshot(name: str, patterns: list[str]) -> Path:
    import huggingface_hub

    return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer in a directory, without asking the hub."""
    if not directory.is_dir():
        raise FileNotFoundError(f"no tokenizer directory `{directory}`.")
    found = fast_tokenizer.read(directory)
    if found is None:
        import transformers

        found = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    return _with_end(found, directory)


def _unpacked(source: Path, directory: Path) -> Any:
    """The tokenizer in a GGUF file. Its own files, which an export carries along, come into `directory`, and
    are read where they are there already: the other way takes seconds.
    """
    there = source.stat()
    described = json.dumps({"file": source.name, "bytes": there.st_size, "changed": there.st_mtime_ns}) + "\n"
    mark = directory / UNPACKED

    def unpack() -> None:
        if not mark.is_file() or mark.read_text("utf-8") != described:
            mark.unlink(missing_ok=True)
            gguf.tokenizer(source).save_pretrained(directory)
            mark.write_text(described, "utf-8")

    on_first(unpack)
    found = fast_tokenizer.read(directory)
    return gguf.tokenizer(source) if found is None else found


def _with_end(tokenizer: Any, source: Path) -> Any:
    """The tokenizer, which has to know its end-of-text token: that separates everything."""
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer in `{source}` names no end-of-text token (`eos_token`).")
    return tokenizer


def model(architecture: Architecture, *, vocabulary: int, end: int, scan: bool = False) -> GPT2:
    """A GPT-2 of that shape; `end` is the token that begins and ends a text."""
    config = GPT2Config(
        vocab_size=vocabulary, **dataclasses.asdict(architecture), bos_token_id=end, eos_token_id=end
    )
    return GPT2(config, scan=scan)


def _random(section: Base, directory: Path, key: jax.Array, mesh: Mesh, policy: Precision) -> Loaded:
    tokenizer = load_tokenizer(directory)
    assert section.architecture is not None  # as `load` has seen
    end = tokenizer.eos_token_id
    fresh = model(section.architecture, vocabulary=len(tokenizer), end=end, scan=section.scan)
    dtype = jnp.dtype(policy.parameters or fresh.param_dtype)

    def draw(key: jax.Array) -> Any:
        # In the model's dtype and then rounded: the same numbers, whatever they are stored in.
        params = fresh.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
        return jax.tree.map(lambda leaf: leaf.astype(dtype), params)

    shapes = jax.eval_shape(draw, key)
    placed = shardings(mesh, partition_specs(shapes, fresh.partition_rules), shapes)
    computing = precision.computing(fresh.clone(param_dtype=dtype), policy)
    return Loaded(computing, jax.jit(draw, out_shardings=placed)(key), tokenizer, directory, "random weights")
