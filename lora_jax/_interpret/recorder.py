"""What is on record of one evaluation: each use of a weight, and the user's line behind it."""

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

from .._lowrank.factored import Factored
from .._tree.method import Spec
from .equation import source


class Use(NamedTuple):
    """One operation that consumed a weight, as `explain` and the reading of axes see it.

    `how` is `low-rank`, `lookup` or `formed`. `summed`, `free` and `batch` are axes of the stored weight. The
    FLOPs are those of the operation on the plain weight, in low-rank form, and with the weight formed first.
    Joined weights have a `Use` each, of which the first counts the FLOPs of all.
    """

    path: str
    operation: str
    how: str
    summed: tuple[int, ...]
    free: tuple[int, ...]
    batch: tuple[int, ...]
    flops: tuple[int, int, int]
    source: str


class Recorder:
    """Knows where in the calls the evaluation is, and keeps the uses if it is to `watch`."""

    def __init__(self, watch: bool = False):
        self.watches = watch
        # Of each weight, the stored axes of each use: what it was summed over, or where rows were picked.
        self.sides: dict[str, set[tuple[str, frozenset[int]]]] = {}
        self._uses: dict[tuple, Use] = {}
        self._calls: tuple[int, ...] = ()
        self._callers: tuple[Any, ...] = ()
        self._times = 1

    @property
    def uses(self) -> list[Use]:
        return list(self._uses.values())

    def record(
        self,
        eqn: Any,
        number: int,
        value: Factored,
        how: str,
        summed: Sequence[int],
        free: Sequence[int],
        batch: Sequence[int] = (),
        flops: tuple[int, int, int] = (0, 0, 0),
    ) -> None:
        for path in value.leaf.paths:
            self.sides.setdefault(path, set()).add((how, frozenset(summed)))
        if not self.watches or value.is_plain:
            return
        flops = (self._times * flops[0], self._times * flops[1], self._times * flops[2])
        operation, line = eqn.primitive.name, self.line(eqn)
        for path in value.leaf.paths:
            use = Use(path, operation, how, tuple(summed), tuple(free), tuple(batch), flops, line)
            self._uses[(*self._calls, number, path)] = use  # a body that JAX traces twice is one use
            flops = (0, 0, 0)

    def record_returned(self, value: Factored, flops: int) -> None:
        """A weight that `fn` returns has to be formed."""
        if not self.watches:
            return
        free = tuple(stored for axis in value.axes for stored in axis.origin)
        for path in value.leaf.paths:
            use = Use(path, "return", "formed", (), free, (), (0, flops, flops), "the result of `fn`")
            self._uses[("returned", path)] = use

    def line(self, eqn: Any) -> str:
        """The user's line behind an equation: in a library's jitted function, that of the call."""
        lines = map(source, (eqn, *reversed(self._callers)))
        return next((line for line in lines if line), "an unknown line")

    @contextlib.contextmanager
    def inside(self, number: int, eqn: Any = None) -> Iterator[None]:
        """While an inner jaxpr is evaluated. Its uses belong to this equation, or to this branch of one."""
        calls, callers = self._calls, self._callers
        self._calls, self._callers = (*calls, number), callers if eqn is None else (*callers, eqn)
        try:
            yield
        finally:
            self._calls, self._callers = calls, callers

    @contextlib.contextmanager
    def repeated(self, times: int) -> Iterator[None]:
        """While the body of a loop of so many steps is evaluated."""
        self._times *= times
        try:
            yield
        finally:
            self._times //= times


def sides_exchanged(spec: Spec, sides: Collection[tuple[str, frozenset[int]]]) -> bool:
    """Whether every contraction of a weight sums over its out axes and keeps its in axes, and no row is
    picked from its in axes, as from a table.
    """
    ins, outs = set(spec.axis_indices("in")), set(spec.axis_indices("out"))
    contracted = [axes for how, axes in sides if how == "low-rank"]
    table = any(axes & ins for how, axes in sides if how == "lookup")
    return bool(contracted) and not table and all(axes & outs and not axes & ins for axes in contracted)
