"""Strict JAX for every test, on eight virtual CPU devices, and the fixtures that more than one room needs.

Compiled programs are kept in pytest's own cache, `.pytest_cache/d/jax`, for whoever runs the tests again;
`pytest --cache-clear` forgets them. JAX's key of a program holds its text, XLA's flags and jaxlib's version,
so that a change of any of them compiles anew. The tests that count compilations count traces, or the entries
of a function's own cache, and a program from disk adds to both. Nothing is kept where the environment sets
CI: a first run finds little there, and what passes must not depend on an earlier run.
"""

import contextlib
import gc
import json
import os
import resource
import shutil
import tempfile
from pathlib import Path

from compiling import xla_flags


# Before anything imports JAX, which reads these once. They are in the environment, so that the processes that
# tests start have them too. `setdefault`, so that JAX_PLATFORMS=cuda tries the same tests on a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(devices=8)}".strip()
os.environ.setdefault("MPLBACKEND", "Agg")  # no test opens a window
# No test reaches a model hub, or reads or fills the user's cache of one. Each worker has its own.
os.environ["HF_HUB_OFFLINE"] = "1"
_HUB_CACHE = tempfile.mkdtemp(prefix="lora_jax_tests_")
os.environ["HF_HOME"] = _HUB_CACHE

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402


_REPOSITORY = Path(__file__).resolve().parent.parent

# Compiling takes longer than any deadline on the first example and no time on the others. Derandomised: a run
# of the suite says something about the code, not about its luck.
hypothesis.settings.register_profile("lora_jax", deadline=None, derandomize=True)
hypothesis.settings.load_profile("lora_jax")


def pytest_configure(config):
    # Tracing makes objects by the thousand. At Python's own thresholds the collector took 6% of the CPU time
    # of two files, at these 1%.
    gc.set_threshold(50_000, 20, 20)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    if os.environ.get("CI") or not hasattr(config, "cache"):
        # The command line would keep them in the user's own cache.
        _set_in_all_processes(jax_enable_compilation_cache=False)
    else:
        _set_in_all_processes(
            jax_compilation_cache_dir=str(config.cache.mkdir("jax")),
            jax_persistent_cache_min_compile_time_secs=0,  # most take less than JAX's one second
        )


def _set_in_all_processes(**options):
    """For this process and for those that tests start."""
    for option, value in options.items():
        jax.config.update(option, value)
        os.environ[option.upper()] = str(value)


def pytest_terminal_summary(terminalreporter):
    """CPU seconds, which do not depend on what else the machine does; xdist has ended its workers by now."""
    whose = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    seconds = sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, whose))
    terminalreporter.line(f"{seconds:.0f} CPU seconds, of the workers and of what they started too")


def pytest_collection_modifyitems(items):
    """Marks what compares with PyTorch or PEFT by the fixtures that bring them."""
    for item in items:
        if {"torch", "peft", "theirs"} & set(item.fixturenames):
            item.add_marker("pytorch")


def pytest_unconfigure(config):
    shutil.rmtree(_HUB_CACHE, ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs():
    """Each compiled program holds memory maps, of which Linux grants a process 65,530: a long run dies of
    them.
    """
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def _leaks(request):
    """Marked `leaks`: a tracer that outlives its trace raises."""
    with jax.checking_leaks() if request.node.get_closest_marker("leaks") else contextlib.nullcontext():
        yield


@pytest.fixture
def x64():
    """Float64 for one test, where rounding would hide a wrong term. Arrays made at import time stay
    32-bit.
    """
    with jax.enable_x64(True):
        yield


@pytest.fixture
def relaxed_promotion():
    """JAX's default promotion for one test, for the models of other libraries, which count on it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The real data sets, which are not part of the project."""
    directory = Path(os.environ.get("LORA_JAX_DATA") or _REPOSITORY.parent / "shared" / "data")
    if not directory.is_dir():
        pytest.skip(
            f"no data sets at {directory}: set LORA_JAX_DATA to the directory that holds e2e/, gpt2_bpe/, …"
        )
    return directory


@pytest.fixture(scope="session")
def published(data_dir) -> dict:
    """The numbers of LoRA's paper, as its tables print them."""
    path = data_dir.parent / "reference" / "published.json"
    if not path.is_file():
        pytest.skip(
            f"no {path}: the paper's numbers lie beside the data sets only where the project is developed"
        )
    return json.loads(path.read_text("utf-8"))


@pytest.fixture(scope="session")
def torch():
    """PyTorch, the other implementation, or a skip that says how to get it."""
    return pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'lora_jax[torch]'")
