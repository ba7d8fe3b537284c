"""Adapters and models from one format into another: PEFT's directories, loralib's files, Hugging Face's
models.

An adapter is read beside its base, whose weights are maps of its files, or are unpacked out of a GGUF file.
Left out: an adapter out of a merged model, where none is left.
"""

import dataclasses
import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np

import lora_jax
from experiments.progress import Count
from lora_jax import Adapter
from lora_jax.interop import gguf, hf, loralib, OneSided, peft


WORDS = {
    "peft": "PEFT's format",
    "loralib": "loralib's format",
    "gguf": "llama.cpp's format",
    "hf": "Hugging Face's format",
}
# The formats that are one file, and how its name ends.
SUFFIXES = {"loralib": (".pt", ".bin"), "gguf": (".gguf",)}
# The library's names of the arguments that skip a check, and the command line's.
_HERE = {
    "`verify=False`": "`--no-verify`",
    "`check_base=False`": "`--any-base`",
    "`overwrite=True`": "`--overwrite`",
    "`blocks`=None": "no `--blocks`",
    '`rename="auto"`': "`--rename auto`",
}


@dataclasses.dataclass(frozen=True)
class Job:
    """The arguments of the command line. A file of loralib's does not hold `alpha` and `blocks`."""

    source: Path
    target: Path
    to: str
    base: Path | None = None
    alpha: float | None = None
    blocks: tuple[bool, ...] | None = None
    overwrite: bool = False
    verify: bool = True
    any_base: bool = False
    rename: str = "strict"


def convert(job: Job) -> list[str]:
    """Writes `job.target`; returns a line for the source, the base and the result.

    Raises:
      ValueError: an argument, the source or the base is wrong.
    """
    kind = kind_of(job.source)
    _check(job, kind)
    base = job.source if kind == "hf" else _base(job, kind)
    for read in (job.source.resolve(), base.resolve()):
        if job.target.resolve() in (read, *read.parents):
            raise ValueError(f"`DST` {job.target} is what is read, or holds it: choose another name.")
    try:
        return _model(job) if kind == "hf" else _adapter(job, kind, base)
    except ValueError as error:
        words = str(error)
        for there, here in _HERE.items():
            words = words.replace(there, here)
        raise ValueError(words) from error


def kind_of(source: Path) -> str:
    """The format of `SRC`."""
    if source.is_file() and source.suffix in (".pt", ".bin"):
        return "loralib"
    if (source / "report.md").is_file():
        raise ValueError(
            f"`SRC` {source} is a finished run: pass its adapter, {source / 'adapter'}, or its model, "
            f"{source / 'merged'}."
        )
    for mark, kind in (("adapter_config.json", "peft"), ("config.json", "hf")):
        if (source / mark).is_file():
            return kind
    found = (
        f"it holds {sorted(entry.name for entry in source.iterdir())[:8]}"
        if source.is_dir()
        else "it is another file"
        if source.exists()
        else "nothing is there"
    )
    raise ValueError(
        f"`SRC` {source} must be a directory with adapter_config.json (PEFT) or config.json (a Hugging Face "
        f"model), or a file .pt or .bin (loralib); {found}."
    )


def check_file_name(argument: str, target: Path, form: str) -> None:
    suffixes = SUFFIXES.get(form, ())
    if suffixes and target.suffix not in suffixes:
        raise ValueError(
            f"`{argument}` {target} must be a file {' or '.join(suffixes)}, which is {WORDS[form]}, such as "
            f"{target / f'adapter{suffixes[0]}'}."
        )


def _check(job: Job, kind: str) -> None:
    """Finds faults of the arguments alone, before anything is read."""
    if kind == "hf" and job.to != "hf":
        fix = f"for `--to {job.to}` pass the adapter itself, as in a run's adapter/"
        raise ValueError(f"`SRC` {job.source} is a model, and merged weights hold no adapter any more: {fix}")
    for name, value, kinds in (
        ("base", job.base, ("peft", "loralib")),
        ("alpha", job.alpha, ("loralib",)),
        ("blocks", job.blocks, ("loralib",)),
    ):
        if value is not None and kind not in kinds:
            raise ValueError(
                f"`--{name}` says what {WORDS[kind]} does not leave open, and {job.source} has that: leave "
                "it out."
            )
    if job.rename != "strict" and kind != "peft":
        raise ValueError(
            f"`--rename {job.rename}` is for PEFT's names, and {job.source} has {WORDS[kind]}: leave it out."
        )
    if kind == "loralib" and job.alpha is None:
        raise ValueError(
            f"pass `--alpha`, the `lora_alpha` that {job.source} was trained with: a file of loralib's does "
            "not hold it, and the scale is alpha / rank."
        )
    check_file_name("DST", job.target, job.to)
    if not job.overwrite and (any(job.target.iterdir()) if job.target.is_dir() else job.target.exists()):
        raise ValueError(
            f"`DST` {_taken(job.target)}: choose another name, or replace it with `--overwrite`."
        )


def _taken(target: Path) -> str:
    return f"{target} exists{' and is not empty' if target.is_dir() else ''}"


def _base(job: Job, kind: str) -> Path:
    """The directory of the base: the given one, or the one that PEFT's config names, here or beside the
    adapter.
    """
    wanted = (
        f"`--base`, the Hugging Face directory or the GGUF file of the model that {job.source} was trained on"
    )
    if job.base is not None:
        if not (_packed(job.base) and job.base.is_file() or (job.base / "config.json").is_file()):
            raise ValueError(
                f"{wanted}, is {job.base}, where there is no config.json, and no GGUF file: a model on the "
                "hub must be downloaded first."
            )
        return job.base
    if kind == "loralib":
        raise ValueError(f"pass {wanted}: a file of loralib's does not name it.")
    name = _named_base(job.source)
    for directory in (Path(name), job.source.absolute().parent / name) if name else ():
        if (directory / "config.json").is_file():
            return directory
    raise ValueError(
        f"pass {wanted}: its adapter_config.json names "
        + (f"{name!r}, which is no such directory, here or beside it" if name else "none")
    )


def _named_base(source: Path) -> str | None:
    file = source / "adapter_config.json"
    try:
        name = json.loads(file.read_text("utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is no JSON object: {error}") from error
    return name if isinstance(name, str) else None


def mapped(path: str, array: np.ndarray) -> Any:
    # Not copied: the base may be larger than memory, and is merged matrix by matrix.
    return array


def read_adapter(source: Path, base: Path | None) -> tuple[Any, Any]:
    """The two trees of the adapter in a directory of PEFT's, on `base` or on the directory that its
    config names.
    """
    job = Job(source, source, "peft", base)
    return _read(job, "peft", _base(job, "peft"), "share")[2:]


def _model(job: Job) -> list[str]:
    with Count("converting", 2, sys.stderr) as progress:
        model, params = hf.load(job.source, place=mapped, verify=job.verify)
        progress.update(1)
        hf.save(job.target, model, params, source=job.source, overwrite=job.overwrite)
        progress.update(2)
    return [
        f"read {job.source}, {_size(model, params)}, in {WORDS['hf']}",
        f"wrote {job.target}, in {WORDS['hf']}",
    ]


def _adapter(job: Job, kind: str, base: Path) -> list[str]:
    apart = []
    with Count("converting", 2, sys.stderr) as progress, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        try:
            model, params, frozen, delta = _read(job, kind, base, "share")
        except OneSided:
            model, params, frozen, delta = _read(job, kind, base, "untie")
            apart = [
                "the adapter changes only one of the embedding and the head that share their weight in the "
                "base: apart from now on"
            ]
        progress.update(1)
        written = _write(job, kind, base, model, frozen, delta)
        progress.update(2)
    return [
        f"read {job.source}, {described(delta)}, in {WORDS[kind]}",
        f"base {base}, {_size(model, params)}",
        *apart,
        *dict.fromkeys(str(warning.message) for warning in told if warning.category is UserWarning),
        written,
    ]


def _packed(base: Path) -> bool:
    return base.suffix == ".gguf"


def _read(job: Job, kind: str, base: Path, tie: str) -> tuple[Any, Any, Any, Any]:
    checks = {"verify": job.verify, "check_base": not job.any_base}
    room = peft if kind == "peft" else loralib
    head, how = room.head_of(job.source), {"tie": tie, "place": mapped, "verify": job.verify}
    if _packed(base) and head:
        raise ValueError(
            f"`--base` {base} is a GGUF file, and {job.source} has the head of {head['head']!r}: pass the "
            "Hugging Face directory of the model."
        )
    model, params = gguf.load(base, **how) if _packed(base) else hf.load(base, **head, **how)
    own = {"rename": job.rename} if kind == "peft" else {"alpha": job.alpha, "blocks": job.blocks}
    return model, params, *room.load(job.source, model, params, **own, **checks)


def _write(job: Job, kind: str, base: Path, model: Any, frozen: Any, delta: Any) -> str:
    where = f"wrote {job.target}, in {WORDS[job.to]}"
    if job.to == "hf":
        merged, source = lora_jax.combine(frozen, delta), None if _packed(base) else base
        hf.save(job.target, model, merged, source=source, overwrite=job.overwrite)
        if _packed(base):
            gguf.tokenizer(base).save_pretrained(job.target)
    elif job.to == "peft":
        # The name that was there is more than a path on this computer.
        name = (_named_base(job.source) if kind == "peft" else None) or str(base)
        peft.save(job.target, model, frozen, delta, base=name, overwrite=job.overwrite)
    elif job.to == "gguf":
        gguf.save_adapter(job.target, model, frozen, delta, overwrite=job.overwrite)
    else:
        where += _with_alpha(loralib.save(job.target, model, frozen, delta, overwrite=job.overwrite))
    return where


def _with_alpha(alpha: float) -> str:
    return f"; its lora_alpha is {alpha}, which the file does not hold"


def described(delta: Any) -> str:
    """How many adapters of what kind, and how much trains.

    >>> params = {"kernel": jax.ShapeDtypeStruct((8, 8), "float32")}
    >>> described(lora_jax.lorafy(params, "kernel", method=lora_jax.LoRA(rank=2)).delta)
    'LoRA of rank 2, 1 adapter, 32 parameters'
    """
    leaves, adapters = _leaves(delta), _adapters(delta)
    kinds = sorted({type(leaf.spec.method).__name__ for leaf in adapters})
    ranks = sorted({leaf.spec.method.rank for leaf in adapters})
    whole = len(leaves) - len(adapters)
    parts = (
        [
            f"{' and '.join(kinds)} of rank {' and '.join(map(str, ranks))}",
            f"{len(adapters)} adapter{'s' if len(adapters) > 1 else ''}",
        ]
        if adapters
        else []
    )
    parts += [f"{whole} tensor{'s' if whole > 1 else ''} trained whole"] if whole else []
    return ", ".join([*parts, f"{lora_jax.count(delta):,} parameters"])


def _leaves(delta: Any) -> list[Any]:
    """What trains, a leaf of the base at a time: an adapter, or the leaf itself."""
    return jax.tree.leaves(delta, is_leaf=lambda node: isinstance(node, Adapter))


def _adapters(delta: Any) -> list[Adapter]:
    return [leaf for leaf in _leaves(delta) if isinstance(leaf, Adapter)]


def _size(model: Any, params: Any) -> str:
    return f"a {type(model).__name__} of {lora_jax.count(params):,} parameters"


def export(workdir: Path, target: Path, form: str) -> str:
    """A finished run's result at `target`, where nothing is yet; returns a line about it."""
    if not (workdir / "report.md").is_file():
        raise ValueError(f"`--workdir` {workdir} holds no finished run.")
    check_file_name("--to", target, form)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"`--to` {_taken(target)}: nothing is overwritten.")
    directory = workdir / ("merged" if form == "hf" else "adapter")
    if not directory.is_dir():
        facts = json.loads((workdir / "report.json").read_text("utf-8"))
        older = (
            "it was finished by a version that wrote none; without its report.md, its command goes on from "
            "the last checkpoint and writes it"
        )
        raise ValueError(
            f"`--workdir` {workdir} has no {directory.name}/: "
            f"{facts.get('adapter', {}).get('missing') or older}"
        )
    if form in SUFFIXES:
        return f"wrote {target}{_to_file(workdir, target, form)}"
    shutil.copytree(directory, target, dirs_exist_ok=True)
    return f"wrote {target}"


def _to_file(workdir: Path, target: Path, form: str) -> str:
    """Writes the adapter as one file; returns what else there is to say."""
    model, params = hf.load(workdir / "merged", place=mapped)
    # The merged model stands in for its base, which may lie anywhere: only names and shapes are needed.
    frozen, delta = peft.load(workdir / "adapter", model, params, check_base=False)
    if form == "gguf":
        gguf.save_adapter(target, model, frozen, delta)
        return ""
    if any(type(adapter.spec.method) is not lora_jax.LoRA for adapter in _adapters(delta)):
        frozen, delta = lora_jax.arithmetic.as_lora(frozen, delta)
    # As shapes, so that the file gets no fingerprint of values that are not the base's.
    return _with_alpha(loralib.save(target, model, jax.eval_shape(lambda frozen: frozen, frozen), delta))
