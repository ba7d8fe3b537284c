"""Configs: what is refused and how it is said, and overrides."""

import dataclasses
import json
from typing import Literal

import pytest

from experiments import config as configs, tasks
from experiments.strict_json import build


TASKS = ", ".join(f'"{name}"' for name in tasks.TASKS)


def minimal(**changes):
    tree = {
        "name": "tiny",
        "source": {"paper": None},
        "base": {
            "architecture": {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16},
            "tokenizer": "tok",
        },
        "data": {"task": "text", "train": "a.txt", "valid": "b.txt", "seq_len": 8},
        "method": {"name": "LoRA", "rank": 2},
        "targets": ["attn/c_attn/kernel"],
        "train": {"steps": 4, "batch": 2, "lr": 0.001},
    }
    return {**tree, **changes}


def load(tmp_path, tree, *overrides):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tree))
    return configs.load(path, overrides)


@pytest.mark.parametrize(
    "change, kind, message",
    [
        (
            {"train": {"steps": 4, "batch": 2, "lrr": 0.1, "lr": 1.0}},
            ValueError,
            "unknown key `train.lrr`; did you mean `train.lr`?",
        ),
        ({"trian": {}}, ValueError, "unknown key `trian`; did you mean `train`?"),
        (
            {"train": {"steps": 4, "batch": 2, "lr": "fast"}},
            TypeError,
            '`train.lr` must be a number, got "fast" (a string)',
        ),
        (
            {"train": {"steps": 4.0, "batch": 2, "lr": 1}},
            TypeError,
            "`train.steps` must be an integer, got 4.0 (float)",
        ),
        (
            {"train": {"steps": True, "batch": 2, "lr": 1}},
            TypeError,
            "`train.steps` must be an integer, got true (a boolean)",
        ),
        (
            {"train": {"steps": 4, "batch": 2, "lr": True}},
            TypeError,
            "`train.lr` must be a number, got true (a boolean)",
        ),
        (
            {"train": {"steps": 4, "batch": 2, "lr": 1, "warmup": 5}},
            ValueError,
            "`train.warmup` must be between 0 and `train.steps` (4), got 5",
        ),
        (
            {"train": {"steps": 4, "batch": 2, "lr": 1, "label_smoothing": 1}},
            ValueError,
            "`train.label_smoothing` must be at least 0 and less than 1, got 1.0",
        ),
        ({"optimizer": {"loraplus": 0}}, ValueError, "`optimizer.loraplus` must be positive, got 0.0"),
        ({"optimizer": {"b1": -0.1}}, ValueError, "`optimizer.b1` must be at least 0 and below 1, got -0.1"),
        (
            {"decode": {"sample": {"top_p": 0}}},
            ValueError,
            "`decode.sample.top_p` must be more than 0 and at most 1, or null, got 0.0",
        ),
        ({"train": {"steps": 4, "lr": 1}}, ValueError, "missing key `train.batch`"),
        (
            {"base": {"path": "gpt2", "vocabulary": 300}},
            ValueError,
            "one of `base.tokenizer` and `base.vocabulary` goes with `base.architecture`",
        ),
        (
            {"base": {"architecture": {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}}},
            ValueError,
            "one of `base.tokenizer` and `base.vocabulary` goes with `base.architecture`",
        ),
        ({"train": 3}, TypeError, "`train` must be an object, got 3 (int)"),
        ({"targets": "c_attn"}, TypeError, '`targets` must be a list, got "c_attn" (a string)'),
        ({"targets": ["a", 1]}, TypeError, "`targets[1]` must be a string, got 1 (int)"),
        (
            {"data": {"task": "e2"}},
            ValueError,
            f'`data.task` must be one of {TASKS}, got "e2"; did you mean `e2e`?',
        ),
        (
            {"data": {"train": "x"}},
            ValueError,
            f"`data` lacks the key `task`, which must be one of {TASKS}",
        ),
        (
            {"optimizer": {"name": "adam"}},
            ValueError,
            '`optimizer.name` must be one of "adamw", "adamw_authors", got "adam"; did you mean `adamw`?',
        ),
        ({"decode": {"prompts": -1}}, ValueError, "`decode.prompts` must be at least 1, got -1"),
        (
            {"train": {"steps": 1, "batch": 2, "lr": -1e-3}},
            ValueError,
            "`train.lr` must be at least 0, got -0.001",
        ),
        (
            {"train": {"steps": 1, "batch": 2, "lr": 1e-3, "eval_batches": 0}},
            ValueError,
            "`train.eval_batches` must be at least 1, got 0",
        ),
        ({"mesh": {"data": 0}}, ValueError, "`mesh.data` must be at least 1, got 0"),
        ({"optimizer": {"b2": 1.5}}, ValueError, "`optimizer.b2` must be at least 0 and below 1, got 1.5"),
        ({"optimizer": {"eps": -1}}, ValueError, "`optimizer.eps` must be at least 0, got -1"),
        (
            {"data": {"task": "text", "train": "a", "valid": "b", "seq_len": 8, "max_bytes": 0}},
            ValueError,
            "`data.max_bytes` must be at least 1, got 0",
        ),
        ({"decode": {"beams": 0}}, ValueError, "`decode.beams` must be at least 1, got 0"),
        ({"decode": {"max_tokens": 0}}, ValueError, "`decode.max_tokens` must be at least 1, got 0"),
        (
            {"decode": {"no_repeat_ngram": 0}},
            ValueError,
            "`decode.no_repeat_ngram` must be at least 1, got 0",
        ),
        (
            {"decode": {"length_penalty": float("nan")}},
            ValueError,
            "`decode.length_penalty` must be finite, got nan",
        ),
        ({"decode": {"end": "x"}}, TypeError, '`decode.end` must be a list, got "x" (a string)'),
        ({"decode": {"end": [1.5]}}, TypeError, "`decode.end[0]` must be a string, got 1.5 (float)"),
        (
            {"decode": {"beams": 2, "sample": {}}},
            ValueError,
            "`decode.sample` draws one text, and `decode.beams` is 2",
        ),
        (
            {"decode": {"sample": {"temperature": 0}}},
            ValueError,
            "`decode.sample.temperature` must be positive, got 0.0",
        ),
        (
            {"decode": {"sample": {"top_k": 0}}},
            ValueError,
            "`decode.sample.top_k` must be at least 1 or null, got 0",
        ),
        (
            {"decode": {"sample": {"top_p": 1.5}}},
            ValueError,
            "`decode.sample.top_p` must be more than 0 and at most 1, or null, got 1.5",
        ),
        (
            {"method": {"name": "Lora"}},
            ValueError,
            "`method.name` must be one of AdaLoRA, DeltaLoRA, DoRA, DyLoRA, Full, LoRA, LoRAFA, PiSSA, "
            "VeRA, got 'Lora'; did you mean `LoRA`?",
        ),
        (
            {"method": {"name": "LoRA", "ranks": 2}},
            ValueError,
            "unknown key `method.ranks`; did you mean `method.rank`?",
        ),
        (
            {"method": {"name": "LoRA", "rank": "2"}},
            TypeError,
            '`method.rank` must be an integer, got "2" (a string)',
        ),
        (
            {"base": {}},
            ValueError,
            "`base` takes exactly one of `name`, `path`, `run` and `architecture`, got none of them",
        ),
        (
            {"base": {"path": "a", "run": "b"}},
            ValueError,
            "`base` takes exactly one of `name`, `path`, `run` and `architecture`, got path, run",
        ),
        (
            {"base": {"name": "smollm2-135m", "path": "a"}},
            ValueError,
            "`base` takes exactly one of `name`, `path`, `run` and `architecture`, got name, path",
        ),
        (
            {"base": {"name": "smollm2"}},
            ValueError,
            "`base.name` must be one of all-minilm-l6-v2, smollm2-135m, got `smollm2`; did you mean "
            "`smollm2-135m`?",
        ),
        ({"train": {"steps": 0, "batch": 2, "lr": 1}}, ValueError, "`train.steps` must be at least 1, got 0"),
        (
            {"train": {"steps": 1, "batch": 3, "lr": 1, "accumulate": 2}},
            ValueError,
            "`train.batch` (3) must be a multiple of `train.accumulate` (2)",
        ),
        (
            {"train": {"steps": 1, "batch": 2, "lr": 1, "pack": 3}},
            ValueError,
            "`train.pack` is 3, the rows that the examples of a step share, and `train.batch` is 2: set "
            "fewer",
        ),
        (
            {
                "train": {"steps": 1, "batch": 4, "lr": 1, "accumulate": 2, "pack": 3},
                "data": {"task": "e2e", "train": "a", "valid": "b"},
            },
            ValueError,
            "`train.pack` (3) must be a multiple of mesh.data * mesh.fsdp * train.accumulate (2)",
        ),
        (
            {
                "train": {"steps": 1, "batch": 2, "lr": 1, "pack": 1},
                "data": {"task": "text", "train": "a", "valid": "b", "seq_len": 8},
            },
            ValueError,
            '`train.pack` is 1, and `data.task` is "text", whose blocks are full already',
        ),
        (
            {"mesh": {"data": 4}},
            ValueError,
            "`train.batch` (2) must be a multiple of mesh.data * mesh.fsdp * train.accumulate (4)",
        ),
        (
            {"source": {"paper": None, "expected": {"BLEU": "70"}}},
            TypeError,
            '`source.expected.BLEU` must be a number, got "70" (a string)',
        ),
    ],
)
def test_refusals_name_the_key(tmp_path, change, kind, message):
    with pytest.raises(kind) as caught:
        load(tmp_path, minimal(**change))
    assert str(caught.value).startswith(message)


NUMBERS = [("train", name) for name in ("lr", "label_smoothing", "dropout", "head_dropout")] + [
    ("optimizer", name) for name in ("b1", "b2", "eps", "weight_decay", "clip", "loraplus")
]
NUMBERS += [("optimizer.adalora", "orthogonality"), ("decode", "length_penalty")]
NUMBERS += [("decode.sample", name) for name in ("temperature", "top_p")]


@pytest.mark.parametrize("value", ["Infinity", "-Infinity", "NaN"])
@pytest.mark.parametrize("section, name", NUMBERS, ids=[".".join(pair) for pair in NUMBERS])
def test_no_number_is_infinite(tmp_path, section, name, value):
    """JSON has no such numbers, and Python's reader takes them all the same."""
    overrides = ["optimizer.adalora.target_rank=1"] if section == "optimizer.adalora" else []
    with pytest.raises(ValueError, match=f"^`{section}.{name}` must be "):
        load(tmp_path, minimal(), *overrides, f"{section}.{name}={value}")


def test_every_number_of_a_section_is_looked_at():
    """What the list above leaves out is counted in whole numbers, which are finite."""
    sections = {"train": configs.Train, "optimizer": configs.Optimizer, "decode": configs.Decode}
    sections |= {"optimizer.adalora": configs.Budget, "decode.sample": configs.Sample}
    found = {
        (section, field.name)
        for section, kind in sections.items()
        for field in dataclasses.fields(kind)
        if "float" in str(field.type)
    }
    assert found == set(NUMBERS)


def test_a_mean_of_more_than_are_saved(tmp_path):
    load(tmp_path, minimal(), "train.result=mean", "train.checkpoint_every=2")
    with pytest.raises(
        ValueError,
        match='"mean" is of `train.keep_checkpoints` .2., and 4 steps with `train.checkpoint_every` 500 make fewer',  # noqa: E501
    ):
        load(tmp_path, minimal(), "train.result=mean")


def test_overrides(tmp_path):
    config = load(
        tmp_path,
        minimal(),
        "train.lr=1e-4",
        "mesh.data=2",
        "base.tokenizer=other",
        "method.blocks=[true,false,true]",
    )
    assert (config.train.lr, config.mesh.data, config.base.tokenizer) == (1e-4, 2, "other")
    assert configs.method_value(config.method).blocks == (True, False, True)
    for item, message in [
        ("train.lrr=1", "unknown key `train.lrr`"),
        ("train.lr", "`--set` takes key=value"),
        ("name.first=1", "goes below a value that has no keys"),
    ]:
        with pytest.raises(ValueError, match=message):
            load(tmp_path, minimal(), item)


def test_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config file `nowhere.json`"):
        configs.load("nowhere.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        configs.load(tmp_path / "broken.json")


def test_difference_names_the_first_key():
    old, new = {"a": 1, "train": {"lr": 1, "steps": 2}}, {"a": 1, "train": {"lr": 2, "steps": 2}}
    assert configs.difference(old, old) is None
    assert configs.difference(old, new) == "`train.lr` was 1 and is now 2"
    assert configs.difference(old, {**old, "b": 0}) == "`b` was null and is now 0"


def test_what_is_said_beyond_the_defaults(tmp_path):
    """Saying a default says nothing, so that a key that a later version adds changes nothing; whatever
    else is said, counts.
    """
    tree = minimal()
    said = configs.without_defaults(load(tmp_path, tree))
    assert said == {
        **tree,
        "source": {"paper": None},
        "base": tree["base"],
        "targets": ["attn/c_attn/kernel"],
    }
    assert (
        configs.without_defaults(load(tmp_path, tree, "train.warmup=0", "mesh.data=1", "optimizer.b1=0.9"))
        == said
    )
    for override in (
        "train.warmup=1",
        "mesh.data=2",
        "optimizer.b1=0.8",
        "train.steps=5",
        "base.tokenizer=other",
    ):
        assert configs.without_defaults(load(tmp_path, tree, override)) != said


def test_no_default_is_mutable_or_hidden():
    """Equal sections are equal configs: a section is a frozen value all the way down."""

    @dataclasses.dataclass(frozen=True)
    class Inner:
        kind: Literal["one"] = "one"
        size: float | None = None

    assert build(Inner, {"size": 1}) == Inner("one", 1.0)
    assert build(Inner, {"size": None}) == Inner()
    with pytest.raises(dataclasses.FrozenInstanceError):
        Inner().size = 2
