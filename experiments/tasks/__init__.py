"""The tasks: each turns files and a tokenizer into `Splits`, and says how it is trained, predicted and
scored.

A new task is one file, which `task.py` describes, and one line here.
"""

from pathlib import Path
from typing import Any, TYPE_CHECKING, TypeAlias, Union

from experiments.tasks import classification, dart, e2e, glue, squad, superglue, text, webnlg
from experiments.tasks.splits import Splits
from experiments.tasks.task import Task


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *(e2e.TASK, text.TASK, webnlg.TASK, dart.TASK, squad.TASK),
        *(*glue.TASKS, *superglue.TASKS, *classification.TASKS),
    )
}

# Any of their sections: the type of a config's `data`.
if TYPE_CHECKING:
    Section: TypeAlias = Any
else:
    Section = Union[tuple(task.section for task in TASKS.values())]


def of(section: Section) -> Task:
    """The task of a config's `data` section."""
    return TASKS[section.task]


def read(section: Section, directory: Path) -> Any:
    """The contents of the files that a config's `data` section names, below `directory`."""
    return of(section).read(section, directory)


def prepare(section: Section, contents: Any, tokenizer: Any) -> Splits:
    """Training, validation and test examples made of what `read` returned."""
    return of(section).prepare(section, contents, tokenizer)
