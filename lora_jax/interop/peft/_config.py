"""`adapter_config.json`: the keys that we read, and those that we refuse rather than guess.

A key that we know and do not support must have the value that switches it off. A key that we do not know must
look switched off (null, false, empty), because a newer PEFT may mean anything by it.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..._paths import nearest


KINDS = ("LORA", "ADALORA", "VERA")
TASKS = ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM", None)

# Keys that say where an adapter came from, how it began or how it was trained. They do not change its result.
_SILENT = set(
    "auto_mapping base_model_name_or_path revision inference_mode peft_version fan_in_fan_out megatron_core "
    "runtime_config eva_config "
    """
        qalora_group_size init_weights beta1 beta2 deltaT orth_reg_weight target_r tfinal tinit total_step
    """.split()
)
# Keys of what is not supported, which null, false or an empty value switch off, as they do in PEFT.
_OFF = set(
    """
        alora_invocation_tokens arrow_config corda_config ensure_weight_tying kasa_config layer_replication
        loftq_config lora_bias lora_ga_config megatron_config monteclora_config target_parameters
        use_bdlora use_qalora velora_config
    """.split()
)
# Of these, an empty object switches the thing on, with PEFT's defaults.
_ON_IF_EMPTY = {"arrow_config", "kasa_config", "monteclora_config", "use_bdlora", "velora_config"}
# Starts that leave the base as it is, so that the tensors are all that is needed.
_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica", "pissa")
_OWN = {
    "LORA": set(
        """
            r lora_alpha lora_dropout use_rslora use_dora init_lora_weights rank_pattern alpha_pattern
            trainable_token_indices
        """.split()
    ),
    "ADALORA": set(
        """
            r init_r lora_alpha lora_dropout use_rslora use_dora init_lora_weights rank_pattern
            alpha_pattern
        """.split()
    ),
    "VERA": set("r vera_dropout d_initial projection_prng_key save_projection".split()),
}
_COMMON = set(
    """
        peft_type task_type target_modules exclude_modules layers_to_transform layers_pattern
        modules_to_save bias
    """.split()
)


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The keys that are used here. `parse` checks the others and drops them."""

    peft_type: str = "LORA"
    task_type: str | None = None
    target_modules: tuple[str, ...] | str | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    bias: str = "none"  # or "all", or "only" those of the targets
    r: int = 8
    lora_alpha: float = 8
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # for AdaLoRA, masks
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    d_initial: float = 0.1
    projection_prng_key: int = 0
    save_projection: bool = True
    base: str | None = None
    # The rows of an embedding that train, and the end of its name, or None for the word embedding.
    tokens: tuple[str | None, tuple[int, ...]] | None = None


def parse(file: Path, content: Mapping[str, Any]) -> AdapterConfig:
    """The config in `file`, whose JSON is `content`. Raises `ValueError` with the name of a field that is
    wrong or not supported.
    """
    kind = content.get("peft_type")
    if kind not in KINDS:
        raise ValueError(
            f"`peft_type` is {kind!r} in {file}, which is not supported; supported are {', '.join(KINDS)}."
        )
    _check_keys(file, kind, content)
    read = _Reader(file, content)
    ada = kind == "ADALORA"
    if ada:
        read.off("use_rslora", False)
        read.off("use_dora", False)
        read.off("alpha_pattern", None, {})
    task = read.one_of("task_type", None, *TASKS)
    return AdapterConfig(
        peft_type=kind,
        task_type=task,
        target_modules=read.names("target_modules", regex=True),
        exclude_modules=read.names("exclude_modules", regex=True) or None,
        layers_to_transform=read.layers("layers_to_transform"),
        layers_pattern=_as_tuple(read.names("layers_pattern", regex=True)),
        # PEFT adds these two by itself for such tasks.
        modules_to_save=_as_tuple(read.names("modules_to_save"))
        + (("classifier", "score") if task in ("SEQ_CLS", "TOKEN_CLS") else ()),
        bias=read.bias("vera_only" if kind == "VERA" else "lora_only"),
        r=read.rank("init_r" if ada else "r", {"LORA": 8, "ADALORA": 12, "VERA": 256}[kind]),
        lora_alpha=read.number("lora_alpha", 8),
        dropout=read.rate("vera_dropout" if kind == "VERA" else "lora_dropout"),
        use_rslora=read.flag("use_rslora", False),
        use_dora=read.flag("use_dora", False),
        init_lora_weights=read.start("init_lora_weights"),
        rank_pattern=read.masks("rank_pattern") if ada else read.numbers("rank_pattern", whole=True),
        alpha_pattern={} if ada else read.numbers("alpha_pattern", whole=False),
        d_initial=read.number("d_initial", 0.1),
        projection_prng_key=read.seed("projection_prng_key"),
        save_projection=read.flag("save_projection", True),
        base=read.text("base_model_name_or_path"),
        tokens=read.tokens("trainable_token_indices") if kind == "LORA" else None,
    )


def _is_off(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _as_tuple(names: tuple[str, ...] | str | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names or ()


def _check_keys(file: Path, kind: str, content: Mapping[str, Any]) -> None:
    known = _COMMON | _SILENT | _OFF | _OWN[kind]
    for name, value in content.items():
        if name in _OFF and (not _is_off(value) or (name in _ON_IF_EMPTY and value == {})):
            raise ValueError(
                f"`{name}` is {value!r} in {file}, which is not supported, because what it changes cannot be "
                "represented here; train or convert the adapter without it."
            )
        if name not in known and not _is_off(value):
            close = nearest(name, sorted(known), 1)
            raise ValueError(
                f"`{name}` is {value!r} in {file}, which is not a key of {kind} in PEFT 0.21, and what it "
                f"changes is unknown (is it {close[0]!r}?); remove it if it changes nothing of what the "
                "adapter computes."
            )


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads the values of one file, each of the type that it must have."""

    file: Path
    content: Mapping[str, Any]

    def wrong(self, name: str, wanted: str) -> ValueError:
        return ValueError(f"`{name}` is {self.content.get(name)!r} in {self.file}; it must be {wanted}.")

    def off(self, name: str, *values: Any) -> None:
        if self.content.get(name, values[0]) not in values:
            raise self.wrong(name, f"{values[0]!r} for {self.content['peft_type']}")

    def one_of(self, name: str, default: Any, *values: Any) -> Any:
        value = self.content.get(name, default)
        if value not in values:
            raise self.wrong(name, f"one of {list(values)}")
        return value

    def bias(self, only: str) -> str:
        value = self.one_of("bias", "none", "none", "all", only)
        return "only" if value == only else value

    def names(self, name: str, *, regex: bool = False) -> tuple[str, ...] | str | None:
        value = self.content.get(name)
        if value is None or (regex and isinstance(value, str)):
            self.expressions(name, [value or ""])
            return value
        if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
            raise self.wrong(name, "a list of module names" + (" or a regular expression" if regex else ""))
        # PEFT reads these as regular expressions even in a list.
        self.expressions(name, value if name in ("modules_to_save", "layers_pattern") else [])
        return tuple(sorted(set(value)))

    def expressions(self, name: str, values: Iterable[str]) -> None:
        for value in values:
            try:
                re.compile(value)
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(
                    f"`{name}` is {self.content[name]!r} in {self.file}, which is not a regular expression "
                    f"({error})."
                ) from error

    def layers(self, name: str) -> tuple[int, ...] | None:
        value = self.content.get(name)
        if value is None or value == []:
            return None
        value = [value] if _is_int(value) else value
        if not isinstance(value, list) or not all(map(_is_int, value)):
            raise self.wrong(name, "a layer's number or a list of them")
        return tuple(value)

    def tokens(self, name: str) -> tuple[str | None, tuple[int, ...]] | None:
        value = self.content.get(name)
        if _is_off(value):
            return None
        module, rows = next(iter(value.items())) if isinstance(value, dict) else (None, value)
        single = not isinstance(value, dict) or len(value) == 1
        if (
            not single
            or not isinstance(rows, list)
            or not rows
            or not all(_is_int(row) and row >= 0 for row in rows)
            or len(set(rows)) < len(rows)
        ):
            raise self.wrong(name, "a list of different tokens, or an object with one such list")
        return module, tuple(rows)

    def rank(self, name: str, default: int) -> int:
        value = self.content.get(name, default)
        if not _is_int(value) or value < 1:
            raise self.wrong(name, "a positive integer")
        return value

    def seed(self, name: str) -> int:
        value = self.content.get(name, 0)
        if not _is_int(value) or not 0 <= value < 2**32:
            raise self.wrong(name, "an integer from 0 to 2**32 - 1")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.content.get(name, default)
        if not _is_number(value):
            raise self.wrong(name, "a finite number")
        return value

    def rate(self, name: str) -> float:
        value = self.number(name, 0.0)
        if not 0 <= value < 1:
            raise self.wrong(name, "at least 0 and below 1")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.content.get(name, default)
        if not isinstance(value, bool | None):
            raise self.wrong(name, "true or false")
        return bool(value)

    def text(self, name: str) -> str | None:
        value = self.content.get(name)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, "a text")
        return value

    def start(self, name: str) -> bool | str:
        value = self.content.get(name, True)
        value = False if value is None else value
        value = value.lower() if isinstance(value, str) else value
        if not isinstance(value, bool | str) or value not in _STARTS:
            raise ValueError(
                f"`{name}` is {value!r} in {self.file}, which is not supported: PEFT changes the base by a "
                "start that cannot be computed again here. Convert the adapter to a plain LoRA first, with "
                "the `path_initial_model_for_weight_conversion` of PEFT's `save_pretrained`."
            )
        return value

    def numbers(self, name: str, *, whole: bool) -> dict[str, Any]:
        value = self.content.get(name) or {}
        fits = (lambda item: _is_int(item) and item > 0) if whole else _is_number
        if not isinstance(value, dict) or not all(map(fits, value.values())):
            raise self.wrong(
                name, f"a mapping from module names to {'positive integers' if whole else 'finite numbers'}"
            )
        self.expressions(name, value)
        return value

    def masks(self, name: str) -> dict[str, list[bool]]:
        value = self.content.get(name) or {}
        if not isinstance(value, dict) or not all(
            isinstance(mask, list) and all(isinstance(kept, bool) for kept in mask) for mask in value.values()
        ):
            raise self.wrong(name, "a mapping from names to lists of true and false, as AdaLoRA writes it")
        return value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) < 1e308
        and math.isfinite(value)
    )
