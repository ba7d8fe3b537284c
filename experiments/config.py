"""What a config file may say: one frozen dataclass a section, and the only place that holds a default.

A config is a row of a table: `source` names the paper, the table and the numbers to expect, or says that
there are none. Paths inside a config are relative to `--data`; `base.run`, and a `base.path` that begins with
a dot, to the config's own file. Left out: anything that describes the machine (device counts aside) or where
results go: those are arguments of the command line.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from experiments.strict_json import build, nearest


METHODS = ("LoRA", "DoRA", "VeRA", "LoRAFA", "DyLoRA", "DeltaLoRA", "AdaLoRA", "PiSSA", "Full")


def _at_least(least: int, section: str, values: Any, *names: str) -> None:
    """Raises `ValueError` for a number that is smaller, or not finite; null is left to mean what it means."""
    for name in names:
        value = getattr(values, name)
        if value is not None and not (math.isfinite(value) and value >= least):
            raise ValueError(f"`{section}.{name}` must be at least {least}, got {value}")


@dataclass(frozen=True)
class Source:
    """Whose numbers these are: `paper=None` says that no paper has this row."""

    paper: str | None
    table: str | None = None
    row: str | None = None
    expected: dict[str, float] = field(default_factory=dict)
    time: str | None = None
    device: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class Architecture:
    """A GPT-2 to start from random weights; the vocabulary's size is the tokenizer's."""

    n_embd: int
    n_layer: int
    n_head: int
    n_positions: int


@dataclass(frozen=True)
class Base:
    """Where the weights come from: exactly one of `path`, `run` and `architecture`.

    `path`: a Hugging Face directory, beside this config's file if it begins with a dot, or the name of one on
    the hub. `run`: another config, whose merged result is the base; it is run first when it is not finished,
    in `workdir` (relative to this run's own). `architecture`: random weights, drawn from the seed, with the
    `tokenizer` directory's vocabulary, or that of a byte-level BPE of `vocabulary` tokens trained on the
    training text.
    """

    path: str | None = None
    run: str | None = None
    workdir: str = "base"
    architecture: Architecture | None = None
    tokenizer: str | None = None
    vocabulary: int | None = None

    def __post_init__(self):
        given = [name for name in ("path", "run", "architecture") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                "`base` takes exactly one of `path`, `run` and `architecture`, got "
                f"{', '.join(given) or 'none of them'}"
            )
        if ((self.tokenizer is None) == (self.vocabulary is None)) != (self.architecture is None):
            raise ValueError(
                "one of `base.tokenizer` and `base.vocabulary` goes with `base.architecture`: every other "
                "base brings its own tokenizer"
            )


@dataclass(frozen=True)
class E2EData:
    """Meanings and their wordings. `dataset`: a directory or hub name for `datasets`, whose splits `train`,
    `valid`, `test` then name; without it they are files. `truncate`: cut what is longer than `seq_len` as the
    authors do, instead of refusing it."""

    task: Literal["e2e"]
    train: str
    valid: str
    test: str | None = None
    dataset: str | None = None
    seq_len: int = 512
    truncate: bool = False
    max_rows: int | None = None
    max_valid_rows: int | None = None

    def __post_init__(self):
        _at_least(1, "data", self, "seq_len", "max_rows", "max_valid_rows")


@dataclass(frozen=True)
class TextData:
    """Plain text, packed into blocks of `seq_len` tokens. `train`: one file or several; `max_bytes`
    limits what is read of each.
    """

    task: Literal["text"]
    train: str | tuple[str, ...]
    valid: str
    seq_len: int
    max_bytes: int | None = None
    max_valid_bytes: int | None = None

    def __post_init__(self):
        _at_least(1, "data", self, "seq_len", "max_bytes", "max_valid_bytes")


@dataclass(frozen=True)
class Generate:
    """The project's own data set in E2E's form, made in the work directory; `data` then names files of it.

    `meanings` to train on and `held_out` ones for validation and for test, each in `references` wordings."""

    seed: int
    meanings: int
    held_out: int
    references: int


@dataclass(frozen=True)
class Budget:
    """AdaLoRA's: the average rank at the end, when ranks begin to be given up and how long before the end
    that is over, at every how many steps; and the weight of `lora_jax.methods.orthogonality` in the loss."""

    target_rank: int
    initial_steps: int = 0
    final_steps: int = 0
    every: int = 1
    orthogonality: float = 0.5

    def __post_init__(self):
        _at_least(1, "optimizer.adalora", self, "target_rank", "every")
        _at_least(0, "optimizer.adalora", self, "initial_steps", "final_steps", "orthogonality")


@dataclass(frozen=True)
class Optimizer:
    """The update rule. `adamw_authors` is that of LoRA's authors, `adamw` is optax's; `OPTIMIZERS` in
    `training/optimizer.py` lists the names.

    `loraplus`: B's rate is so many times A's. `lorafa`: the corrected gradient of LoRA-FA. `adalora`: the
    budget that the method AdaLoRA needs.
    """

    name: Literal["adamw", "adamw_authors"] = "adamw"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = None
    loraplus: float | None = None
    lorafa: bool = False
    adalora: Budget | None = None

    def __post_init__(self):
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"`optimizer.{name}` must be at least 0 and below 1, got {getattr(self, name)}"
                )
        _at_least(0, "optimizer", self, "eps", "weight_decay", "clip")
        if self.loraplus is not None and not (math.isfinite(self.loraplus) and self.loraplus > 0):
            raise ValueError(f"`optimizer.loraplus` must be positive, got {self.loraplus}")


@dataclass(frozen=True)
class Train:
    """`batch` examples make one step, in `accumulate` parts; intervals are in steps; `eval_batches` limits
    each evaluation.

    `not_finite`: a step whose loss or gradient is not finite changes nothing; "stop" then ends the run,
    "skip" goes on, and either keeps the batch in the work directory. `result`: what is exported: "last", what
    the last step left; "best", what had the lowest validation loss; "mean", the mean of the
    `keep_checkpoints` newest checkpoints.
    """

    steps: int
    batch: int
    lr: float
    warmup: int = 0
    accumulate: int = 1
    label_smoothing: float = 0.0
    log_every: int = 10
    eval_every: int = 500
    eval_batches: int | None = None
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    not_finite: Literal["stop", "skip"] = "stop"
    result: Literal["last", "best", "mean"] = "last"

    def __post_init__(self):
        _at_least(
            1,
            "train",
            self,
            "steps",
            "batch",
            "accumulate",
            "log_every",
            "eval_every",
            "eval_batches",
            "checkpoint_every",
            "keep_checkpoints",
        )
        _at_least(0, "train", self, "lr")
        if self.batch % self.accumulate:
            raise ValueError(
                f"`train.batch` ({self.batch}) must be a multiple of `train.accumulate` ({self.accumulate})"
            )
        if not 0 <= self.warmup <= self.steps:
            raise ValueError(
                f"`train.warmup` must be between 0 and `train.steps` ({self.steps}), got {self.warmup}"
            )
        if self.result == "mean" and -(-self.steps // self.checkpoint_every) < self.keep_checkpoints:
            raise ValueError(
                f'`train.result` "mean" is of `train.keep_checkpoints` ({self.keep_checkpoints}), '
                f"and {self.steps} steps with `train.checkpoint_every` "
                f"{self.checkpoint_every} make fewer: save more often, or keep fewer"
            )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"`train.label_smoothing` must be at least 0 and less than 1, got {self.label_smoothing}"
            )


@dataclass(frozen=True)
class Mesh:
    """Devices along each axis: the batch is split over data and fsdp, frozen weights over fsdp and tensor."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        _at_least(1, "mesh", self, "data", "fsdp", "tensor")


@dataclass(frozen=True)
class Precision:
    """Which dtype each part of a run has; null leaves it as it is without this section.

    `parameters`: what the frozen base is stored in, and the merged model with it (null: as in its file;
    float32 where it is drawn). Merging itself is float32, rounded once. `compute`: activations and products
    (null: the parameters' own); attention's softmax, the statistics of layer norm and the logits stay
    float32.

    `adapters`: what trains, that is A, B, and weights and biases with the method Full, which in float32
    beside a bfloat16 base are master weights; the optimiser's moments follow (null: the method's, float32 for
    A and B, and a trained weight's own). Some arrays of a method are float32 always (DoRA's magnitude). In
    bfloat16, of 8 significant bits, an update of less than 1/512 of a number is lost: it learns until updates
    are small, then stands still.

    `reduce`: what gradients are added in over the parts of a batch, the loss and its log-sum-exp are taken
    in, and the gradients of A and B come out of their products in, so that XLA adds those of several devices
    in it. In "bfloat16", they come out in `compute`'s. Not governed by it: gradients of Full's weights and
    biases before they are added over parts; the model's own products have made and summed them over devices,
    in `compute`. Numbers of tokens are always float32.
    """

    parameters: Literal["bfloat16", "float32"] | None = None
    compute: Literal["bfloat16", "float32"] | None = None
    adapters: Literal["bfloat16", "float32"] | None = None
    reduce: Literal["bfloat16", "float32"] = "float32"


@dataclass(frozen=True)
class Sample:
    """Each token drawn from softmax(logits / temperature): of the `top_k` likeliest, then of the fewest
    that hold `top_p` of what is left.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(
                f"`decode.sample.temperature` must be positive, got {self.temperature}; for the likeliest "
                "token leave `decode.sample` out"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"`decode.sample.top_k` must be at least 1 or null, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(
                f"`decode.sample.top_p` must be more than 0 and at most 1, or null, got {self.top_p}"
            )


@dataclass(frozen=True)
class Decode:
    """How the test inputs, the first `prompts` of them or all, are continued; the report shows the first
    `shown`.

    Beam search of width `beams`, or greedy decoding (1), or drawing (`sample`). Beams are compared by their
    summed log-probability over length ** `length_penalty`, and `no_repeat_ngram` forbids a second occurrence
    of that many generated tokens in a row. A text ends at the tokenizer's end of text or at one of `end`:
    ids, or texts that the tokenizer encodes as one token. `before`: the base, as it was, answers all of the
    inputs too and is scored beside the result.
    """

    max_tokens: int = 64
    batch: int = 32
    beams: int = 1
    length_penalty: float = 0.0
    no_repeat_ngram: int | None = None
    end: tuple[str | int, ...] = ()
    sample: Sample | None = None
    prompts: int | None = None
    shown: int = 10
    before: bool = False

    def __post_init__(self):
        _at_least(1, "decode", self, "max_tokens", "batch", "beams", "no_repeat_ngram", "prompts")
        _at_least(0, "decode", self, "shown")
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"`decode.length_penalty` must be finite, got {self.length_penalty}")
        if self.sample is not None and self.beams > 1:
            raise ValueError(
                f"`decode.sample` draws one text, and `decode.beams` is {self.beams}: leave one of them out"
            )


@dataclass(frozen=True)
class Config:
    """`quantize`: how the weights of the frozen layers are stored (QLoRA); embeddings, heads and vectors stay
    as they are. `compare_full`: measure a few steps of full fine-tuning too, whose memory the device then
    needs, for the report."""

    name: str
    source: Source
    base: Base
    data: E2EData | TextData
    method: dict[str, Any]
    targets: tuple[str, ...]
    train: Train
    optimizer: Optimizer = Optimizer()
    mesh: Mesh = Mesh()
    precision: Precision = Precision()
    decode: Decode = Decode()
    generate: Generate | None = None
    compare_full: bool = False
    quantize: Literal["nf4", "int8"] | None = None
    seed: int = 0

    def __post_init__(self):
        parts = self.mesh.data * self.mesh.fsdp * self.train.accumulate
        if self.train.batch % parts:
            raise ValueError(
                f"`train.batch` ({self.train.batch}) must be a multiple of mesh.data * mesh.fsdp * "
                f"train.accumulate ({parts})"
            )
        if self.base.vocabulary is not None and not isinstance(self.data, TextData):
            raise ValueError(
                '`base.vocabulary` trains a tokenizer on plain text, which `data.task` "text" has; '
                "pass `base.tokenizer` instead"
            )
        method = method_value(self.method)
        for name, section in (("AdaLoRA", self.optimizer.adalora), ("LoRAFA", self.optimizer.lorafa or None)):
            if section is not None and type(method).__name__ != name:
                raise ValueError(
                    f"`optimizer.{name.lower()}` is for the method {name}, and `method.name` is "
                    f"{self.method['name']}: leave one of them out"
                )
        if type(method).__name__ == "AdaLoRA" and self.optimizer.adalora is None:
            raise ValueError(
                "`method.name` is AdaLoRA, which needs a budget: "
                'set `optimizer.adalora`, for example {"target_rank": 4}'
            )
        if self.precision.adapters is not None and getattr(method, "dtype", None) is not None:
            raise ValueError(
                f"`precision.adapters` is {self.precision.adapters} and `method.dtype` is {method.dtype}, "
                "of the same arrays: leave one of them out"
            )
        if getattr(method, "delayed", False):
            raise ValueError(
                "`method.delayed` waits for `start_delta`, which a run does not call: leave it out, and the "
                "base follows from the first step"
            )


def method_value(section: dict[str, Any]) -> Any:
    """The `lora_jax` method that `{"name": "LoRA", "rank": 4, ...}` describes.

    >>> method_value({"name": "LoRA", "rank": 4, "alpha": 32}).rank
    4
    """
    import lora_jax

    name = section.get("name")
    if name not in METHODS:
        raise ValueError(
            f"`method.name` must be one of {', '.join(METHODS)}, got {name!r}{nearest(name, METHODS)}"
        )
    return build(
        getattr(lora_jax, name), {key: value for key, value in section.items() if key != "name"}, "method"
    )


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config in the JSON file `path`, after `overrides` of the form `train.lr=1e-4`.

    Raises `ValueError` or `TypeError` naming the key, the value and what was expected.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no config file `{path}`")
    try:
        tree = json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"`{path}` is not valid JSON: {error}") from error
    for item in overrides:
        tree = _override(tree, item)
    return build(Config, tree)


def _override(tree: Any, item: str) -> Any:
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise ValueError(f"`--set` takes key=value, such as train.lr=1e-4; got {item!r}")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text  # so that --set base.path=gpt2-medium needs no quotes inside quotes

    def put(node: Any, names: list[str]) -> Any:
        if not names:
            return value
        if node is not None and not isinstance(node, dict):
            raise ValueError(f"`--set {item}`: `{key}` goes below a value that has no keys")
        return {**(node or {}), names[0]: put((node or {}).get(names[0]), names[1:])}

    return put(tree, key.split("."))


def to_json(config: Config) -> dict[str, Any]:
    """Everything the config says, defaults included, as JSON: what a work directory keeps and a resume
    compares.
    """
    return json.loads(json.dumps(dataclasses.asdict(config)))


def but_defaults(section: Any) -> Any:
    """What the config says beyond the defaults, as JSON: the same in a later version, whose new keys mean
    by default what was done before.
    """
    if not dataclasses.is_dataclass(section):
        return json.loads(json.dumps(section))
    made = lambda field: (
        field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    )
    values = ((field, getattr(section, field.name)) for field in dataclasses.fields(section))
    return {field.name: but_defaults(value) for field, value in values if value != made(field)}


def with_defaults(tree: dict[str, Any]) -> dict[str, Any]:
    """`to_json` of an older version's, with the keys that have come since; as it is where it is no config
    any more.
    """
    try:
        return to_json(build(Config, tree))
    except (ValueError, TypeError):
        return tree


def difference(old: Any, new: Any, key: str = "") -> str | None:
    """The first key on which two resolved configs differ, with both values; None when they agree."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(name for name in new if name not in old)]:
            found = difference(old.get(name), new.get(name), f"{key}.{name}" if key else name)
            if found:
                return found
        return None
    return None if old == new else f"`{key}` was {json.dumps(old)} and is now {json.dumps(new)}"
