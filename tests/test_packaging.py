"""What a stranger meets first: the wheel, the two commands, and that README and docs/ tell the truth about
both.
"""

import ast
import email
import os
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from hatchling import build


_REPOSITORY = Path(__file__).resolve().parent.parent
_PROJECT = tomllib.loads((_REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
_EXTRAS = _PROJECT["optional-dependencies"]
# README and the pages under docs/, whose Python and links are in test_readme.py.
_PAGES = [_REPOSITORY / "README.md", *sorted((_REPOSITORY / "docs").rglob("*.md"))]
_DOCS = "\n".join(page.read_text(encoding="utf-8") for page in _PAGES)


def _distribution(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement).group()


# -- the wheel -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    directory = tmp_path_factory.mktemp("wheel")
    before = Path.cwd()
    os.chdir(_REPOSITORY)  # a build backend works in the project's directory: PEP 517
    try:
        name = build.build_wheel(str(directory))
    finally:
        os.chdir(before)
    with zipfile.ZipFile(directory / name) as file:
        yield file


@pytest.fixture(scope="module")
def metadata(wheel) -> email.message.Message:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(wheel.read(name))


def test_core_needs_only_jax_and_optax(metadata):
    core = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert {_distribution(line) for line in core} == {"jax", "optax"}


def test_metadata(metadata):
    assert metadata["Name"] == "lora_jax"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra")) == {
        "models",
        "gguf",
        "experiments",
        "meteor",
        "cuda",
        "docs",
        "torch",
        "test",
        "test-newest",
        "lint",
    }


def test_wheel_holds_the_library_and_nothing_else(wheel):
    names = wheel.namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"lora_jax"}
    assert "lora_jax/__init__.py" in names
    assert "lora_jax/py.typed" in names  # without it a type checker takes all of lora_jax for Any
    assert any(name.endswith("/LICENSE") for name in names)


def test_tests_install_everything_but_torch():
    """PyTorch is chosen by the Makefile; PEFT would bring the default build of it along."""

    def closure(extra):
        for requirement in _EXTRAS[extra]:
            if own := re.fullmatch(r"lora_jax\[([\w,-]+)\]", requirement):
                for part in own.group(1).split(","):
                    yield from closure(part)
            else:
                yield _distribution(requirement)

    assert {"flax", "orbax-checkpoint", "transformers", "datasets", "pytest"} <= set(closure("test"))
    assert not {"torch", "peft", "accelerate"} & set(closure("test"))


# -- the commands --------------------------------------------------------------------------------------------


def _make(*words: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    return subprocess.run(
        ["make", *words], cwd=_REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    "target",
    ["help", "demo", "test", "test-fast", "notebooks", "test-newest", "lint", "format", "docs", "clean"],
)
def test_make_has_the_target_and_lists_it(target):
    assert _make("--dry-run", target).returncode == 0
    assert re.search(rf"^  make {target} +\S", _make("help").stdout, re.MULTILINE)


def test_make_refuses_a_python_that_is_too_old(tmp_path):
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    result = _make("demo", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}")
    assert result.returncode != 0
    assert f"lora_jax needs Python 3.11 or newer: {old} is older" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_make_without_torch_does_not_name_it():
    steps = _make("--dry-run", "test", "VENV=absent", "TORCH=").stdout
    assert "'.[test]'" in steps and "torch==" not in steps
    assert "'.[test,torch]' 'torch==2.13.0'" in _make("--dry-run", "test", "VENV=absent").stdout


def test_make_demo_runs_a_config_that_exists():
    (config,) = re.findall(r"--config (\S+)", _make("--dry-run", "demo").stdout)
    assert (_REPOSITORY / config).is_file()


def test_ci_is_executable():
    assert os.access(_REPOSITORY / ".ci" / "run", os.X_OK)


# -- README and docs/ ----------------------------------------------------------------------------------------


def _blocks(*languages: str) -> list[str]:
    fences = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", _DOCS, re.MULTILINE | re.DOTALL)
    return [body for language, body in fences if language in languages]


def _commands() -> list[list[str]]:
    """The shell commands as words: those of fenced blocks, and what stands in backticks within a line."""
    lines = [
        line.removeprefix("$ ")
        for block in _blocks("bash", "console", "sh", "shell")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    prose = re.sub(r"^```.*?^```", "", _DOCS, flags=re.MULTILINE | re.DOTALL)
    lines += re.findall(r"`((?:make|pip|python) [^`]+)`", prose)
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_docs_name_make_targets_that_exist():
    targets = {
        word
        for words in _commands()
        if words[0] == "make"
        for word in words[1:]
        if "=" not in word and word[0] != "-"
    }
    assert {"demo", "test"} <= targets
    for target in targets:
        assert _make("--dry-run", target).returncode == 0, target


def test_docs_name_extras_that_exist():
    installs = [word for words in _commands() if "pip" in words for word in words]
    extras = {
        extra
        for word in installs
        for group in re.findall(r"\[([\w,-]+)\]$", word)
        for extra in group.split(",")
    }
    assert extras <= set(_EXTRAS) | {"cuda12"}  # the last is JAX's own


def test_docs_name_commands_that_exist():
    """And that each takes the options it is given."""
    options: dict[str, set[str]] = {}
    for words in _commands():
        if words[1:3] == ["-m", "experiments"] and len(words) > 3:
            given = {word.partition("=")[0] for word in words[4:] if word.startswith("--")}
            options.setdefault(words[3], set()).update(given)
    assert {"run", "plan"} <= options.keys()
    for command, given in sorted(options.items()):
        words = [sys.executable, "-m", "experiments", command, "--help"]
        result = subprocess.run(words, cwd=_REPOSITORY, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{shlex.join(words[1:])}: {result.stderr}"
        missing = given - set(re.findall(r"--[a-z][a-z-]*", result.stdout))
        assert not missing, f"{command} does not take {missing}"


def test_docs_name_files_that_exist():
    words = [word for words in _commands() for word in words]
    words += re.findall(r"`([^`\s]+)`", _DOCS)
    rooms = ("benchmarks/", "docs/", "experiments/", "lora_jax/", "notebooks/", "tests/", ".ci/")
    named = [word for word in words if word.startswith(rooms) and not re.search(r"[*{}<>…]", word)]
    for name in named:
        assert (_REPOSITORY / name).exists(), name


def test_docs_python_parses():
    for block in _blocks("python", "py"):
        ast.parse(block)
