"""How reports write things: sizes, tables, and what a run's method is called."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


def megabytes(count: float | None) -> str:
    """A dash for None.

    >>> megabytes(2_500_000), megabytes(800), megabytes(None)
    ('2.50 MB', '0.8 kB', '-')
    """
    if count is None:
        return "-"
    return f"{count / 1e6:,.2f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


def as_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows of one form as Markdown, under their keys.

    >>> print(as_table([{"run": "one", "BLEU": "65.2"}]))
    | run | BLEU |
    |---|---|
    | one | 65.2 |
    """
    lines = [rows[0].keys(), *(row.values() for row in rows)]
    head, *body = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def what_trains(method: str, targets: Sequence[str], baseline: str | None = None, *, remark: str = "") -> str:
    """What trains: a baseline, and a method on its targets. `remark` stands after the method.

    >>> what_trains("LoRA(rank=8)", ["query/kernel"], "PrefixLayer(prefix=8)")
    '`PrefixLayer(prefix=8)`, and `LoRA(rank=8)` on `query/kernel`'
    """
    patterns = ", ".join(f"`{pattern}`" for pattern in targets)
    attached = "" if baseline is None else f"`{baseline}`"
    return ", and ".join(filter(None, [attached, f"`{method}`{remark} on {patterns}" if targets else ""]))


def method(config: Mapping[str, Any]) -> str:
    """What a run's config trains, as tables of papers call it.

    >>> method({"method": {"name": "LoRA", "rank": 8}, "targets": ["query/kernel"], "quantize": "nf4"})
    'QLoRA'
    >>> method({"method": {"name": "Full"}, "targets": [".*/bias"]})
    'BitFit'
    """
    name, targets, baseline = config["method"]["name"], config["targets"], config.get("baseline")
    quantize = config.get("quantize")
    if name == "Full":
        whole = "full fine-tuning" if ".*" in targets else ""
        biases = "BitFit" if targets and all(target.endswith("bias") for target in targets) else ""
        name = whole or biases or ("" if not targets else f"training {', '.join(targets)}")
    elif quantize is not None:
        name = f"Q{name}" if quantize == "nf4" else f"{name} on {quantize}"
    return " and ".join(filter(None, ([] if baseline is None else [baseline["name"]]) + [name]))


def methods(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """The method of each config, with what tells it from those of the same name: a rank, targets, a base.

    >>> lora = {"method": {"name": "LoRA", "rank": 8}, "targets": ["query"], "base": {"name": "a"}}
    >>> methods([lora, {**lora, "method": {"name": "LoRA", "rank": 1}}, lora])
    ['LoRA, rank 8', 'LoRA, rank 1', 'LoRA, rank 8']
    """
    names, described = [method(config) for config in found], [_described(config) for config in found]
    told = []
    for name, own in zip(names, described, strict=True):
        others = [other for its, other in zip(names, described, strict=True) if its == name]
        apart = [key for key, value in own.items() if any(other.get(key) != value for other in others)]
        told.append(", ".join([name, *(f"{key} {own[key]}" for key in apart)]))
    return told


def _described(config: Mapping[str, Any]) -> dict[str, str]:
    """All that makes a row of a study's table, in words."""
    base = {key: value for key, value in config["base"].items() if value and key in _OF_BASE}
    sections = {**(config.get("baseline") or {}), **config["method"], "targets": config["targets"]}
    own = {key: value if isinstance(value, str) else json.dumps(value) for key, value in sections.items()}
    return {**own, "base": " ".join(map(str, base.values()))}


# The keys of `base` that say which weights it has.
_OF_BASE = ("name", "path", "run", "architecture")


def without_common_start(names: Sequence[str]) -> list[str]:
    """The words of each name after those that all begin with.

    >>> without_common_start(["e2e_smollm2_lora_r8", "e2e_smollm2_full"])
    ['lora_r8', 'full']
    """
    parts = [name.split("_") for name in names]
    count = 0
    while min(map(len, parts)) > count + 1 and len(Counter(own[count] for own in parts)) == 1:
        count += 1
    return ["_".join(own[count:]) for own in parts]
