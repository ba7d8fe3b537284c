"""METEOR 1.5 (Denkowski & Lavie, 2014) of a corpus, on Penn Treebank tokens: run, not rewritten.

Its stemmer, WordNet synonyms and paraphrase table are 68 MB of somebody else's data and its program is java,
so this only talks to the authors' own `meteor-1.5.jar`, with the arguments of the caption evaluation of MS
COCO: `-l en -norm`. The jar comes with the package `pycocoevalcap` (the extra `meteor`), of which nothing
else is used.
"""

import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from experiments.metrics.ngrams import Tokens


class NoMeteorError(OSError):
    """METEOR cannot be computed here; the message says why and what to install."""


def score(references: Sequence[Sequence[Tokens]], hypotheses: Sequence[Tokens]) -> float:
    """The score of the corpus, which is not the mean of its sentences'. Raises `NoMeteorError`."""
    command = [
        _java(),
        "-Xmx2G",
        "-Dfile.encoding=UTF-8",
        "-jar",
        str(_jar()),
        "-",
        "-",
        "-stdio",
        "-l",
        "en",
        "-norm",
    ]
    # A file and not a pipe: nobody reads it while the program runs, and a full pipe would stop it.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        try:
            with subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8"
            ) as program:
                return _converse(program, references, hypotheses)
        except (OSError, EOFError, ValueError) as error:
            errors.seek(0)
            said = errors.read().split("\n")[0] or str(error)
            raise NoMeteorError(f"java stopped before METEOR had its result ({said}).") from error


def _converse(
    program: "subprocess.Popen[str]", references: Sequence[Sequence[Tokens]], hypotheses: Sequence[Tokens]
) -> float:
    """One line of statistics for each input, then all of them for the score: of every input, and last of
    the corpus.
    """
    assert program.stdin and program.stdout
    statistics = []
    for group, hypothesis in zip(references, hypotheses, strict=True):
        texts = [*group, hypothesis]
        _say(program.stdin, ["SCORE", *(" ".join(tokens) for tokens in texts)])
        statistics.append(_hear(program.stdout))
    _say(program.stdin, ["EVAL", *statistics])
    return [float(_hear(program.stdout)) for _ in range(len(statistics) + 1)][-1]


def _say(stream: IO[str], parts: Sequence[str]) -> None:
    stream.write(" ||| ".join(parts) + "\n")
    stream.flush()


def _hear(stream: IO[str]) -> str:
    line = stream.readline()
    if not line:
        raise EOFError("no answer")
    return line.strip()


def _java() -> str:
    found = shutil.which("java")
    if not found:
        raise NoMeteorError(
            "it needs java, and there is no `java` on the path: install a Java runtime (8 or newer)."
        )
    return found


def _jar() -> Path:
    # Found without importing: the package's own modules start java when they are used, and need more
    # packages.
    spec = importlib.util.find_spec("pycocoevalcap")
    for directory in (spec.submodule_search_locations or []) if spec else []:
        jar = Path(directory) / "meteor" / "meteor-1.5.jar"
        if jar.is_file():
            return jar
    raise NoMeteorError(
        "it needs meteor-1.5.jar of the package pycocoevalcap: pip install 'lora_jax[meteor]'."
    )
