"""A task that only this file knows is trained, predicted, scored and reported, as those that ship are."""

import dataclasses
import json
from typing import Literal

import jax
import numpy as np
import pytest
from training import config, MODEL, started

import lora_jax
from experiments import config as configs, tasks
from experiments.config import Decode
from experiments.reports import scores, table
from experiments.running import finish
from experiments.tasks import Task
from experiments.tasks.examples import Prompt, Splits


@dataclasses.dataclass(frozen=True)
class Marks:
    """Texts with a mark from 0 to 1."""

    task: Literal["marks"]
    train: str
    seq_len: int


def read(section, directory):
    return [line.split("\t") for line in (directory / section.train).read_text().splitlines()]


def prepare(section, rows, tokenizer):
    return Splits((), (), tuple(Prompt(text, (1,), (mark,)) for text, mark in rows))


def squares(model, piece, smoothing=0.0):
    """Of the difference between a text's mark and the first logit after it."""
    found = model(piece["input_ids"])[:, -1, 0]
    return (found - piece["marks"]) ** 2, piece["marks"] >= 0


def right(references, texts, *, tell):
    same = [text in group for group, text in zip(references, texts, strict=True)]
    return {"accuracy": sum(same) / len(same)}


@dataclasses.dataclass(frozen=True)
class Marker:
    task: Task
    section: Decode
    prompts: tuple[Prompt, ...]

    def texts(self, params, count=None, *, tell=lambda done: None):
        return [params for _ in self.prompts[:count]]


TASK = Task(Marks, read, prepare, loss=squares, score=right, percentages=("accuracy",), packs=False)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(tasks.TASKS, TASK.name, TASK)


@pytest.fixture
def settings():
    return dataclasses.replace(config(), data=Marks("marks", "marks.tsv", 12))


def test_its_own_loss_is_trained(settings):
    trainer, state = started(settings)
    piece = {"input_ids": np.array([[1, 2], [3, 4], [5, 6]]), "marks": np.array([0.5, 1.0, -1.0], np.float32)}
    total, count = trainer.loss(state.delta, trainer.frozen, piece)
    params = lora_jax.combine(trainer.frozen, state.delta)
    logits = jax.device_get(lora_jax.adapt(MODEL.apply)({"params": params}, piece["input_ids"]))
    expected = ((logits[:2, -1, 0] - piece["marks"][:2]) ** 2).sum()
    assert float(total) == pytest.approx(expected, rel=1e-5) and float(count) == 2


def test_its_own_predictions_are_scored_and_reported(settings, tmp_path, capsys):
    (tmp_path / "marks.tsv").write_text("a\t1\nb\t0\nc\t1\n")
    prompts = tasks.prepare(settings.data, tasks.read(settings.data, tmp_path), None).prompts
    found = finish.predict(Marker(TASK, Decode(before=True), prompts), "0", "1", tmp_path)
    assert found["scores"] == {
        "after": {"accuracy": pytest.approx(2 / 3)},
        "before": {"accuracy": pytest.approx(1 / 3)},
    }
    assert (tmp_path / "predictions.txt").read_text() == "1\n1\n1\n"
    page = "\n".join(scores.scored(found["scores"], settings))
    assert "| this run | 66.67 |" in page and "experiments score marks --refs" in page
    numbers = dict.fromkeys(
        ("steps", "first_valid_loss", "valid_loss", "best_valid_loss", "median_seconds_per_step"), 1
    )
    facts = {"numbers": numbers, "trainable": 1, "comparison": {"max_difference": 0.0}, **found}
    (tmp_path / "report.json").write_text(json.dumps(facts))
    (tmp_path / "config.json").write_text(json.dumps(configs.to_json(settings)))
    (tmp_path / "report.md").write_text("")
    head, _, row = table.table([tmp_path]).splitlines()
    assert "| accuracy before | accuracy after |" in head and "| 33.33 | 66.67 |" in row


@pytest.mark.parametrize(
    "change, message",
    [
        ({"base": {"vocabulary": 300}}, 'plain text, which `data.task` "text" has'),
        ({"train": {"pack": 1}}, '`train.pack` is 1, and `data.task` is "marks", whose blocks are full'),
    ],
)
def test_what_its_value_says_is_checked(settings, change, message):
    """It has no documents, and does not pack."""
    ((section, values),) = change.items()
    if section == "base":
        values = {**values, "tokenizer": None}
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(settings, **{section: dataclasses.replace(getattr(settings, section), **values)})
