"""`method`: how the base is adapted, and `baseline`: what is attached to it. Each section is the name of a
value of the library and its own arguments.
"""

import dataclasses
from typing import Any

from experiments.strict_json import build, nearest


def methods() -> dict[str, Any]:
    """The methods of `lora_jax` by name.

    >>> sorted(methods())[:3]
    ['AdaLoRA', 'DeltaLoRA', 'DoRA']
    """
    # Imported here, because `plan` reads a config before JAX may start.
    import lora_jax

    return {name: value for name, value in vars(lora_jax.methods).items() if isinstance(value, type)}


def baselines() -> dict[str, Any]:
    """The baselines of `lora_jax` by name.

    >>> list(baselines())
    ['Houlsby', 'Lin', 'Pfeiffer', 'PrefixEmbedding', 'PrefixLayer']
    """
    from lora_jax import baselines as room

    names = ("Houlsby", "Lin", "Pfeiffer", "PrefixEmbedding", "PrefixLayer")
    return {name: getattr(room, name) for name in names}


def keys() -> list[str]:
    """Every argument of a method.

    >>> "alpha" in keys()
    True
    """
    return _fields(methods())


def baseline_keys() -> list[str]:
    """Every argument of a baseline.

    >>> "bottleneck" in baseline_keys()
    True
    """
    return _fields(baselines())


def method_value(section: dict[str, Any]) -> Any:
    """The `lora_jax` method that `{"name": "LoRA", "rank": 4, ...}` describes.

    >>> method_value({"name": "LoRA", "rank": 4, "alpha": 32}).rank
    4
    """
    return _value(section, methods(), "method")


def baseline_value(section: dict[str, Any]) -> Any:
    """The baseline that `{"name": "Houlsby", "bottleneck": 64}` describes.

    >>> baseline_value({"name": "Houlsby", "bottleneck": 64}).bottleneck
    64
    """
    return _value(section, baselines(), "baseline")


def _fields(kinds: dict[str, Any]) -> list[str]:
    return sorted({field.name for kind in kinds.values() for field in dataclasses.fields(kind)})


def _value(section: dict[str, Any], known: dict[str, Any], key: str) -> Any:
    name = section.get("name")
    if name not in known:
        raise ValueError(
            f"`{key}.name` must be one of {', '.join(known)}, got {name!r}{nearest(name, known) or '.'}"
        )
    return build(known[name], {field: value for field, value in section.items() if field != "name"}, key)
