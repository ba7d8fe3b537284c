"""Sweeps made by the command line, and the runs that their adapters are compared with. `root` holds the
config `tiny.json`, and in `data/` its base and its files.
"""

import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from training import close

from experiments import config as configs
from experiments.command_line import main
from experiments.progress import read_metrics
from experiments.running import run as runs
from experiments.sweeps import results, sweep
from experiments.sweeps.over import settings
from experiments.sweeps.together import Together
from lora_jax.checkpoint import State


def words(root, workdir, over, *more):
    over = [word for item in over for word in ("--over", item)]
    places = ["--data", str(root / "data"), "--workdir", str(workdir)]
    return ["sweep", str(root / "tiny.json"), *over, *places, *more]


class Done(NamedTuple):
    """A finished sweep, with the arrays of all adapters."""

    directory: Path
    together: Together
    state: State
    programs: int


def swept(root, workdir, over, *more):
    """Runs a sweep to its end through the command line, and counts the programs of its steps."""
    kept, compiled = [], []
    count = sweep._Training._memory

    def keep(together, ready, state, *rest):
        kept.append((together, state._replace(opt_state=state.opt_state[0])))
        write(together, ready, state, *rest)

    write = results.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "write", keep)
        patch.setattr(
            sweep._Training, "_memory", lambda self, found: compiled.append(found) or count(self, found)
        )
        assert main(words(root, workdir, over, *more)) == 0
    return Done(workdir, *kept[0], len(compiled))


def facts_of(directory):
    return json.loads((directory / "sweep.json").read_text())


def own_run(root, monkeypatch, values, *sets):
    """The state and the metrics of a run with these values, but for what it exports."""
    kept = []
    monkeypatch.setattr(runs.finish, "finish", lambda ready, state, *rest: kept.append(state))
    workdir = root / "own" / str(len(list((root / "own").glob("*"))))
    config = configs.load(root / "tiny.json", [*sets, *settings(values)])
    runs.run(config, root / "tiny.json", root / "data", workdir)
    return kept[0], read_metrics(workdir / "metrics.jsonl")


def assert_is_that_of_its_own_run(root, done, monkeypatch, name, *sets):
    """The numbers of each step, and the arrays after the last, those of the optimiser too."""
    place = done.together.names.index(name)
    state, metrics = own_run(root, monkeypatch, done.together.members[place].values, *sets)
    lines = [line for line in read_metrics(done.directory / "metrics.jsonl") if "note" not in line]
    assert [line["step"] for line in lines] == [line["step"] for line in metrics]
    for mine, theirs in zip(lines, metrics, strict=True):
        for key in set(theirs) - {"step", "seconds_per_step"}:
            np.testing.assert_allclose(mine[key][name], theirs[key], rtol=1e-5, err_msg=f"{name} {key}")
    single = done.together.single(place, done.state)
    assert single.step == state.step and single.position == state.position
    found, expected = ((each.delta, each.opt_state) for each in (single, state))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    close(found, expected, 5e-6)
    np.testing.assert_array_equal(*(jax.random.key_data(each.key) for each in (single, state)))
