"""Configs that say what differs from another: what they take from it, and what is refused."""

import json

import pytest
from test_config import load, minimal

from experiments import config as configs


def write(tmp_path, **trees):
    for name, tree in trees.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(tree))
    return tmp_path / "own.json"


WHOLE = minimal(
    method={"name": "LoRA", "rank": 2, "alpha": 4},
    optimizer={"name": "adamw_authors", "b2": 0.99},
    decode={"beams": 4},
    quantize="nf4",
    seed=3,
)


@pytest.mark.parametrize(
    "own, expected",
    [
        ({}, {}),
        ({"name": "own", "seed": 0}, {"name": "own", "seed": 0}),
        ({"train": {"lr": 0.1}}, {"train": {"steps": 4, "batch": 2, "lr": 0.1}}),
        ({"decode": {}}, {}),
        ({"quantize": None}, {"quantize": None}),
        ({"targets": ["a"]}, {"targets": ["a"]}),
        ({"mesh": {"data": 2}}, {"mesh": {"data": 2}}),
        # The same method has the other arguments too, another has its own.
        ({"method": {"rank": 1}}, {"method": {"name": "LoRA", "rank": 1, "alpha": 4}}),
        ({"method": {"name": "LoRA", "rank": 1}}, {"method": {"name": "LoRA", "rank": 1, "alpha": 4}}),
        ({"method": {"name": "Full"}}, {"method": {"name": "Full"}}),
        ({"baseline": {"name": "Lin", "bottleneck": 2}}, {"baseline": {"name": "Lin", "bottleneck": 2}}),
        ({"optimizer": {"name": "adamw"}}, {"optimizer": {"name": "adamw"}}),
        (
            {"data": {"task": "e2e", "train": "a", "valid": "b"}},
            {"data": {"task": "e2e", "train": "a", "valid": "b"}},
        ),
        ({"data": {"seq_len": 4}}, {"data": {**WHOLE["data"], "seq_len": 4}}),
        # What is below a key of a section is replaced.
        (
            {"base": {"architecture": {"n_embd": 4, "n_layer": 1, "n_head": 1, "n_positions": 8}}},
            {
                "base": {
                    "architecture": {"n_embd": 4, "n_layer": 1, "n_head": 1, "n_positions": 8},
                    "tokenizer": "tok",
                }
            },
        ),
        (
            {"base": {"architecture": None, "tokenizer": None, "path": "gpt2"}},
            {"base": {"path": "gpt2"}},
        ),
    ],
    ids=str,
)
def test_a_config_is_like_another(tmp_path, own, expected):
    """It is what one file with all of it is, and that is what a work directory keeps."""
    found = configs.load(write(tmp_path, whole=WHOLE, own={"like": "whole.json", **own}))
    assert found == load(tmp_path, {**WHOLE, **expected})
    assert "like" not in configs.to_json(found)


def test_overrides_are_of_the_whole(tmp_path):
    """An object below a section is replaced, and `like` is a path from its own file."""
    optimizer = {"name": "adamw_authors", "adalora": {"target_rank": 1, "every": 3}}
    whole = {**WHOLE, "method": {"name": "AdaLoRA", "rank": 4}, "optimizer": optimizer}
    own = {"like": "../whole.json", "optimizer": {"adalora": {"target_rank": 2}}}
    (tmp_path / "rows").mkdir()
    write(tmp_path, whole=whole)
    found = configs.load(write(tmp_path / "rows", own=own), ["optimizer.b2=0.5", "method.rank=8"])
    assert found.optimizer.adalora == configs.Budget(target_rank=2)
    assert (found.optimizer.name, found.optimizer.b2, found.method["rank"]) == ("adamw_authors", 0.5, 8)


@pytest.mark.parametrize(
    "trees, kind, message",
    [
        (
            {"own": {"like": "whol.json"}},
            FileNotFoundError,
            "`like` is whol.json in `{0}/own.json`, and there is no file `{0}/whol.json`: give its path",
        ),
        (
            {"own": {"like": "own.json"}},
            ValueError,
            "`like` is own.json in `{0}/own.json`, which has a `like` itself: name a config that says",
        ),
        (
            {"own": {"like": "next.json"}, "next": {"like": "whole.json"}, "whole": minimal()},
            ValueError,
            "`like` is next.json in `{0}/own.json`, which has a `like` itself",
        ),
        ({"own": {"like": 3}}, TypeError, "`like` must be a string, got 3 (int)"),
        (
            {"own": {"like": "whole.json", "trian": {}}, "whole": minimal()},
            ValueError,
            "unknown key `trian`; did you mean `train`?",
        ),
        (
            {"own": {"like": "whole.json"}, "whole": minimal(trian={})},
            ValueError,
            "in `{0}/whole.json`, which `{0}/own.json` is like: unknown key `trian`; did you mean `train`?",
        ),
        (
            {"own": {"like": "whole.json"}, "whole": minimal(train=3)},
            TypeError,
            "in `{0}/whole.json`, which `{0}/own.json` is like: `train` must be an object, got 3 (int)",
        ),
        (
            {"own": {"like": "whole.json"}, "whole": [1]},
            TypeError,
            "in `{0}/whole.json`, which `{0}/own.json` is like: the config must be an object",
        ),
        (
            {"own": {"like": "whole.json", "train": {"like": "x"}}, "whole": minimal()},
            ValueError,
            "unknown key `train.like`",
        ),
        (
            {"own": {"like": "whole.json", "base": {"path": "gpt2"}}, "whole": minimal()},
            ValueError,
            "`base` takes exactly one of `name`, `path`, `run` and `architecture`, got path, architecture",
        ),
    ],
)
def test_a_like_is_refused(tmp_path, trees, kind, message):
    with pytest.raises(kind) as caught:
        configs.load(write(tmp_path, **trees))
    assert str(caught.value).startswith(message.format(tmp_path))
