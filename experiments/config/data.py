"""`generate`: data that a run makes itself. What `data` may say is each task's own, in
`experiments/tasks/`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Generate:
    """The project's own data set in E2E's form, made in the work directory; `data` then names files of it.

    `meanings` to train on and `held_out` ones for validation and for test, each in `references` wordings."""

    seed: int
    meanings: int
    held_out: int
    references: int
