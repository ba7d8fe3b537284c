"""Sweeps: each adapter of one program is that of its own run, and what a sweep leaves can be gone on with."""

import json
import shlex

import jax
import numpy as np
import pytest
import small_base
from runs import BASE, GENERATE, numbers_of, refused, snapshot, without_java as without_java
from stopping import lost_in, told_after
from sweeping import assert_is_that_of_its_own_run, facts_of, own_run, swept, words
from training import close, optax_promotes as optax_promotes

import lora_jax
from experiments.command_line import main
from experiments.config import Generate
from experiments.progress import read_metrics
from experiments.reports.figures import new_figure
from experiments.running import run as runs
from experiments.sweeps import figures, halving
from experiments.sweeps.over import combinations, parse
from experiments.tasks import generate
from lora_jax.interop import hf, peft


# Whole commands.
pytestmark = pytest.mark.slow

CONFIG = {
    "name": "tiny",
    "source": {"paper": None, "note": "a test"},
    "base": {"path": "base"},
    # Blocks of one length, so that a run needs one program.
    "data": {"task": "text", "train": "train.txt", "valid": "valid.txt", "seq_len": 16},
    "method": {"name": "LoRA", "rank": 2, "alpha": 4},
    "targets": ["attn/c_attn/kernel", "mlp/c_fc/kernel"],
    "train": {
        "steps": 6,
        "batch": 4,
        "lr": 0.03,
        "warmup": 1,
        "accumulate": 2,
        "label_smoothing": 0.1,
        "log_every": 1,
        "eval_every": 3,
        "eval_batches": 2,
        "checkpoint_every": 2,
    },
    "optimizer": {"name": "adamw_authors", "eps": 1e-4, "weight_decay": 0.1, "clip": 0.5},
}
E2E = {"task": "e2e", "train": "train.txt", "valid": "valid.txt", "seq_len": 144}
OVER = ["train.lr=0.03,0.1", "method.rank=2,4", "seed=0,1"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The config, its data and its base."""
    root = tmp_path_factory.mktemp("sweeps")
    data = generate.write(Generate(**GENERATE), root / "data")
    small_base.write(data / "base")
    (root / "tiny.json").write_text(json.dumps(CONFIG))
    return root


@pytest.fixture(scope="module")
def done(root):
    """Of two rates, two ranks and two seeds."""
    return swept(root, root / "done", OVER)


HALVED = ["train.lr=0.0,0.03,0.1", "method.rank=2,4"], "--halving", "0.5,0.67"


@pytest.fixture(scope="module")
def halved(root):
    return swept(root, root / "halved", *HALVED)


@pytest.mark.parametrize("name", combinations(parse(OVER)))
def test_each_adapter_is_that_of_its_own_run(root, done, monkeypatch, name):
    assert_is_that_of_its_own_run(root, done, monkeypatch, name)


def test_padded_ranks_stay_exactly_zero(done):
    """In A, in B and in both moments, with a decay and clipped gradients, while the own ranks move."""
    narrow = [member.values["method.rank"] == 2 for member in done.together.members]
    looked_at = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path((done.state.delta, done.state.opt_state))[0]:
        kind = jax.tree_util.keystr(path, simple=True, separator="/").rpartition("/")[2]
        if kind in ("a", "b"):
            ranks = np.moveaxis(leaf[np.asarray(narrow)], -1 if kind == "a" else -2, 0)
            assert len(ranks) == 4 and not ranks[2:].any() and ranks[:2].any()
            looked_at += 1
    assert looked_at == 2 * 2 * 3, "two layers, A and B, and three arrays of each"


def test_one_program_holds_the_base_once(done):
    """Its arguments are the base and what each adapter has of its own. Blocks of text have one width."""
    assert done.programs == 1
    facts = facts_of(done.directory)
    base, own = facts["base"]["bytes"], sum(facts["bytes"].values())
    arguments = facts["memory"]["argument"]
    assert own < base, "the test would say nothing"
    assert base + own <= arguments < base + own + 0.4 * base


def test_each_exported_adapter_computes_what_was_trained(root, done):
    """Of its own rank, with its own scale, on the base that its config names."""
    model, params = hf.load(root / "data" / "base")
    for place, member in enumerate(done.together.members):
        file = done.directory / "adapters" / member.name / "adapter"
        assert json.loads((file / "adapter_config.json").read_text())["r"] == member.values["method.rank"]
        single = done.together.single(place, done.state)
        merged = (lora_jax.merge(*pair) for pair in (peft.load(file, model, params), (params, single.delta)))
        close(*merged)


def test_the_best_is_a_run_to_be_finished(root, done, capsys, monkeypatch):
    """The command that the page names merges, decodes and reports it, and trains nothing again."""
    monkeypatch.setattr(runs.finish, "_in_pytorch", lambda *_: None)  # which `test_experiments_run` has
    facts = facts_of(done.directory)
    (name,) = facts["best"]
    command = facts["best"][name]["run"]
    assert command in (done.directory / "sweep.md").read_text()
    directory = done.directory / "best" / name
    assert (directory / "provenance.jsonl").read_text() == (done.directory / "provenance.jsonl").read_text()
    before = numbers_of(directory)
    assert main(shlex.split(command)[3:]) == 0
    assert "resuming after step 6" in capsys.readouterr().out and numbers_of(directory) == before
    place = done.together.names.index(name)
    _, params = hf.load(root / "data" / "base")
    close(
        hf.load(directory / "merged")[1],
        lora_jax.merge(params, done.together.single(place, done.state).delta),
    )
    assert main(["export", "--workdir", str(directory), "--to", str(root / "out"), "--format", "peft"]) == 0


def test_the_table(done):
    """The mean over seeds with their sample deviation, and the pictures of what was swept."""
    facts = facts_of(done.directory)
    assert len(facts["rows"]) == 8 and len(facts["table"]) == 4
    for line in facts["table"]:
        losses = [
            row["valid_loss"]
            for row in facts["rows"]
            if {key: row["values"][key] for key in line["values"]} == line["values"]
        ]
        np.testing.assert_allclose(line["mean"], np.mean(losses))
        np.testing.assert_allclose(line["deviation"], np.std(losses, ddof=1))
    least = min(facts["table"], key=lambda line: line["mean"])
    page = (done.directory / "sweep.md").read_text()
    assert f"**{least['mean']:.4f} ± {least['deviation']:.4f}**" in page and page.count("**") == 2
    for name in ("rate", "rank", "steps"):
        assert (done.directory / "figures" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_sweeps_are_compared(root, done, halved, tmp_path, capsys, monkeypatch):
    """The best of each in one table, and all rates in one picture; not beside a run."""
    sweeps = [str(done.directory), str(halved.directory)]
    assert main(["report", *sweeps, "--figure", str(tmp_path / "rates.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    best = min(facts_of(done.directory)["table"], key=lambda line: line["mean"])
    assert lines[2].startswith(f"| {done.directory} | LoRA | ")
    assert f"| 4 | train.lr {best['values']['train.lr']:g}, method.rank " in lines[2]
    assert f"| {best['mean']:.4f} ± {best['deviation']:.4f} |" in lines[2]
    assert (tmp_path / "rates.png").read_bytes()[:4] == b"\x89PNG"
    line = refused(capsys, monkeypatch, "report", *sweeps, tmp_path)
    assert f"`{tmp_path}` is no finished sweep" in line
    assert "`--values` is of runs" in refused(capsys, monkeypatch, "report", *sweeps, "--values", "a.png")


def test_what_diverges_leaves_room_for_the_others(tmp_path):
    """Drawn at the upper edge, and the axis ends where the others do."""
    drawn = {}
    for worst in (2.0, 9e3):
        losses = {1e-4: 1.5, 1e-3: 1.2, 1e-2: worst}
        rows = [{"first_valid_loss": 3.0, "values": {"train.lr": rate}} for rate in losses]
        table = [{"values": {"train.lr": rate}, "mean": loss} for rate, loss in losses.items()]
        table = [{**line, "deviation": None, "dropped": None} for line in table]
        facts = {"over": {"train.lr": list(losses)}, "rows": rows, "table": table}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(figures, "new_figure", lambda: drawn.setdefault(worst, new_figure()))
            figures.draw_rates({"a": facts}, tmp_path / "rates.png")
    for worst, (_, axes) in drawn.items():
        assert axes.get_ylim()[1] < 3
        assert ("worse than the untouched base" in axes.get_legend_handles_labels()[1]) == (worst > 3)


def test_again_is_already_finished(root, done, capsys, monkeypatch):
    before = snapshot(done.directory)
    assert main(words(root, done.directory, OVER)) == 0
    assert "already finished" in capsys.readouterr().out
    line = refused(capsys, monkeypatch, *words(root, done.directory, ["seed=0,1"]))
    assert "holds a run of another config: `sweep.over" in line
    line = refused(capsys, monkeypatch, "run", root / "tiny.json", "--workdir", done.directory)
    assert "holds a run of another config: `sweep`" in line
    assert snapshot(done.directory) == before


@pytest.mark.parametrize(
    "over, sets",
    [
        (["optimizer.weight_decay=0.0,0.5", "method.alpha=4,1"], ['method={"name": "DoRA", "rank": 2}']),
        (
            ["train.lr=0.01,0.1", "seed=0,1"],
            ["data=" + json.dumps(E2E), "train.pack=2", "train.steps=2", "quantize=int8"],
        ),
        (["train.lr=0.01,0.1", "method.rank=4,2"], ["mesh.data=2", "mesh.tensor=2"]),
        (["train.lr=0.01,0.03"], ['method={"name": "Full"}', 'targets=["attn/.*", "ln_f/.*"]']),
        (["train.lr=0.01,0.1"], ['method={"name": "LoRA", "rank": 2, "dropout": 0.3}']),
        (["data.train=train.txt,other.txt", "data.valid=valid.txt,test.txt"], []),
        (
            ["data.train=train.txt,other.txt", "method.rank=1,2"],
            ["data=" + json.dumps(E2E), 'baseline={"name": "PrefixLayer", "prefix": 2, "infix": 1}'],
        ),
    ],
    ids=["DoRA", "packed", "mesh", "Full", "dropout", "data", "prefix"],
)
def test_what_else_may_differ_or_be_common(root, tmp_path, monkeypatch, over, sets):
    """The last adapter of each sweep is that of its own run."""
    other = (root / "data" / "train.txt").read_text().splitlines(keepends=True)
    (root / "data" / "other.txt").write_text("".join(other[5:]))
    more = [word for item in sets for word in ("--set", item)]
    done = swept(root, tmp_path / "sweep", over, *more)
    assert_is_that_of_its_own_run(root, done, monkeypatch, done.together.names[-1], *sets)


def test_resume_is_bit_for_bit(root, halved, tmp_path, capsys):
    """Lost between two checkpoints, and told to stop before, at and after the step at which adapters are
    dropped: the sweep ends as the uninterrupted one.
    """
    with lost_in(2):
        main(words(root, tmp_path / "parts", *HALVED))
    for step in (2, 3, 5):
        with told_after(step):
            assert main(words(root, tmp_path / "parts", *HALVED)) == 0
        assert f"stopped after step {step}, as asked" in capsys.readouterr().out
    parts = swept(root, tmp_path / "parts", *HALVED)
    assert numbers_of(halved.directory) == numbers_of(parts.directory), "each step is told once"
    jax.tree.map(np.testing.assert_array_equal, halved.state[:2], parts.state[:2])
    rows = [facts_of(each.directory)["rows"] for each in (halved, parts)]
    assert rows[0] == rows[1]


def test_halving_keeps_the_best(root, halved, monkeypatch):
    """Three of six go first, then one of three: those with the higher losses at that step."""
    facts, lines = facts_of(halved.directory), read_metrics(halved.directory / "metrics.jsonl")
    dropped = {row["name"]: row["dropped"] for row in facts["rows"]}
    assert sorted(dropped.values(), key=str) == [3, 3, 3, 4, None, None]
    assert all(dropped[f"lr=0,rank={rank}"] == 3 for rank in (2, 4)), "these learn nothing"
    for step in (3, 4):
        (losses,) = (line["valid_loss"] for line in lines if line["step"] == step and "valid_loss" in line)
        gone = [losses[name] for name in losses if dropped[name] == step]
        assert min(gone) > max(losses[name] for name in losses if dropped[name] != step)
        trained = [line["loss"] for line in lines if line["step"] > step and "loss" in line]
        assert all(dropped[name] is None or dropped[name] > step for loss in trained for name in loss)
    best = min(facts["rows"], key=lambda row: row["valid_loss"])["name"]
    assert list(facts["best"]) == [best] and dropped[best] is None
    page = (halved.directory / "sweep.md").read_text()
    assert page.count("dropped after step 3") == 3 and "dropped 3 of 6 adapters" in page
    # Evaluated once more than a run is, where adapters were dropped.
    place = halved.together.names.index(best)
    state, _ = own_run(root, monkeypatch, halved.together.members[place].values)
    close(halved.together.single(place, halved.state).delta, state.delta, 5e-6)


def test_one_that_diverges_stops_no_other(root, tmp_path, monkeypatch):
    """A run of its own would end with an error, and here it is a row without a loss."""
    over = ["train.lr=0.03,1e38"]
    done = swept(root, tmp_path / "sweep", over, "--set", 'optimizer={"name": "adamw"}')
    fine, lost = facts_of(done.directory)["rows"]
    assert lost["lost"] is not None and lost["valid_loss"] is None and fine["lost"] is None
    assert_is_that_of_its_own_run(root, done, monkeypatch, fine["name"], 'optimizer={"name": "adamw"}')
    page = (done.directory / "sweep.md").read_text()
    assert f"{lost['name']} is lost: step {lost['lost']}: " in page and f"not finite: {lost['name']}" in page
    assert list(facts_of(done.directory)["best"]) == [fine["name"]]


REFUSED = {
    "no values": (["train.lr="], [], "`--over` takes KEY=VALUE,VALUE, such as train.lr=1e-4,3e-4"),
    "another key": (
        ["targets=a,b"],
        [],
        "`--over targets` cannot be swept in one program, which takes train.lr, optimizer.weight_decay, "
        "method.rank, method.alpha, seed",
    ),
    "a key that is near": (["train.lrr=1,2"], [], "; did you mean `train.lr`?"),
    "one adapter": (["seed=0"], [], "`--over` gives one adapter"),
    "a value twice": (["seed=0,1,0"], [], "has 0 twice"),
    "a key twice": (["seed=0,1", "seed=2"], [], "`--over seed` is given twice"),
    "a wrong type": (["train.lr=1e-3,fast"], [], '`train.lr` must be a number, got "fast" (a string)'),
    "a rank too large": (["method.rank=2,99"], [], "`rank` is 99"),
    "a rank without padding": (
        ["method.rank=2,4"],
        ['method={"name": "PiSSA"}'],
        "`--over method.rank` is for the methods LoRA and DoRA, and `method.name` is PiSSA",
    ),
    "another frozen": (
        ["seed=0,1"],
        ['method={"name": "LoRAFA", "rank": 2}'],
        "`--over seed` draws what LoRAFA keeps beside the base",
    ),
    "another base": (
        ["seed=0,1"],
        ["base=" + json.dumps(BASE["base"])],
        "`--over seed` would draw another base",
    ),
    "a checkpoint of each": (["seed=0,1"], ["train.result=best"], '`train.result` is "best"'),
    "another length": (["data.seq_len=8,9"], [], "`--over data.seq_len` cannot be swept"),
    "no fraction": (["seed=0,1"], ["--halving", "half"], "`--halving` takes fractions of the steps"),
    "no step": (["seed=0,1"], ["--halving", "0.5,1"], "`--halving` has 1, which of 6 steps is none between"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line(root, tmp_path, capsys, monkeypatch, case):
    over, sets, message = REFUSED[case]
    more = sets if sets[:1] == ["--halving"] else [word for item in sets for word in ("--set", item)]
    assert message in refused(capsys, monkeypatch, *words(root, tmp_path / "work", over, *more))
    assert not (tmp_path / "work").exists()


def test_several_processes_are_refused(root, tmp_path, capsys, monkeypatch):
    """Each would train the same, in the same directory."""
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    line = refused(capsys, monkeypatch, *words(root, tmp_path / "work", ["seed=0,1"]))
    assert "a sweep runs in one process, and several were started" in line


def test_losses_of_other_data_are_not_compared():
    """Each data keeps its better half, and seeds stay together by their mean."""
    values = {
        f"{data} {lr} {seed}": {"data.train": data, "train.lr": lr, "seed": seed}
        for data in ("a", "b")
        for lr in (1, 2)
        for seed in (0, 1)
    }
    losses = dict(zip(values, [1.0, 1.0, 0.5, 2.0, 9.0, 8.0, None, 1.0], strict=True))
    assert halving.worse_half(losses, values) == ["a 2 0", "a 2 1", "b 2 0", "b 2 1"]
    assert halving.worse_half({"a 1 0": 3.0}, values) == [], "the last one stays"
    assert halving.worse_half(dict.fromkeys(values), values)[:1] == ["a 2 0"], "all lost: half of them goes"
