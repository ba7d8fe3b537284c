"""What a finished sweep leaves: `sweep.json`, its figures, an adapter for each combination, the best as a
run's work directory, and `sweep.md`.
"""

import dataclasses
import json
import math
import shlex
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import config as configs
from experiments.progress import read_metrics
from experiments.reports import provenance
from experiments.running import baselines, finish, workdir as workdirs
from experiments.running.inputs import Ready
from experiments.sweeps import compared, figures, page
from experiments.sweeps.guards import lost_at
from experiments.sweeps.halving import combination, of_data
from experiments.sweeps.members import Member
from experiments.sweeps.over import settings
from experiments.sweeps.together import Together
from lora_jax.checkpoint import Checkpoints, State


SECONDS = "seconds_per_step"


def write(
    together: Together, ready: Ready, state: State, asked: Any, points: Sequence[int], workdir: Path
) -> None:
    """Everything, and `sweep.md` last, whose presence says that the sweep is finished."""
    config, metrics = together.trainer.config, read_metrics(workdir / "metrics.jsonl")
    rule, dropped = state.opt_state
    plain = state._replace(opt_state=rule)
    metric = compared.metric_of(compared.evaluations(metrics)[-1])
    rows = [
        _row(together, member, int(step), metrics, workdir)
        for member, step in zip(together.members, np.asarray(dropped), strict=True)
    ]
    table = grouped(rows, metric)
    for place, row in enumerate(rows):
        step = config.train.steps if row["dropped"] is None else row["dropped"]
        single = together.single(place, plain._replace(step=step))
        row |= _export(together, place, single, ready, workdir)
    best = best_of(rows, table, metric)
    for name in best:
        place = together.names.index(name)
        _as_run(together.members[place], together.single(place, plain), metrics, workdir)
    seconds = [line[SECONDS] for line in metrics if SECONDS in line]
    memory = workdir / "memory.json"
    facts = {
        "name": config.name,
        "method": str(configs.method_value(config.method)),
        "targets": list(config.targets),
        "baseline": None if config.baseline is None else str(configs.baseline_value(config.baseline)),
        "over": asked.over,
        "halving": list(points),
        "steps": config.train.steps,
        "batch": config.train.batch,
        "adapters": len(rows),
        "metric": metric,
        "rows": rows,
        "table": table,
        "best": {
            name: {"run": _finishing(together.members[together.names.index(name)], asked, workdir)}
            for name in best
        },
        "base": {
            "origin": ready.base.origin,
            "fingerprint": ready.identity["base"],
            "bytes": _bytes(together.trainer.frozen),
        },
        "bytes": {"adapters": _bytes(plain.delta), "optimiser": _bytes(plain.opt_state)},
        "memory": json.loads(memory.read_text("utf-8")) if memory.is_file() else None,
        "median_seconds_per_step": statistics.median(seconds),
        "notes": [line["note"] for line in metrics if "note" in line],
        "command": provenance.command(),
        **provenance.provenance(),
        "processes": provenance.said(workdir),
    }
    figures.draw(facts, metrics, workdir / "figures")
    (workdir / "sweep.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", "utf-8")
    fresh = workdir / "sweep.tmp"
    fresh.write_text(page.render(facts), "utf-8")
    fresh.replace(workdir / "sweep.md")


def _row(
    together: Together, member: Member, dropped: int, metrics: list[dict[str, Any]], workdir: Path
) -> dict[str, Any]:
    """What one adapter came to. `lost`: the step at which a run of its own would have ended."""
    train = together.trainer.config.train
    own = lambda key: [line[key][member.name] for line in metrics if member.name in line.get(key, {})]
    valid, training = own("valid_loss"), own("loss")
    finite = [value for value in valid if value is not None]
    found = [compared.of_adapter(line, member.name) for line in compared.evaluations(metrics)]
    found = [each for each in found if each]
    best = min(found, key=compared.cost, default={})
    lost = lost_at(workdir / "adapters" / member.name, train.steps, train.not_finite == "skip")
    return {
        "name": member.name,
        "values": member.values,
        "first_valid_loss": valid[0],
        "valid_loss": None if lost is not None else valid[-1],
        "best_valid_loss": min(finite, default=None),
        "metrics": {} if lost is not None else _metrics(found[-1]),
        "best_metrics": _metrics(best),
        "train_loss": training[-1],
        "dropped": dropped if dropped >= 0 else None,
        "lost": lost,
    }


def _metrics(found: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in found.items() if name != "valid_loss"}


def grouped(rows: Sequence[dict[str, Any]], metric: str | None = None) -> list[dict[str, Any]]:
    """A line for each combination: the mean over its seeds of what adapters are compared by, and their sample
    deviation where there are several; of a metric also that of each one's best evaluation. None: one of them
    was lost.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(combination(row["values"]), []).append(row)
    return [_line(own, metric) for own in groups.values()]


def _line(own: Sequence[dict[str, Any]], metric: str | None) -> dict[str, Any]:
    mean, deviation = _over_seeds([_value(row, metric) for row in own])
    best = {} if metric is None else _over_seeds([row["best_metrics"].get(metric) for row in own])
    return {
        "values": {key: value for key, value in own[0]["values"].items() if key != "seed"},
        "adapters": len(own),
        "mean": mean,
        "deviation": deviation,
        **({} if metric is None else {"best": dict(zip(("mean", "deviation"), best, strict=True))}),
        "dropped": own[0]["dropped"],
        "lost": [row["name"] for row in own if row["lost"] is not None],
    }


def _value(row: dict[str, Any], metric: str | None) -> float | None:
    """What an adapter is compared by, after its last step."""
    return row["valid_loss"] if metric is None else row["metrics"].get(metric)


def _over_seeds(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and sample deviation."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None, None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None


def best_of(
    rows: Sequence[dict[str, Any]], table: Sequence[dict[str, Any]], metric: str | None = None
) -> list[str]:
    """Of each data the best adapter of the best combination, among those that trained to the end."""
    best = []
    for data in dict.fromkeys(of_data(line["values"]) for line in table):
        ended = [
            line
            for line in table
            if of_data(line["values"]) == data and line["dropped"] is None and line["mean"] is not None
        ]
        if ended:
            chosen = combination(min(ended, key=compared.by(metric))["values"])
            own = [row for row in rows if combination(row["values"]) == chosen]
            first = compared.by(metric)
            best.append(min(own, key=lambda row: first({"mean": _value(row, metric)}))["name"])
    return best


def _export(together: Together, place: int, single: State, ready: Ready, workdir: Path) -> dict[str, Any]:
    """Writes the adapter in PEFT's format, where that has a form for it; with a baseline, every array that
    was trained.
    """
    member = together.members[place]
    directory = workdir / "adapters" / member.name
    directory.mkdir(parents=True, exist_ok=True)
    if member.config.baseline is not None:
        baselines.write(single.delta, directory / baselines.FILE)
        return {"adapter": f"adapters/{member.name}/{baselines.FILE}"}
    trainer = dataclasses.replace(together.trainer, config=member.config)
    facts = finish.write_adapter(trainer, single.delta, ready.base, directory)
    return {"adapter": facts["missing"] or f"adapters/{member.name}/adapter"}


def _as_run(member: Member, single: State, metrics: list[dict[str, Any]], workdir: Path) -> None:
    """A work directory that `run` finishes: its last checkpoint, its config and its own numbers."""
    directory = workdir / "best" / member.name
    if (directory / "config.json").is_file():  # a sweep that was stopped while it finished
        return
    directory.mkdir(parents=True, exist_ok=True)
    lines = [line for line in (_own_line(line, member.name) for line in metrics) if line is not None]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    shutil.copy(workdir / provenance.FILE, directory)
    for name in {"data", "tokenizer", member.config.base.workdir if member.config.base.run else "data"}:
        there, link = workdir / name, directory / name
        if there.exists() and not link.exists() and ".." not in Path(name).parts:
            link.symlink_to(Path("../..") / name)
    checkpoints = Checkpoints(directory / "checkpoints", identity=member.identity)
    with checkpoints:
        if checkpoints.latest() is None:
            checkpoints.save(single)
    workdirs.mark(directory, configs.to_json(member.config))


def _own_line(line: dict[str, Any], name: str) -> dict[str, Any] | None:
    """A line of the sweep's log as a run of this adapter has it: its share of the time, and no remarks."""
    several = [value for value in line.values() if isinstance(value, dict)]
    if not any(name in value for value in several):
        return None
    found = {
        key: value[name] if isinstance(value, dict) else value / len(several[0]) if key == SECONDS else value
        for key, value in line.items()
    }
    return {key: math.nan if value is None else value for key, value in found.items()}


def _finishing(member: Member, asked: Any, workdir: Path) -> str:
    """The command that merges, decodes, scores and reports an adapter."""
    words = ["python", "-m", "experiments", "run", str(asked.path)]
    for item in (*asked.overrides, *settings(member.values)):
        words += ["--set", item]
    return shlex.join([*words, *asked.places, "--workdir", str(workdir / "best" / member.name)])


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
