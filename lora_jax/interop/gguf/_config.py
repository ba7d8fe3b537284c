"""The settings of a GGUF file as the `config.json` that Hugging Face would have. Every setting of the file's
architecture is used, known to be idle, or refused.
"""

import re
from typing import Any

import numpy as np

from ...models._rope import Rope
from .._families import ELSEWHERE
from ._names import KINDS
from ._reader import GGUFFile


# Settings on which no result depends. The last is of old converters.
_IDLE = {"rope.scaling.finetuned", "tensor_data_layout"}
# Every Llama 3.1 to 3.3 was made with these; the file has the factors that follow from them.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def architecture_of(file: GGUFFile) -> str:
    """llama.cpp's name of the architecture. Raises `ValueError` for one that is not supported."""
    found = file.value("general.architecture")
    if found not in KINDS:
        raise ValueError(
            f"{file.path} has the architecture {found!r} (`general.architecture`), which is not supported; "
            f"supported are {sorted(KINDS)}. {ELSEWHERE}"
        )
    return found


def settings_of(file: GGUFFile) -> dict[str, Any]:
    """What a `config.json` of the same model says.

    Raises:
      ValueError: a setting that is missing, of another type, or not known; an architecture that is not
        supported.
    """
    architecture = architecture_of(file)
    settings = _Settings(file, architecture)
    heads = settings.take("attention.head_count", int)
    width = settings.take("embedding_length", int)
    head = settings.take("attention.key_length", int, width // max(heads, 1))
    settings.expect("attention.value_length", head)
    settings.expect("rope.dimension_count", head)
    settings.expect("attention.causal", True)
    config = {
        "model_type": KINDS[architecture],
        "vocab_size": settings.take("vocab_size", int, file.length("tokenizer.ggml.tokens")),
        "hidden_size": width,
        "intermediate_size": settings.take("feed_forward_length", int),
        "num_hidden_layers": _layers(settings),
        "num_attention_heads": heads,
        "num_key_value_heads": settings.take("attention.head_count_kv", int, heads),
        "head_dim": head,
        "max_position_embeddings": settings.take("context_length", int),
        "rms_norm_eps": settings.take("attention.layer_norm_rms_epsilon", float),
        "rope_theta": (theta := settings.take("rope.freq_base", float, 10_000.0)),
        "rope_scaling": _scaling(settings, head, theta),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **{
            f"{short}_token_id": file.value(f"tokenizer.ggml.{name}_token_id")
            for short, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        },
    }
    if architecture.startswith("gemma"):
        config |= _gemma(settings, config)
    elif window := settings.take("attention.sliding_window", int, 0):
        if architecture != "llama":
            settings.refuse("attention.sliding_window", window)
        config |= {"model_type": "mistral", "sliding_window": window}
    elif architecture != "qwen2":
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if config["model_type"] == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    settings.check_all_taken()
    return config


class _Settings:
    """The settings under an architecture's name, taken one by one."""

    def __init__(self, file: GGUFFile, architecture: str) -> None:
        self.file, self.prefix = file, architecture + "."
        self.left = {key for key in file.fields if key.startswith(self.prefix)}

    def take(self, key: str, kind: type, default: Any = None) -> Any:
        key = self.prefix + key
        self.left.discard(key)
        value = self.file.value(key, default)
        if value is None:
            raise ValueError(f"{self.file.path} has no `{key}`, which every model needs; download it again.")
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, kind):
            raise ValueError(
                f"{self.file.path} has {value!r} for `{key}`, which is not supported; one {kind.__name__} "
                "was expected."
            )
        return value

    def expect(self, key: str, wanted: Any) -> None:
        """Raises `ValueError` unless the setting is missing or has this value."""
        value = self.take(key, type(wanted), wanted)
        if value != wanted:
            self.refuse(key, value, f" It must be {wanted!r}.")

    def refuse(self, key: str, value: Any, fix: str = "") -> None:
        raise ValueError(
            f"{self.file.path} has {value!r} for `{self.prefix}{key}`, which is not supported: it may change "
            f"what the model computes.{fix}"
        )

    def check_all_taken(self) -> None:
        for key in sorted(self.left):
            name, value = key.removeprefix(self.prefix), self.file.value(key)
            if value and name not in _IDLE:
                self.refuse(name, value)


# By the number of layers: the 27B models, which scale attention by the width of a model's heads were it
# cut into them. llama.cpp tells them by that number too; no file says it.
_WIDE = {"gemma2": 46, "gemma3": 62}
_PATTERNS = {"gemma2": 2, "gemma3": 6}


def _gemma(settings: _Settings, config: dict[str, Any]) -> dict[str, Any]:
    """What Gemma 2 and 3 have beside the others. The defaults are llama.cpp's."""
    architecture = settings.prefix[:-1]
    settings.expect("attention.sliding_window_pattern", _PATTERNS[architecture])
    wide = config["num_hidden_layers"] == _WIDE[architecture]
    scalar = config["hidden_size"] // config["num_attention_heads"] if wide else config["head_dim"]
    found = {"query_pre_attn_scalar": scalar}
    if architecture == "gemma2":
        found["sliding_window"] = settings.take("attention.sliding_window", int, 4096)
        found["attn_logit_softcapping"] = settings.take("attn_logit_softcapping", float, 50.0) or None
        found["final_logit_softcapping"] = settings.take("final_logit_softcapping", float, 30.0) or None
    else:
        found["sliding_window"] = settings.take("attention.sliding_window", int)
        found["rope_local_base_freq"] = settings.take("rope.freq_base_swa", float, 10_000.0)
        found["final_logit_softcapping"] = settings.take("final_logit_softcapping", float, 0.0) or None
    return found


def _layers(settings: _Settings) -> int:
    """How many layers the model has. A number that the tensors cannot bear out is damage: a model of so many
    layers is not even described.
    """
    count = settings.take("block_count", int)
    numbers = (re.match(r"blk\.(\d+)\.", name) for name in settings.file.tensors)
    found = max((int(number[1]) + 1 for number in numbers if number), default=0)
    if count > found:
        settings.refuse("block_count", count, f" The file has tensors of {found} layers.")
    return count


def _scaling(settings: _Settings, head: int, theta: float) -> dict[str, Any] | None:
    """Hugging Face's `rope_scaling`. llama.cpp takes a factor without a kind for a linear one."""
    factor = settings.take("rope.scaling.factor", float, settings.take("rope.scale_linear", float, 0.0))
    kind = settings.take("rope.scaling.type", str, "linear" if factor else "none")
    original = settings.take("rope.scaling.original_context_length", int, 0)
    settings.expect("rope.scaling.attn_factor", 1.0)
    if kind == "yarn":
        betas = {
            name: value
            for name in ("beta_fast", "beta_slow")
            if (value := settings.take(f"rope.scaling.yarn_{name}", float, 0.0))
        }
        settings.expect("rope.scaling.yarn_attn_factor", 1.0)
        settings.expect("rope.scaling.yarn_ext_factor", 1.0)
        scaling = {"factor": factor, "original_max_position_embeddings": original or None, **betas}
    elif kind == "linear":
        scaling = {"factor": factor}
    elif kind == "none":
        scaling = {}
    else:
        settings.refuse("rope.scaling.type", kind)
    if "rope_freqs.weight" in settings.file.tensors:
        if scaling:
            settings.refuse("rope.scaling.type", kind, " The file has `rope_freqs.weight` too.")
        return _llama3(settings.file, head, theta)
    return {"rope_type": kind, **scaling} if scaling and factor != 1.0 else None


def _llama3(file: GGUFFile, head: int, theta: float) -> dict[str, Any]:
    """Llama 3.1's scaling, of which the file has what it divides each frequency by."""
    divisors = np.asarray(file.stored()["rope_freqs.weight"].read(), np.float64)
    scaling = {"rope_type": "llama3", "factor": float(f"{divisors.max():.6g}"), **_LLAMA3}
    rope = Rope.from_hf(scaling, theta)
    expected = Rope(theta).frequencies(head, 0, 0) / rope.frequencies(head, 0, 0)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise ValueError(
            f"{file.path} scales its rotary positions by a `rope_freqs.weight` that is not Llama 3.1's, "
            "which is not supported; load the model's Hugging Face directory with `hf.load`."
        )
    return scaling
