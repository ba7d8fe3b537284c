"""The tasks: each turns files and a tokenizer into `Splits`; a new task is one file, one dataclass in
`config`, one line here.

In two steps, since the tokenizer may come from a base that has to be trained first: `read` needs only the
files, so that what is wrong with them is known before anything is trained, and `prepare` needs the tokenizer.
"""

from pathlib import Path
from typing import Any

from experiments.config import E2EData, TextData
from experiments.tasks import e2e, text
from experiments.tasks.examples import Splits


TASKS = {E2EData: e2e, TextData: text}


def read(section: E2EData | TextData, directory: Path) -> Any:
    """The contents of the files that a config's `data` section names, below `directory`."""
    return TASKS[type(section)].read(section, directory)


def prepare(section: E2EData | TextData, contents: Any, tokenizer: Any) -> Splits:
    """Training, validation and test examples made of what `read` returned."""
    return TASKS[type(section)].prepare(section, contents, tokenizer)
