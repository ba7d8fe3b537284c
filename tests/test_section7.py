"""`subspaces`: Section 7 of LoRA's paper, of adapters in the forms in which runs, sweeps and PEFT have them.
The numbers are those of `lora_jax.subspaces`, which `test_subspaces.py` compares with dense decompositions.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_deltas import random_like
from runs import refused, root as root, without_java as without_java
from training import optax_promotes as optax_promotes

import lora_jax
from experiments.command_line import main
from lora_jax import DoRA, Full, LoRA, VeRA
from lora_jax.interop import hf, peft
from lora_jax.models import GPT2, GPT2Config
from lora_jax.subspaces import amplification, similarity


QKV, MLP = "attn/c_attn/kernel", "mlp/c_fc/kernel"
LAYERS = 3


@pytest.fixture(scope="module")
def base():
    """A GPT-2 of three layers, and its parameters."""
    model = GPT2(GPT2Config(vocab_size=40, n_positions=8, n_embd=16, n_layer=LAYERS, n_head=2))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return model, jax.tree.map(lambda leaf: leaf + 0.1, params)


def adapted(params, method, seed, targets=(QKV, MLP)):
    """Both trees of an adapter that has been trained, as far as anybody can tell."""
    methods = {pattern: method for pattern in targets} if not isinstance(targets, dict) else targets
    frozen, delta = lora_jax.lorafy(params, methods)
    return frozen, jax.tree.map(lambda array: 0.3 * array, random_like(delta, seed))


def as_run(directory, base, frozen, delta):
    """What a run leaves."""
    model, params = base
    hf.save(directory / "merged", model, lora_jax.merge(frozen, delta))
    peft.save(directory / "adapter", model, frozen, delta, base="nowhere")
    (directory / "report.md").write_text("")
    return directory


def tables(printed):
    """The rows of the two printed tables."""
    found = []
    for block in printed.split("\n\n"):
        if block.startswith("|"):
            head, _, *rows = (
                [cell.strip() for cell in line.strip("|").split(" | ")] for line in block.splitlines()
            )
            found.append([dict(zip(head, row, strict=True)) for row in rows])
    return found


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """Of ranks 2 and 4, the directories and both trees of each."""
    root, found = tmp_path_factory.mktemp("section7"), {}
    for rank, targets in ((2, (QKV, MLP)), (4, (MLP, QKV, "attn/c_proj/kernel"))):
        trees = adapted(base[1], LoRA(rank=rank, alpha=3), rank, targets)
        found[rank] = as_run(root / f"r{rank}", base, *trees), *trees
    return found


@pytest.mark.parametrize("of", ["A", "out"])
def test_the_tables(runs, capsys, of):
    """Means over the layers, and the numbers of the layer in the middle; of what both adapt."""
    (one, *trees), (two, *others) = runs.values()
    assert main(["subspaces", str(one), str(two), "--of", of]) == 0
    shared, amplified = tables(capsys.readouterr().out)
    phi = similarity(trees[1], others[1], of=of)
    assert [row["weights"] for row in shared] == [f"h/*/{QKV}", f"h/*/{MLP}"]
    for row, name in zip(shared, (QKV, MLP), strict=True):
        mean = np.mean([phi[f"h/{layer}/{name}"] for layer in range(LAYERS)], axis=0)
        assert (row["layers"], row["ranks"]) == ("3", "2, 4")
        for words, (i, j) in {"phi(1, 1)": (0, 0), "phi(r, r)": (1, 1), "phi of all": (1, 3)}.items():
            value, chance = row[words].removesuffix(")").split(" (")
            assert float(value) == pytest.approx(mean[i, j], abs=6e-4)
            assert 0 <= float(chance) <= 1 and chance != value
    assert [(row["weight"], row["adapter"]) for row in amplified] == [
        (f"h/1/{name}", adapter) for name in (QKV, MLP) for adapter in ("r2", "r4")
    ]
    for trained, adapter, rank in ((trees, "r2", "2"), (others, "r4", "4")):
        rows = {row["weight"]: row for row in amplified if row["adapter"] == adapter}
        found = {leaf.path: leaf for leaf in amplification(*trained)}
        for name in (QKV, MLP):
            row, leaf = rows[f"h/1/{name}"], found[f"h/1/{name}"]
            assert row["rank"] == rank
            columns = ("‖ΔW‖", "‖W‖", "‖UᵀWV‖ of ΔW", "of W", "‖ΔW‖ / ‖UᵀWV‖")
            wanted = (leaf.update, leaf.weight, leaf.along_update, leaf.along_weight, leaf.factor)
            assert [float(row[column]) for column in columns] == pytest.approx(wanted, abs=6e-3)
            mean = np.mean([found[f"h/{layer}/{name}"].factor for layer in range(LAYERS)])
            assert float(row["mean of layers"]) == pytest.approx(mean, abs=6e-3)


def test_the_figure(runs, tmp_path, monkeypatch):
    """A row for each kind of weight: the layer that is asked for, the mean, and random matrices."""
    from matplotlib.figure import Figure

    drawn, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *a, **k: (drawn.append(figure), save(figure, *a, **k))
    )
    (one, *trees), (two, *others) = runs.values()
    file = tmp_path / "subspaces.png"
    assert main(["subspaces", str(one), str(two), "--layer", "2", "--leaf", MLP, "--figure", str(file)]) == 0
    assert file.read_bytes().startswith(b"\x89PNG")
    *maps, bar = drawn[0].axes
    assert [axes.get_title() for axes in maps] == ["layer 2", "mean of 3 layers", "random matrices"]
    phi = similarity(trees[1], others[1])
    np.testing.assert_allclose(maps[0].images[0].get_array(), phi[f"h/2/{MLP}"], atol=1e-5)
    assert maps[0].get_ylabel() == "mlp/c_fc, i" and bar.get_ylabel() == "phi(i, j)"
    assert all(axes.images[0].get_clim() == (0, 1) for axes in maps)
    assert drawn[0].get_suptitle() == "directions of A: i of r2, j of r4"


def test_query_and_value_of_a_fused_weight(base, tmp_path, capsys):
    """The blocks that PEFT's file holds as one adapter, apart again."""
    model, params = base
    directories = []
    for rank, seed in ((1, 0), (2, 1)):
        trees = adapted(params, LoRA(rank=rank, blocks=(True, False, True)), seed, (QKV,))
        directories.append(as_run(tmp_path / f"seed{seed}", base, *trees))
    assert main(["subspaces", *map(str, directories), "--leaf", "c_attn/kernel"]) == 0
    shared, amplified = tables(capsys.readouterr().out)
    assert [(row["weights"], row["ranks"]) for row in shared] == [
        (f"h/*/{QKV}[0]", "1, 2"),
        (f"h/*/{QKV}[2]", "1, 2"),
    ]
    assert {row["weight"] for row in amplified} == {f"h/1/{QKV}[0]", f"h/1/{QKV}[2]"}
    assert main(["subspaces", *map(str, directories), "--leaf", r"c_attn/kernel\[2\]"]) == 0
    assert [row["weights"] for row in tables(capsys.readouterr().out)[0]] == [f"h/*/{QKV}[2]"]


def _number(cell):
    """That of a cell, before its remark, or the cell where it is none."""
    try:
        return float(cell.partition(" ")[0])
    except ValueError:
        return cell


def test_adapters_without_a_merged_model(runs, base, tmp_path, capsys):
    """As a sweep leaves them, and PEFT: on the base that they name, or that is given. The same numbers."""
    model, params = base
    hf.save(tmp_path / "base", model, params)
    (one, *_), (two, *_) = runs.values()
    assert main(["subspaces", str(one), str(two)]) == 0
    wanted = tables(capsys.readouterr().out)
    places = []
    for rank, (_, frozen, delta) in runs.items():
        places.append(tmp_path / "swept" / "adapters" / f"rank={rank}")
        peft.save(places[-1] / "adapter", model, frozen, delta, base=str(tmp_path / "base"))
    names = {"r2": "rank=2", "r4": "rank=4"}
    for row in wanted[1]:
        row["adapter"] = names[row["adapter"]]
    assert main(["subspaces", *map(str, places)]) == 0
    for rows, expected in zip(tables(capsys.readouterr().out), wanted, strict=True):
        for row, other in zip(rows, expected, strict=True):
            assert row.keys() == other.keys()
            for column, cell in row.items():
                assert _number(cell) == pytest.approx(_number(other[column]), abs=0.011), column
    given = [str(place / "adapter") for place in places]
    assert main(["subspaces", *given, "--base", str(tmp_path / "base")]) == 0
    named = tables(capsys.readouterr().out)
    assert [row["adapter"] for row in named[1]][:2] == ["rank=2/adapter", "rank=4/adapter"]
    assert main(["subspaces", str(tmp_path / "swept"), given[0]]) == 1
    line = capsys.readouterr().err
    assert "is a sweep of 2 adapters: pass one of them, such as" in line and "adapters/rank=2." in line


def test_other_methods_become_lora(base, tmp_path, capsys):
    """Exactly; weights that train whole are passed over."""
    model, params = base
    trees = adapted(params, None, 0, {QKV: VeRA(rank=3), "ln_f/bias": Full()})
    vera = tmp_path / "vera"
    hf.save(vera / "merged", model, lora_jax.merge(*trees))
    peft.save(vera / "adapter", model, *trees)
    lora = as_run(tmp_path / "lora", base, *adapted(params, LoRA(rank=2), 1, (QKV,)))
    assert main(["subspaces", str(vera), str(lora)]) == 0
    ((shared,), amplified) = tables(capsys.readouterr().out)
    assert shared["ranks"] == "3, 2" and [row["rank"] for row in amplified] == ["3", "2"]
    assert amplified[0]["‖W‖"] == amplified[1]["‖W‖"]


def test_what_is_refused(runs, base, tmp_path, capsys, monkeypatch):
    model, params = base
    (one, *_), (two, *_) = runs.values()
    say = lambda *words: refused(capsys, monkeypatch, "subspaces", *words)
    assert "has no adapter/ with an adapter_config.json" in say(one, tmp_path)
    line = say(one, two, "--leaf", "q_proj/kernel")
    assert "`--leaf` is 'q_proj/kernel', which matches none of the weights that both adapt: h/*/attn" in line
    assert "`--leaf` '(' is not a regular expression" in say(one, two, "--leaf", "(")
    assert f"`--layer` is 7, and h/*/{QKV} has the layers 0, 1, 2" in say(one, two, "--layer", "7")
    dora = as_run(tmp_path / "dora", base, *adapted(params, DoRA(rank=2), 0, (QKV,)))
    assert "is no LoRA: its magnitude multiplies W too" in say(one, dora)
    another = model, jax.tree.map(lambda leaf: leaf * 1.5, params)
    other = as_run(tmp_path / "other", another, *adapted(another[1], LoRA(rank=2), 0, (QKV,)))
    assert "were trained on other weights of the same shapes" in say(one, other)
    untrained = lora_jax.lorafy(params, QKV, method=LoRA(rank=2))
    start = as_run(tmp_path / "start", base, *untrained)
    assert "adds nothing at 'h/0/attn/c_attn/kernel', where B is zero" in say(one, start)


@pytest.mark.slow
def test_of_two_finished_runs(root, tmp_path, capsys):
    """From a config to the tables: of a rank of 2, and of 4."""
    config = json.loads((root / "tiny.json").read_text())
    config |= {
        "name": "wider",
        "compare_full": False,
        "base": {"path": str(root / "done" / "base" / "merged")},
    }
    config["method"] |= {"rank": 4}
    config["decode"] |= {"before": False, "shown": 0}
    (tmp_path / "wider.json").write_text(json.dumps(config))
    assert main(["run", str(tmp_path / "wider.json"), "--workdir", str(tmp_path / "wider")]) == 0
    facts = json.loads((tmp_path / "wider" / "report.json").read_text())
    assert facts["peak_memory"]["process"] > 50_000_000 and facts["peak_memory"]["device"] is None
    assert "| peak memory | " in (tmp_path / "wider" / "report.md").read_text()
    capsys.readouterr()
    assert main(["subspaces", str(root / "done"), str(tmp_path / "wider")]) == 0
    shared, amplified = tables(capsys.readouterr().out)
    assert [row["weights"] for row in shared] == [f"h/*/{QKV}[0]", f"h/*/{QKV}[2]"]
    assert [row["rank"] for row in amplified] == ["2", "4"] * 2
    assert len({row["‖W‖"] for row in amplified[:2]}) == 1
