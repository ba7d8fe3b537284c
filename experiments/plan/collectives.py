"""What devices send each other in a compiled step, read from its text: which operations, how many, of how
many bytes.

Those in the body of a loop count as often as the loop runs, where the compiler wrote that down. Bytes are
those of the whole array that a device ends up with (of a reduce-scatter, that it starts from), so that any
network's formula can be applied to them. Left out: which links carry them, and what overlaps with
computation.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass


KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][a-z0-9\-]*)\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]*)\})")


@dataclass(frozen=True)
class Collectives:
    """Numbers a device and a step by kind. `once`: loops of unknown length, whose contents are counted
    once.
    """

    count: dict[str, int]
    bytes: dict[str, int]
    once: int

    @classmethod
    def of(cls, text: str) -> "Collectives":
        """Those of a compiled module, as `compiled.as_text()` writes it."""
        computations, entry = _computations(text)
        count: Counter[str] = Counter()
        size: Counter[str] = Counter()
        once = 0

        def walk(name: str, times: int) -> None:
            nonlocal once
            for kind, result, line in computations[name]:
                if kind in KINDS:
                    count[kind] += times
                    size[kind] += times * _bytes(kind, result, line)
                trips = _TRIPS.search(line) if kind == "while" else None
                once += kind == "while" and trips is None
                for callee in _called(line):
                    if callee in computations:
                        walk(callee, times * (int(trips[1]) if trips else 1))

        walk(entry, 1)
        return cls(dict(count), dict(size), once)


def _computations(text: str) -> tuple[dict[str, list[tuple[str, str, str]]], str]:
    """The instructions of each computation that matter here, as (kind, type of the result, line); and the
    name of the first one to run.
    """
    found: dict[str, list] = defaultdict(list)
    entry = name = ""
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            name = header[2]
            entry = name if header[1] else entry
            found[name] = []
        elif instruction := _INSTRUCTION.match(line):
            kind = instruction[2].removesuffix("-start")
            if kind in KINDS or next(_called(line), None):
                found[name].append((kind, instruction[1], line))
    return found, entry


def _called(line: str) -> Iterator[str]:
    yield from _CALLED.findall(line)
    for names in _BRANCHES.findall(line):
        yield from (name.strip().lstrip("%") for name in names.split(","))


def _bytes(kind: str, result: str, line: str) -> int:
    sizes = []
    for name, bits, dimensions in _ARRAY.findall(result):
        elements = 1
        for dimension in filter(None, dimensions.split(",")):
            elements *= int(dimension)
        sizes.append(elements * (8 if name == "pred" else int(bits)) // 8)
    # A start returns its operand beside its result; of a plain operation on several arrays, each is sent.
    total = max(sizes, default=0) if f" {kind}-start(" in line else sum(sizes)
    return total * _group(line) if kind == "reduce-scatter" else total


def _group(line: str) -> int:
    found = _GROUPS.search(line)
    return 1 if found is None else int(found[1]) if found[1] else len(found[2].split(","))
