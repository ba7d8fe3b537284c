"""Data sets that `datasets` loads: from a directory, or by their name on the hub."""

from pathlib import Path
from typing import Any


def split_of(source: str, directory: Path, split: str, config: str | None = None) -> Any:
    """One split of a directory below `directory` (as files, or as `save_to_disk` leaves it) or of a hub name,
    whose set `config` names.

    Raises:
      ValueError: the data set has no such split.
    """
    import datasets

    local = directory / source
    if (local / "dataset_dict.json").is_file():
        loaded: Any = datasets.load_from_disk(str(local))
    elif local.exists():
        loaded = datasets.load_dataset(str(local))
    else:
        loaded = datasets.load_dataset(source, config)
    if split not in loaded:
        raise ValueError(f"the data set `{source}` has the splits {', '.join(loaded)}, not `{split}`.")
    return loaded[split]
