"""What a command needs to have installed: looked for before it begins, and named with the `pip install` that
brings it.

Left out: PyTorch, java and METEOR's jar, without which a run goes on and says what it leaves out.
"""

import importlib.util
from collections.abc import Iterable
from pathlib import Path


REPOSITORY = Path(__file__).resolve().parents[1]
# The modules of the extra `experiments` that every run imports, at its beginning or at its end.
OF_EVERY_RUN = (
    "jax",
    "optax",
    "flax",
    "chex",
    "safetensors",
    "orbax.checkpoint",
    "transformers",
    "matplotlib",
)


def pip_install(extra: str) -> str:
    """The command that installs an extra, as typed in this working directory: this project is a clone, and
    on no package index.
    """
    clone = "." if Path.cwd() == REPOSITORY else str(REPOSITORY)
    return f"pip install '{clone}[{extra}]'"


def look_for(modules: Iterable[str], purpose: str) -> None:
    """Raises `ModuleNotFoundError` for modules that cannot be imported; none is imported here."""
    missing = [module for module in modules if not _there(module)]
    if missing:
        raise ModuleNotFoundError(
            f"{purpose} needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
            f"installed: {pip_install('experiments')}",
            name=missing[0],
        )


def described(error: ModuleNotFoundError) -> str:
    """A missing module in one line. An error of `look_for` or of the library has its own."""
    text = str(error)
    if "pip install" in text:
        return text
    return (
        f"{error.name} is not installed for this Python, and this command needs it: "
        f"{pip_install('experiments')}"
    )


def _there(module: str) -> bool:
    # A missing parent makes `find_spec` raise, and a None in `sys.modules` is a ValueError.
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):
        return False
