"""What is not installed is one line with the `pip install` that helps, before anything is trained."""

import importlib
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from runs import LORA, refused

from experiments import requirements
from experiments.metrics import meteor


_REPOSITORY = Path(__file__).resolve().parent.parent
_EXTRAS = tomllib.loads((_REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"][
    "optional-dependencies"
]
DATASET = {"data": {**LORA["data"], "dataset": "somewhere"}}
PACKED = {"data": {"task": "text", "train": ["a.txt", "b.txt.zst"], "valid": "c.txt", "seq_len": 8}}


@pytest.mark.parametrize(
    "module, changes",
    [
        *((module, {}) for module in requirements.OF_EVERY_RUN),
        ("gguf", {"base": {"name": "smollm2-135m"}}),
        ("gguf", {"base": {"path": "a.gguf"}}),
        ("datasets", DATASET),
        ("pyarrow", PACKED),
        ("rich", {}),
    ],
)
def test_what_a_run_needs_is_looked_for_before_anything_else(tmp_path, capsys, monkeypatch, module, changes):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**LORA, **changes, "generate": None}))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: module == "rich", raising=False)
    monkeypatch.chdir(_REPOSITORY)
    monkeypatch.setitem(sys.modules, module, None)  # as `import` finds it where it is not installed
    line = refused(capsys, monkeypatch, "run", config, "--workdir", tmp_path / "work")
    assert f"needs {module}, which is not installed: pip install '.[experiments]'" in line
    assert not (tmp_path / "work").exists()


def test_every_package_of_the_extra_is_looked_for():
    """A new dependency is a new word there, or one that only some runs need."""
    packages = {line.partition(">")[0] for extra in ("models", "experiments") for line in _EXTRAS[extra]}
    looked_for = {*requirements.OF_EVERY_RUN, "datasets", "rich"}
    assert {name.replace("-", ".") for name in packages if "lora_jax" not in name} <= looked_for


def test_the_command_that_helps_names_the_clone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert requirements.pip_install("meteor") == f"pip install '{_REPOSITORY}[meteor]'"
    monkeypatch.chdir(_REPOSITORY)
    monkeypatch.setattr(meteor.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(meteor.NoMeteorError, match=r"pip install '\.\[meteor\]'"):
        meteor._jar()


@pytest.mark.parametrize("command", ["report", "plan", "score"])
def test_a_command_outside_of_its_environment_is_one_line(tmp_path, command):
    """Python alone, without any package."""
    words = {
        "report": ["experiments/results/e2e_smollm2/rates/lora_r8_4e-3", "--figure", tmp_path / "losses.png"],
        "plan": ["gpt3-175b"],
        "score": ["e2e", "--refs", "a", "--hyps", "b"],
    }[command]
    found = subprocess.run(
        [sys.executable, "-S", "-m", "experiments", command, *map(str, words)],
        cwd=_REPOSITORY,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    (line,) = found.stderr.splitlines()
    assert found.returncode == 1
    if command == "score":  # needs none of them
        assert "`a`: No such file or directory" in line or "no file" in line, line
    else:
        assert line.startswith("error: ") and line.endswith("pip install '.[experiments]'"), line


def test_a_module_of_ours_that_is_missing_is_a_bug(monkeypatch):
    from experiments.command_line import main

    monkeypatch.setitem(sys.modules, "experiments.reports.table", None)
    with pytest.raises(ModuleNotFoundError):
        main(["report", "nowhere"])


@pytest.mark.parametrize(
    "room, module, extra",
    [
        ("models", "chex", "models"),
        ("models", "flax.linen", "models"),
        ("interop", "safetensors", "models"),
        ("interop", "chex", "models"),
        ("interop.hf", "flax.linen", "models"),
        ("checkpoint", "orbax.checkpoint", "experiments"),
    ],
)
def test_a_room_of_the_library_names_its_extra(monkeypatch, room, module, extra):
    with monkeypatch.context() as patch:
        for name in [
            name
            for name in sys.modules
            if name.split(".")[:2]
            in (["lora_jax", "models"], ["lora_jax", "interop"], ["lora_jax", "checkpoint"])
        ]:
            patch.delitem(sys.modules, name)
        patch.setitem(sys.modules, module, None)
        with pytest.raises(
            ModuleNotFoundError, match=f"needs '{module}', .* pip install .lora_jax.{extra}."
        ) as caught:
            importlib.import_module(f"lora_jax.{room}")
    assert caught.value.name == module and caught.value.__suppress_context__


@pytest.mark.parametrize(
    "through", ["from experiments.command_line import main; main(['report', 'nowhere'])", ""]
)
def test_no_run_says_that_pytorch_was_not_found(through):
    """It is not needed. `transformers` says so by itself, which the second case holds."""
    code = (
        f"import sys; sys.modules['torch'] = None\n{through}\nimport transformers; transformers.AutoTokenizer"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=_REPOSITORY,
        # Other tests have run commands in this process.
        env={name: value for name, value in os.environ.items() if not name.startswith("TRANSFORMERS_")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ("PyTorch was not found" in found.stderr) == (not through), found.stderr
