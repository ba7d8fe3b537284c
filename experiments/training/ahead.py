"""The order in which the host works while the devices compute: the input of the next step first, and no wait
for a result before the next computation has been sent.

JAX returns from a call before the devices have computed it, so that this order is all it takes: no thread
reads data, and a run that stops or fails leaves none behind.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar


T = TypeVar("T")


class Ahead(Generic[T]):
    """The inputs of steps, each made before its step asks for it.

    >>> inputs = Ahead(lambda step: f"the input of step {step}")
    >>> inputs.prepare(2)
    >>> inputs.take(2), inputs.take(7)
    ('the input of step 2', 'the input of step 7')

    One is kept, so that memory holds two: this, and that of the step which runs. An error while one is
    prepared is raised by the `take` that needs it; what comes before, such as a checkpoint, is done first.
    """

    def __init__(self, make: Callable[[int], T]):
        self._make = make
        self._prepared: dict[int, Callable[[], T]] = {}

    def prepare(self, step: int) -> None:
        """Makes the input of `step`, and forgets any other."""
        self._prepared = {step: self._made(step)}

    def take(self, step: int) -> T:
        """The input of `step`, made now if it was not prepared. Raises what making it raised."""
        found = self._prepared.pop(step, None) or self._made(step)
        return found()

    def _made(self, step: int) -> Callable[[], T]:
        try:
            value = self._make(step)
        except Exception as error:
            return _raising(error)
        return lambda: value


def _raising(error: Exception) -> Callable[[], T]:
    def again() -> T:
        raise error

    return again


def one_behind(results: Iterable[T]) -> Iterator[T]:
    """`results`, each handed on after the next one has been begun.

    >>> def results():
    ...     for name in "ab":
    ...         print("begin", name)
    ...         yield name
    >>> for name in one_behind(results()):
    ...     print("read", name)
    begin a
    begin b
    read a
    read b
    """
    before: list[T] = []
    for result in results:
        yield from before
        before = [result]
    yield from before
