"""The notebooks, each run from its first cell to its last in a kernel of its own.

`make notebooks` runs them and stores what they print and show; test_notebooks.py runs them and compares. The
kernel has one CPU device and compiles as JAX does by default: what is stored is what a reader gets.

A notebook's own metadata says what it needs beside the extra `test`:

    "lora_jax": {"base": "smollm2-135m", "modules": {"torch": "lora_jax[torch]"}}

`base` is a pretrained base in the directory that `LORA_JAX_BASES` names, and `modules` maps what is imported
to what pip installs for it. Where one of them is missing, the test is skipped, and says how to get it. A cell
with the tag `varies` prints what no two runs print alike, such as times: its outputs are stored and not
compared.
"""

import importlib.util
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from experiments import catalogue


REPOSITORY = Path(__file__).resolve().parent.parent
NOTEBOOKS = {file.stem: file for file in sorted((REPOSITORY / "notebooks").glob("*.ipynb"))}
BASES = Path(os.environ.get("LORA_JAX_BASES") or REPOSITORY / "bases").resolve()
TIMEOUT = 600  # seconds for a cell on a busy machine: on two free cores a whole notebook takes less than 60


def read(name: str) -> NotebookNode:
    return nbformat.read(NOTEBOOKS[name], as_version=4)


def needs(notebook: NotebookNode, kind: str) -> dict | str:
    """The `base` or the `modules` of a notebook's metadata."""
    return notebook.metadata.get("lora_jax", {}).get(kind, {})


def missing(notebook: NotebookNode) -> str | None:
    """Why this notebook cannot run here, and what helps."""
    for module, package in needs(notebook, "modules").items():
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed: pip install '{package}'"
    base = needs(notebook, "base")
    if base and not all((BASES / base / file).is_file() for file in catalogue.entry(base, "base").files):
        return f"no {BASES / base}: fetch it with `python -m experiments fetch {base} --to bases`"
    return None


def executed(notebook: NotebookNode) -> NotebookNode:
    """A copy with the outputs of a run from the start. The first cell that raises raises here."""
    fresh = nbformat.from_dict(notebook)
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    # Neither the devices and the hasty compilation of the tests, nor a backend that shows no figure.
    kept = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "MPLBACKEND")}
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    kept |= {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "LORA_JAX_BASES": str(BASES)}
    kept["IPYKERNEL_CELL_NAME"] = "cell"  # in tables of source lines; else a temporary file of this process
    client = NotebookClient(
        fresh,
        timeout=TIMEOUT,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(REPOSITORY / "notebooks")}},
    )
    client.execute(env=kept)
    fresh.metadata.language_info = {"name": "python"}  # without the version, which is this machine's
    return fresh


def main(names: list[str]) -> None:
    """Runs the notebooks of these names, or all that can run here, and stores their outputs."""
    for name in names or NOTEBOOKS:
        notebook = read(name)
        if reason := missing(notebook):
            print(f"{name}: {reason}")
        else:
            nbformat.write(executed(notebook), NOTEBOOKS[name])
            print(f"{name}: stored")


if __name__ == "__main__":
    main([Path(word).stem for word in sys.argv[1:]])
