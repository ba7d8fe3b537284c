"""The README's Python runs as it stands, top to bottom in one namespace, and the names in its prose exist.

That its commands, make targets, extras and files exist is in test_packaging.py.
"""

import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import methods
from lora_jax._tree.nodes import Adapter, is_node


_REPOSITORY = Path(__file__).resolve().parent.parent
_README = (_REPOSITORY / "README.md").read_text(encoding="utf-8")
_BLOCKS = [
    (_README.count("\n", 0, match.start(1)), match.group(1))
    for match in re.finditer(r"^```python\n(.*?)^```", _README, re.MULTILINE | re.DOTALL)
]
_PROSE = re.sub(r"^```.*?^```", "", _README, flags=re.MULTILINE | re.DOTALL)
_IN_BACKTICKS = re.findall(r"`([^`\n]+)`", _PROSE)


def _run(number: int, namespace: dict) -> None:
    line, body = _BLOCKS[number]
    exec(
        compile("\n" * line + body, str(_REPOSITORY / "README.md"), "exec"), namespace
    )  # the README's own line numbers


def _size(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.fixture
def beside_a_model(tmp_path, monkeypatch):
    """A working directory that holds the `gpt2` and the `roberta-base` which the README loads: tiny ones."""
    from lora_jax.interop import hf
    from lora_jax.models import GPT2, GPT2Config, Roberta, RobertaConfig

    gpt2 = GPT2(GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=2, n_head=2))
    hf.save(tmp_path / "gpt2", gpt2, gpt2.init(jax.random.key(0), jnp.zeros((1, 1), int))["params"])
    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    roberta = Roberta(RobertaConfig.named("roberta-base", **sizes))
    hf.save(
        tmp_path / "roberta-base", roberta, roberta.init(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_first_example_stands_alone_and_trains(relaxed_promotion):
    namespace: dict = {}
    _run(0, namespace)
    assert namespace["loss"] < 0.5 * np.log(10), "the labels are a tenth each: chance is log 10"
    moments = _size(namespace["opt_state"]) - 1  # a counter
    assert moments == 2 * lora_jax.count(namespace["delta"])
    before, after = (
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), namespace[name]) for name in ("params", "merged")
    )
    assert before == after


@pytest.mark.slow
def test_every_block_runs(beside_a_model, relaxed_promotion, capsys):
    pytest.importorskip("equinox")
    namespace: dict = {}
    for number in range(len(_BLOCKS)):
        _run(number, namespace)
    printed = capsys.readouterr().out
    assert "low-rank" in printed and "formed " not in printed.replace("FLOPs formed ", "")
    assert "The nearest paths are 'hidden/0/kernel'" in printed
    assert "ΔW lost" in printed
    for library, linears in [("linen", 2), ("nnx", 1), ("eqx", 3)]:
        adapters = [
            leaf
            for leaf in jax.tree.leaves(namespace[f"delta_{library}"], is_leaf=is_node)
            if isinstance(leaf, Adapter)
        ]
        assert len(adapters) == linears, library
    for name in ("gpt2", "roberta"):
        assert (beside_a_model / f"{name}-merged" / "model.safetensors").is_file()


def test_names_of_the_library_exist():
    dotted = {name for text in _IN_BACKTICKS for name in re.findall(r"\blora_jax(?:\.[a-z_]+)+", text)}
    assert {"lora_jax.optim.labels", "lora_jax.models"} <= dotted
    for name in sorted(dotted):
        if (
            not (_REPOSITORY / name.replace(".", "/")).exists()
            and not (_REPOSITORY / f"{name.replace('.', '/')}.py").exists()
        ):
            owner = lora_jax
            for part in name.split(".")[1:]:
                owner = getattr(owner, part)


def test_calls_in_the_prose_are_calls_of_the_library():
    """Also that every public verb and every method has been mentioned."""
    called = {name for text in _IN_BACKTICKS for name in re.findall(r"^(?:lora_jax\.)?([A-Za-z_]+)\(", text)}
    assert called, "the README calls nothing"
    for name in called - {"from_pretrained"}:
        assert callable(getattr(lora_jax, name)), name
    public = {
        name for name, value in vars(lora_jax).items() if not name.startswith("_") and callable(value)
    } - {"Lorafied", "MaterializeError"}
    missing = {name for name in public if not re.search(rf"\b{name}\b", _README)}
    assert not missing
    table = _README.partition("## Methods")[2].partition("\n## ")[0]
    exist = {name for name, value in vars(methods).items() if inspect.isclass(value)}
    assert set(re.findall(r"^\| `(\w+)\(", table, re.MULTILINE)) == exist | {"quantize"}


def test_tests_that_the_readme_names_exist():
    named = {text for text in _IN_BACKTICKS if re.fullmatch(r"test_\w+", text)}
    defined = {
        name
        for file in (_REPOSITORY / "tests").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text("utf-8"), re.MULTILINE)
    }
    assert named <= defined, named - defined


def test_configs_that_ship_are_named():
    shipped = {
        f"experiments/configs/{file.name}"
        for file in (_REPOSITORY / "experiments" / "configs").glob("*.json")
    }
    assert not {name for name in shipped if name not in _README}
