"""A whole config: its sections, and what they require of each other."""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from experiments import tasks
from experiments.config.base import Base
from experiments.config.computing import Mesh, Precision
from experiments.config.decode import Decode
from experiments.config.method import baseline_keys, baseline_value, keys as method_keys, method_value
from experiments.config.training import Optimizer, Train
from experiments.tasks.generate import Generate


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
class Config:
    """`quantize`: how the weights of the frozen layers are stored (QLoRA); embeddings, heads and vectors stay
    as they are. `compare_full`: measure a few steps of full fine-tuning too, whose memory the device then
    needs, for the report. `baseline`: an adapter or a prefix (`lora_jax.baselines`) that is attached to the
    base and trains, beside what `targets` names, which may then be nothing."""

    name: str
    source: Source
    base: Base
    data: tasks.Section
    method: dict[str, Any] = field(metadata={"keys": method_keys})
    targets: tuple[str, ...]
    train: Train
    optimizer: Optimizer = Optimizer()
    mesh: Mesh = Mesh()
    precision: Precision = Precision()
    decode: Decode = Decode()
    generate: Generate | None = None
    compare_full: bool = False
    baseline: dict[str, Any] | None = field(default=None, metadata={"keys": baseline_keys})
    quantize: Literal["nf4", "int8"] | None = None
    seed: int = 0

    def __post_init__(self):
        # Imported here, because `plan` reads a config before JAX may start.
        from lora_jax import AdaLoRA, LoRAFA

        parts = self.mesh.data * self.mesh.fsdp * self.train.accumulate
        if self.train.batch % parts:
            raise ValueError(
                f"`train.batch` ({self.train.batch}) must be a multiple of mesh.data * mesh.fsdp * "
                f"train.accumulate ({parts})."
            )
        self._check_pack(parts)
        self._check_baseline()
        self._check_labels()
        if self.base.vocabulary is not None and not tasks.of(self.data).documents:
            plain = " or ".join(json.dumps(name) for name, task in tasks.TASKS.items() if task.documents)
            raise ValueError(
                f"`base.vocabulary` trains a tokenizer on plain text, which `data.task` {plain} has; "
                "pass `base.tokenizer` instead."
            )
        method = method_value(self.method)
        for kind, section in ((AdaLoRA, self.optimizer.adalora), (LoRAFA, self.optimizer.lorafa or None)):
            if section is not None and not isinstance(method, kind):
                name = kind.__name__
                raise ValueError(
                    f"`optimizer.{name.lower()}` is for the method {name}, and `method.name` is "
                    f"{self.method['name']}: leave one of them out."
                )
        if isinstance(method, AdaLoRA) and self.optimizer.adalora is None:
            raise ValueError(
                "`method.name` is AdaLoRA, which needs a budget: "
                'set `optimizer.adalora`, for example {"target_rank": 4}.'
            )
        if self.precision.adapters is not None and getattr(method, "dtype", None) is not None:
            raise ValueError(
                f"`precision.adapters` is {self.precision.adapters} and `method.dtype` is {method.dtype}, "
                "of the same arrays: leave one of them out."
            )
        if getattr(method, "delayed", False):
            raise ValueError(
                "`method.delayed` waits for `start_delta`, which a run does not call: leave it out, and the "
                "base follows from the first step."
            )

    def _check_baseline(self) -> None:
        value = None if self.baseline is None else baseline_value(self.baseline)
        if value is None and not self.targets:
            raise ValueError(
                "`targets` is empty, so that nothing would train: name what the method adapts, or set "
                "`baseline`."
            )
        if hasattr(value, "insert") and not tasks.of(self.data).packs:
            raise ValueError(
                f"`baseline.name` is {type(value).__name__}, whose tokens stand around a prompt, and "
                f'`data.task` is "{self.data.task}", which has none: take an adapter, or another task.'
            )

    def _check_labels(self) -> None:
        task, train = tasks.of(self.data), self.train
        rates = {"dropout": train.dropout, "head_dropout": train.head_dropout}
        dropped = next((name for name, rate in rates.items() if rate is not None), None)
        if dropped is not None and task.labels is None:
            raise ValueError(
                f"`train.{dropped}` is {rates[dropped]}, of tasks of labels, and `data.task` is "
                f'"{self.data.task}": leave it out; `method.dropout` is of the adapters.'
            )
        if train.buckets is not None and task.documents:
            raise ValueError(
                f'`train.buckets` is {train.buckets}, and `data.task` is "{self.data.task}", whose blocks '
                "are equally long: leave it out."
            )

    def _check_pack(self, parts: int) -> None:
        rows = self.train.pack
        if rows is None:
            return
        task = tasks.of(self.data)
        if not task.packs:
            why = "blocks are full already" if task.labels is None else "inputs have a row each"
            raise ValueError(
                f'`train.pack` is {rows}, and `data.task` is "{self.data.task}", whose {why}: '
                "leave `train.pack` out."
            )
        if rows % parts:
            raise ValueError(
                f"`train.pack` ({rows}) must be a multiple of mesh.data * mesh.fsdp * train.accumulate "
                f"({parts}), as each device has rows of its own in each part."
            )
