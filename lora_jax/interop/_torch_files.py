"""PyTorch's files (`.bin`, `.pt`), zips of a pickle and of bytes: read and written without PyTorch, and
without running the pickle.

A file that `write` made carries facts and its own SHA-256, so that `facts_of` finds any bit that has changed
since. Left out: files of PyTorch before 1.6, big-endian files, and what `_torch_pickle` leaves out.
"""

import contextlib
import os
import re
import uuid
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ._files import checked_facts, digest, json_of, NO_DIGITS
from ._torch_pickle import (
    check_values,
    Name,
    pickled,
    Refused,
    Storage,
    STORAGE_DTYPES,
    STORAGE_NAMES,
    unpickled,
)


_ZIP = b"PK\x03\x04"
_COMMENT = b"lora_jax sha256 "
_ALIGNMENT = 64  # of the tensors in PyTorch's files, in bytes
_FILE_HEADER = 30  # bytes before a record's name (section 4.3.7 of the zip format)


def read(file: Path) -> Any:
    """The value that `torch.save` wrote: dicts, lists, tuples, numbers and text as they were, and each tensor
    or parameter as a read-only array.

    A device or layout becomes its name, and a `torch.Size` a tuple. Tensors that shared memory still share
    it.

    Raises:
      ValueError: a file that is damaged, or that asks for anything else, which would be code to run.
    """
    with _opened(file) as (archive, root):
        record = f"{root}/byteorder"  # missing in older files
        order = archive.read(record) if record in archive.namelist() else b"little"
        if order != b"little":
            raise Refused(
                f"{file} has the byte order {order[:16]!r} and must have b'little'; save it again on a "
                "little-endian machine."
            )
        storages: dict[str, Storage] = {}

        def storage_of(identity: Any) -> Storage:
            match identity:
                case ("storage", Name(word), str(key), str(), int(count)) if word in STORAGE_DTYPES:
                    if key not in storages:
                        storages[key] = Storage(
                            np.frombuffer(archive.read(f"{root}/data/{key}"), STORAGE_DTYPES[word])
                        )
                    array = storages[key].array
                    if array.dtype == STORAGE_DTYPES[word] and array.size == count:
                        return storages[key]
            raise ValueError("a storage is not described as PyTorch does, or has another size than described")

        contents = unpickled(file, archive.read(f"{root}/data.pkl"), storage_of)
        check_values(contents)
        return contents


def write(
    file: Path, tensors: Mapping[str, np.ndarray], *, facts: dict[str, Any], overwrite: bool = True
) -> None:
    """Writes a state dict, `{name: tensor}`, that `torch.load(file, weights_only=True)` reads. The file
    appears complete or not at all.
    """
    arrays = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    for name, array in arrays.items():
        if array.dtype not in STORAGE_NAMES:
            raise ValueError(
                f"`tensors` has {name!r} with dtype {array.dtype}, which must be one of "
                f"{[str(dtype) for dtype in STORAGE_NAMES]}."
            )
    new = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        with open(new, "xb") as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
            _add(archive, stream, "data.pkl", pickled(arrays))
            _add(archive, stream, "byteorder", b"little")
            for key, array in enumerate(arrays.values()):
                _add(archive, stream, f"data/{key}", array.reshape(-1).view(np.uint8))
            _add(archive, stream, "version", b"3\n")
            _add(archive, stream, "lora_jax.json", json_of(facts).encode())
            archive.comment = _COMMENT + NO_DIGITS.encode()
        digits_at = new.stat().st_size - len(NO_DIGITS)
        digits = digest(new, digits_at=digits_at)
        with open(new, "r+b") as written:
            written.seek(digits_at)
            written.write(digits.encode())
        if overwrite:
            os.replace(new, file)
        else:
            os.link(new, file)  # the system refuses this where a file exists
            new.unlink()
    except FileExistsError as error:
        new.unlink(missing_ok=True)
        raise ValueError(
            f"{file} appeared while it was being written: nothing is replaced. Choose another name."
        ) from error
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def facts_of(file: Path, *, verify: bool = True) -> dict[str, Any] | None:
    """The facts that `write` was given, after a check of every bit of the file; None for a file without a
    checksum of ours.

    `verify=False` accepts a file that was changed on purpose.
    """
    with _opened(file) as (archive, root):
        record = f"{root}/lora_jax.json"
        facts = archive.read(record).decode() if record in archive.namelist() else None
        carried = re.fullmatch(re.escape(_COMMENT) + b"([0-9a-f]{64})", archive.comment)
    digits = carried and carried[1].decode()
    return checked_facts(file, facts, digits, file.stat().st_size - len(NO_DIGITS), verify=verify)


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[tuple[zipfile.ZipFile, str]]:
    """The zip and the name of its one folder. An exception within the block is raised as an error of the
    file.
    """
    if not file.is_file():
        raise Refused(
            f"{file} {'is a directory' if file.is_dir() else 'is not there'}; pass a file of PyTorch's."
        )
    with open(file, "rb") as stream:
        start = stream.read(len(_ZIP))
        if start[:1] == b"\x80":
            raise Refused(
                f"{file} has the format that PyTorch wrote before 1.6; load it with PyTorch where you trust "
                "it, and save it again."
            )
        if start != _ZIP:
            raise Refused(
                f"{file} is not a PyTorch file: it begins with {start!r}, not with {_ZIP!r}; copy or "
                "download it again."
            )
        try:
            with zipfile.ZipFile(stream) as archive:
                yield archive, _root(file, archive)
        except Refused:
            raise
        # A damaged or hostile file makes `zipfile` and `pickletools` raise nearly anything.
        except Exception as error:
            raise ValueError(
                f"{file} is damaged, or no plain PyTorch file ({type(error).__name__}: {error}); copy or "
                "download it again."
            ) from error


def _root(file: Path, archive: zipfile.ZipFile) -> str:
    records = archive.infolist()
    names = {record.filename for record in records}
    if len(names) != len(records):
        raise ValueError("it has two records of one name")
    # A few bytes could fill the memory if records were compressed, or lay over each other.
    if any(
        record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size
        for record in records
    ):
        raise Refused(
            f"{file} is a compressed zip, which PyTorch does not write; save it again with `torch.save`."
        )
    if sum(record.file_size for record in records) > file.stat().st_size:
        raise ValueError("its records are larger than itself")
    roots = [
        name[: -len("/data.pkl")] for name in names if name.count("/") == 1 and name.endswith("/data.pkl")
    ]
    if len(roots) != 1:
        raise Refused(
            f"{file} is a zip with {len(roots)} records `*/data.pkl`, not the one that `torch.save` writes; "
            "save it again with `torch.save`."
        )
    return roots[0]


def _add(archive: zipfile.ZipFile, stream, name: str, data: Any) -> None:
    record = zipfile.ZipInfo(f"archive/{name}")  # dated 1980, so that equal tensors give equal files
    record.create_system, record.external_attr = 3, 0o644 << 16
    room = -(stream.tell() + _FILE_HEADER + len(record.filename) + 4) % _ALIGNMENT
    record.extra = b"FB" + room.to_bytes(2, "little") + b"Z" * room
    archive.writestr(record, data)
