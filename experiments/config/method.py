"""`method`: how the base is adapted. The section is the method's name and its own arguments."""

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


def method_value(section: dict[str, Any]) -> Any:
    """The `lora_jax` method that `{"name": "LoRA", "rank": 4, ...}` describes.

    >>> method_value({"name": "LoRA", "rank": 4, "alpha": 32}).rank
    4
    """
    name = section.get("name")
    known = methods()
    if name not in known:
        raise ValueError(
            f"`method.name` must be one of {', '.join(known)}, got {name!r}{nearest(name, known) or '.'}"
        )
    return build(known[name], {key: value for key, value in section.items() if key != "name"}, "method")
