"""How many arrays of some sizes a compiled program holds at once, read off its text.

The text of an executable is in the order in which its instructions run (`is_scheduled=true`). An array lives
from the instruction that makes it to the last that reads it, also by another name: a part of a tuple, the
same bytes in another shape. The inside of a fusion makes no arrays. Left out: that two lives may share a
buffer, and what a library's product packs for itself.
"""

import math
import re
from collections.abc import Collection, Iterator
from typing import NamedTuple


class _Instruction(NamedTuple):
    name: str
    operation: str
    result: str
    names: list[str]  # of everything on the line, operands and computations
    root: bool


_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_FLOATS = re.compile(r"^(?:f16|bf16|f32|f64)\[([\d,]*)\]")
_RENAMES = ("bitcast", "get-tuple-element", "tuple", "while", "optimization-barrier")
_GIVEN = ("parameter", "constant")
_RUNS = ("while", "call", "conditional", "async-start")


def most_at_once(text: str, sizes: Collection[int]) -> int:
    """The most arrays of floats that live together and have one of `sizes` numbers each. What the program
    is given does not count.
    """
    computations: dict[str, list[_Instruction]] = {}
    entry = here = ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            here = head[2]
            computations[here] = []
            entry = here if head[1] else entry
        elif here and (found := _LINE.match(line)):
            root, name, result, operation, rest = found.groups()
            names = re.findall(r"%([\w.\-]+)", re.sub(r"metadata=\{[^}]*\}", "", rest))
            computations[here].append(_Instruction(name, operation, result, names, bool(root)))
    return _most(entry, computations, frozenset(sizes))


def _most(name: str, computations: dict[str, list[_Instruction]], sizes: frozenset[int]) -> int:
    instructions = computations[name]
    born: dict[str, int] = {}
    last: dict[str, int] = {}
    known_as: dict[str, set[str]] = {}  # the arrays that a name stands for
    for index, instruction in enumerate(instructions):
        read = set().union(*(known_as.get(operand, ()) for operand in instruction.names))
        last |= dict.fromkeys(read, index)
        if instruction.operation in _RENAMES:
            known_as[instruction.name] = read
        elif instruction.operation not in _GIVEN and _size(instruction.result) in sizes:
            known_as[instruction.name] = {instruction.name}
            born[instruction.name] = last[instruction.name] = index
        if instruction.root:
            last |= dict.fromkeys(known_as.get(instruction.name, ()), len(instructions))
    most = 0
    for index, instruction in enumerate(instructions):
        alive = sum(start <= index <= last[array] for array, start in born.items())
        inside = (_most(run, computations, sizes) for run in _computations(instruction, computations))
        most = max(most, alive + max(inside, default=0))
    return most


def _size(result: str) -> int | None:
    found = _FLOATS.match(result)
    return math.prod(int(size) for size in found[1].split(",") if size) if found else None


def _computations(instruction: _Instruction, computations: dict) -> Iterator[str]:
    if instruction.operation in _RUNS:
        yield from (name for name in instruction.names if name in computations)
