"""Who may import what: the core needs only JAX (and Optax in `optim`), and one folder knows jaxprs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest


_REPOSITORY = Path(__file__).resolve().parent.parent
_PACKAGE = _REPOSITORY / "lora_jax"
_FILES = sorted(_PACKAGE.rglob("*.py"))

# -- at run time ---------------------------------------------------------------------------------------------

# What the tests' environment has and a core installation has not.
_NOT_IN_CORE = (
    "chex",
    "datasets",
    "equinox",
    "flax",
    "gguf",
    "jaxtyping",
    "orbax",
    "peft",
    "safetensors",
    "torch",
    "transformers",
)


def _loads(statement: str, cwd: Path = _REPOSITORY) -> set[str]:
    """Those of `_NOT_IN_CORE` that a fresh interpreter has loaded after the statement."""
    code = f"{statement}\nimport sys\nprint('loaded', *sorted(set({_NOT_IN_CORE!r}) & set(sys.modules)))"
    # Not `-m` or a file: with `-c` the first entry of the path is the working directory.
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.splitlines()[-1].split()[1:])


def test_core_loads_only_jax_and_optax():
    assert _loads("import lora_jax, lora_jax.optim, lora_jax.methods") == set()


def test_the_check_above_can_fail(tmp_path):
    (tmp_path / "heavy.py").write_text(
        "import importlib\nimportlib.import_module('safetensors')\nimport chex\n"
    )
    assert {"chex", "safetensors"} <= _loads("import heavy", tmp_path)


# `transformers` takes more than a second to import, and PyTorch, which it imports where it is installed,
# three.
_SLOW = {"torch", "transformers"}


@pytest.mark.parametrize(
    "statement",
    [
        "from experiments.command_line import main\nassert main(['report', "
        "'experiments/results/demo/full']) == 0",
        "import experiments.convert, experiments.fetch, experiments.metrics.files, experiments.running.run\n"
        "import experiments.plan.figures, experiments.plan.report, experiments.running.compiled",
    ],
    ids=["report", "the others"],
)
def test_no_command_loads_what_is_slow_before_it_needs_it(statement):
    """A run does where it meets a tokenizer that only `transformers` knows (`test_fast_tokenizer`)."""
    assert not _SLOW & _loads(statement)


def test_the_help_loads_nothing():
    statement = (
        "from experiments.command_line import main\ntry: main(['run', '--help'])\nexcept SystemExit: pass"
    )
    assert _loads(f"{statement}\nassert 'jax' not in __import__('sys').modules") == set()


# -- in the source -------------------------------------------------------------------------------------------

# Rooms, the most particular first: a file or directory of lora_jax, and what it may import beside the
# standard library, JAX, NumPy (which JAX's own arguments and results are made of) and lora_jax. A new room is
# a new line.
_ROOMS = {
    "optim": {"optax"},
    "checkpoint": {"optax", "orbax"},
    "models": {"flax", "chex"},
    "baselines": {"flax"},
    "interop/gguf": {"flax", "gguf", "transformers"},
    "interop": {"flax", "safetensors"},
    "": set(),
}
_EVERYWHERE = {"__future__", "jax", "lora_jax", "numpy"} | set(sys.stdlib_module_names)
# Promise nothing from one version of JAX to the next, so that one folder holds every contact with them.
_JAXPR_MODULES = ("jax.extend", "jax.interpreters", "jax.core.jaxpr")
_JAXPR_FIELDS = {"constvars", "eqns", "invars", "outvars", "primitive"}
_JAXPR_FOLDER = "_interpret/"


def _imports(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, full dotted name) of everything imported, at whatever depth; relative imports are lora_jax's
    own.
    """
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(["lora_jax"] * bool(node.level) + ([node.module] if node.module else []))
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
    return found


def _is_within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def _faults(path: str, source: str) -> list[str]:
    """What the file at `path` (relative to lora_jax/) does that its room does not allow."""
    tree = ast.parse(source)
    room = next(room for room in _ROOMS if not room or path == room or path.startswith(room + "/"))
    knows_jaxprs = path.startswith(_JAXPR_FOLDER)
    faults = []
    for line, name in _imports(tree):
        if name.partition(".")[0] not in _EVERYWHERE | _ROOMS[room]:
            faults.append(f"{path}:{line} imports {name}")
        if _is_within(name, "jax._src"):
            faults.append(f"{path}:{line} imports JAX's private {name}")
        if not knows_jaxprs and any(_is_within(name, module) for module in _JAXPR_MODULES):
            faults.append(f"{path}:{line} imports {name}, which only {_JAXPR_FOLDER} may")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            if _is_within(dotted, "jax._src"):
                faults.append(f"{path}:{node.lineno} uses JAX's private {dotted}")
            elif not knows_jaxprs and (node.attr in _JAXPR_FIELDS or dotted in _JAXPR_MODULES):
                faults.append(f"{path}:{node.lineno} uses {dotted}, which only {_JAXPR_FOLDER} may")
    return faults


def test_there_are_files_to_check():
    assert {"__init__.py", "_merge.py", "interpreter.py"} <= {file.name for file in _FILES}


@pytest.mark.parametrize("file", _FILES, ids=lambda file: file.relative_to(_PACKAGE).as_posix())
def test_file_keeps_to_its_room(file):
    assert _faults(file.relative_to(_PACKAGE).as_posix(), file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "path, source, fault",
    [
        ("_merge.py", "import flax", "imports flax"),
        ("_merge.py", "def f():\n    from torch import nn", "imports torch.nn"),
        ("_merge.py", "import optax", "imports optax"),
        ("optimal.py", "import optax", "imports optax"),
        ("models/gpt2.py", "import safetensors", "imports safetensors"),
        ("interop/hf.py", "import transformers", "imports transformers"),
        ("interop/_names.py", "def f():\n    import gguf", "imports gguf"),
        ("optim/_masks.py", "import experiments.config", "imports experiments.config"),
        ("_interpret/calls.py", "from jax._src import core", "private jax._src.core"),
        ("_interpret/calls.py", "import jax\njax._src.core.trace_ctx", "private jax._src"),
        ("_adapt.py", "import jax.extend as jex", "imports jax.extend, which only _interpret/ may"),
        ("_adapt.py", "from jax.extend.core import Jaxpr", "which only _interpret/ may"),
        ("_adapt.py", "import jax\njax.extend.core.Jaxpr", "uses jax.extend, which only _interpret/ may"),
        ("_adapt.py", "def f(jaxpr): return jaxpr.eqns", "uses jaxpr.eqns, which only _interpret/ may"),
    ],
)
def test_the_static_check_can_fail(path, source, fault):
    assert any(fault in found for found in _faults(path, source))


@pytest.mark.parametrize(
    "path, source",
    [
        (
            "_merge.py",
            "import jax.numpy as jnp, numpy as np\nfrom . import _factored\nfrom ._paths import name",
        ),
        ("optim/_masks.py", "import optax"),
        ("models/gpt2.py", "from flax import linen as nn\nimport chex"),
        ("interop/hf.py", "from ..models import gpt2\nfrom safetensors.numpy import load_file"),
        (
            "_interpret/calls.py",
            "import jax.extend\ndef f(jaxpr): return [eqn.primitive for eqn in jaxpr.eqns]",
        ),
    ],
)
def test_the_static_check_can_pass(path, source):
    assert _faults(path, source) == []


# -- arrows -------------------------------------------------------------------------------------------------

# Each part of lora_jax, a folder or a file, and the parts that it imports. A part imports earlier ones only,
# so that there is no circle. A new part is a new line.
_LIBRARY = {
    "_extras": set(),
    "_mesh": set(),
    "_kept": set(),
    "_own_derivative": set(),
    "_paths": set(),
    "_table": set(),
    "processes": set(),
    "models": {"_extras", "_kept", "_own_derivative"},
    "_packed": {"_mesh"},
    "_lowrank": {"_kept", "_mesh", "_packed"},
    "_tree": {"_lowrank", "_packed", "_paths"},
    "methods": {"_lowrank", "_mesh", "_packed", "_paths", "_tree"},
    "_interpret": {"_lowrank", "_own_derivative", "_packed", "_paths", "_tree"},
    "_adapt": {"_interpret", "_tree"},
    "_explain": {"_interpret", "_packed", "_paths", "_table", "_tree"},
    "_axes": {"_interpret", "_lowrank", "_paths"},
    "_lorafy": {"_axes", "_packed", "_paths", "_tree", "methods"},
    "_merge": {"_lowrank", "_packed", "_paths", "_table", "_tree"},
    "_stack": {"_paths", "_tree"},
    "_summary": {"_paths", "_table", "_tree", "methods"},
    "quant": {"_axes", "_packed", "_paths", "_tree"},
    "sharding": {"_mesh", "_packed", "_paths", "_tree"},
    "optim": {"_lowrank", "_paths", "_tree", "methods"},
    "baselines": {"_extras", "_lowrank", "_paths", "methods", "models"},
    "drop": {"_adapt", "_lorafy", "_lowrank", "_paths", "_tree", "methods"},
    "arithmetic": {"_lorafy", "_lowrank", "_merge", "_paths", "_tree", "methods"},
    "subspaces": {"_lowrank", "_merge", "_packed", "_paths", "_table", "_tree", "arithmetic", "methods"},
    "checkpoint": {"_extras", "_paths", "processes"},
    "interop": {
        *("_extras", "_lorafy", "_lowrank", "_merge", "_packed", "_paths", "_tree"),
        *("arithmetic", "methods", "models", "processes", "quant", "sharding"),
    },
    "__init__": {
        *("_adapt", "_explain", "_interpret", "_lorafy", "_merge", "_stack", "_summary", "_tree"),
        *("arithmetic", "drop", "methods", "optim", "processes", "quant", "sharding", "subspaces"),
    },
}
# The same of experiments.
_EXPERIMENTS = {
    "strict_json": set(),
    "progress": set(),
    "requirements": set(),
    "checks": set(),
    "metrics": {"requirements"},
    "tasks": {"checks", "metrics"},
    "catalogue": {"strict_json"},
    "fetch": {"catalogue"},
    "config": {"catalogue", "checks", "strict_json", "tasks"},
    "decoding": {"config", "tasks"},
    "training": {"config", "progress", "tasks"},
    "plan": {"config", "strict_json", "training"},
    "reports": {"config", "progress", "tasks", "training"},
    "convert": {"progress"},
    "subspaces": {"convert", "reports"},
    "running": {
        *("catalogue", "config", "decoding", "metrics", "progress", "reports", "tasks", "training"),
    },
    "sweeps": {
        *("catalogue", "config", "progress", "reports", "running", "strict_json", "tasks", "training"),
    },
    "commands": {
        *("catalogue", "config", "convert", "fetch", "metrics", "plan", "reports", "requirements", "running"),
        *("strict_json", "subspaces", "sweeps", "tasks"),
    },
    "command_line": {"commands", "requirements"},
    "__main__": {"command_line"},
    "__init__": set(),
}
_PROGRAMS = sorted(
    file for folder in ("experiments", "benchmarks") for file in (_REPOSITORY / folder).rglob("*.py")
)


def _absolute(file: Path, tree: ast.AST) -> list[str]:
    """Full names of what a file imports; relative ones from its own folder."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = file.relative_to(_REPOSITORY).parts[: -node.level] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            found += [f"{module}.{alias.name}" for alias in node.names]
    return found


def _private(file: Path, source: str) -> list[str]:
    """Names of lora_jax with a part that begins with an underscore."""
    tree = ast.parse(source)
    used = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    names = [name for name in [*_absolute(file, tree), *used] if _is_within(name, "lora_jax")]
    return [name for name in names if any(part.startswith("_") for part in name.split("."))]


@pytest.mark.parametrize("file", _PROGRAMS, ids=lambda file: file.relative_to(_REPOSITORY).as_posix())
def test_a_program_uses_public_names_of_the_library(file):
    assert _private(file, file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    ["from lora_jax._tree.nodes import Adapter", "import lora_jax\nlora_jax._paths.named_leaves({})"],
)
def test_the_check_of_private_names_can_fail(source):
    assert _private(_REPOSITORY / "experiments" / "convert.py", source)


def _parts_of(names: list[str], package: str) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith(f"{package}.")}


@pytest.mark.parametrize("package, expected", [("lora_jax", _LIBRARY), ("experiments", _EXPERIMENTS)])
def test_the_arrows_between_the_parts(package, expected):
    found: dict[str, set[str]] = {}
    for file in sorted((_REPOSITORY / package).rglob("*.py")):
        part = file.relative_to(_REPOSITORY / package).parts[0].removesuffix(".py")
        names = _absolute(file, ast.parse(file.read_text(encoding="utf-8")))
        found.setdefault(part, set()).update(_parts_of(names, package) - {part})
    assert found == expected


@pytest.mark.parametrize("parts", [_LIBRARY, _EXPERIMENTS], ids=["lora_jax", "experiments"])
def test_no_part_imports_a_later_one(parts):
    order = list(parts)
    for part, imported in parts.items():
        assert all(order.index(name) < order.index(part) for name in imported), part


def test_the_check_of_arrows_sees_both_ways_of_importing():
    source = "from experiments import tasks\ndef f():\n    from .running.run import run"
    names = _absolute(_REPOSITORY / "experiments" / "convert.py", ast.parse(source))
    assert _parts_of(names, "experiments") == {"tasks", "running"}


# -- the face ------------------------------------------------------------------------------------------------


def test_the_face_lists_its_names_and_imports_rooms_when_they_are_asked_for():
    code = """
import sys, lora_jax
assert not {"flax", "orbax", "safetensors"} & set(sys.modules)
listed = set(lora_jax.__all__)
assert listed <= set(dir(lora_jax)) and {"lorafy", "Adapter", "sharding", "processes", "models"} <= listed
assert not any(name.startswith("_") for name in listed)
for name in listed:
    getattr(lora_jax, name)
assert lora_jax.models.GPT2 and lora_jax.interop.peft.load and lora_jax.checkpoint.Checkpoints
try:
    lora_jax.lorify
except AttributeError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=_REPOSITORY, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "has no attribute 'lorify'" in result.stdout
