"""Every kind of bad input to the command line is one line, and nothing is written."""

import errno
import json
import shutil
from pathlib import Path

import jax
import pytest
import small_base
from runs import BASE, GENERATE, LORA, refused, snapshot, without_java as without_java
from stopping import lost_in
from training import optax_promotes as optax_promotes

from experiments import config as configs
from experiments.command_line import main
from experiments.config import Base, Generate, Mesh, Precision
from experiments.running import base as bases
from experiments.running.run import run
from experiments.tasks import generate
from experiments.training.sharded import make_mesh


BAD_ARGUMENTS = {
    "unknown key": (["--set", "train.lrr=1"], "unknown key `train.lrr`; did you mean `train.lr`?"),
    "wrong type": (["--set", "train.lr=fast"], '`train.lr` must be a number, got "fast" (a string)'),
    "no config": (["--config", "nowhere.json"], "no config file `nowhere.json`"),
    "missing data": (
        ["--set", "data.train=absent.txt"],
        "/absent.txt`. The config's paths start at `{data}`: pass `--data DIR`, or set LORA_JAX_DATA",
    ),
    "missing data set": (
        ["--set", "data.dataset=a/b/c"],
        "The config's paths start at `{data}`: pass `--data DIR`, or set LORA_JAX_DATA",
    ),
    "a file that is not generated": (
        ["--set", "data.valid=absent.txt", "--set", "generate=" + json.dumps(GENERATE)],
        "`generate` makes train.txt, valid.txt and test.txt",
    ),
    "empty data": (["--set", "data.train=empty.txt"], "the data set `empty.txt` is empty"),
    "no separator": (["--set", "data.valid=bare.txt"], "row 2: expected exactly one `||`"),
    "too long for seq_len": (["--set", "data.seq_len=20"], "more than `data.seq_len` (20)"),
    "too long for the model": (
        ["--set", "data.seq_len=500"],
        "`data.seq_len` (500) is longer than the model, which has 160 positions",
    ),
    "too long to decode": (
        ["--set", "decode.max_tokens=150"],
        "`decode.max_tokens` (150) exceed the model's 160 positions",
    ),
    "end of two tokens": (
        ["--set", 'decode.end=["no one"]'],
        "`decode.end` has 'no one', which the tokenizer encodes as",
    ),
    "missing base": (["--set", 'base={"path": "/absent"}'], "`base.path`: no directory"),
    "missing base below": (
        ["--set", 'base={"path": "a/b/c"}'],
        "a/b/c`. The config's paths start at `{data}`: pass `--data DIR`",
    ),
    "missing tokenizer": (
        [
            "--set",
            "base=" + json.dumps({"architecture": BASE["base"]["architecture"], "tokenizer": "a"}),
        ],
        "`base.tokenizer`: no directory `{data}/a`. The config's paths start at",
    ),
    "unreachable hub": (["--set", 'base={"path": "gpt2-medium"}'], "the hub does not give it"),
    "truncated safetensors": (["--set", 'base={"path": "truncated"}'], "model.safetensors"),
    "no target": (["--set", 'targets=["c_attn"]'], "`targets` pattern 'c_attn' matches no leaf"),
    "rank too large": (["--set", "method.rank=99"], "`rank` is 99"),
    "mesh too large": (
        ["--set", "mesh.tensor=16"],
        "needs 16 devices, but there are 8. Set smaller sizes in `mesh`, or try it on virtual ones: set the "
        "environment variable XLA_FLAGS=--xla_force_host_platform_device_count=16",
    ),
    "key of another section": (["--set", "lr=1e-3"], "unknown key `lr`; did you mean `train.lr`?"),
    "mesh that does not divide": (["--set", "mesh.tensor=5"], "does not divide"),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """The two configs; `data`, with bases to be refused beside a good one; the config of a run that would
    use them.
    """
    inputs = tmp_path_factory.mktemp("inputs")
    data = generate.write(Generate(**GENERATE), inputs / "data")
    (data / "empty.txt").write_text("")
    (data / "bare.txt").write_text("name : A||A .\nno separator\n")
    small_base.write(data / "base")
    (data / "truncated").mkdir()
    for path in (data / "base").iterdir():
        content = path.read_bytes()
        (data / "truncated" / path.name).write_bytes(
            content[: len(content) // 2] if path.suffix == ".safetensors" else content
        )
    (inputs / "base.json").write_text(json.dumps(BASE))
    (inputs / "tiny.json").write_text(json.dumps(LORA))
    (inputs / "plain.json").write_text(json.dumps({**LORA, "base": {"path": "base"}, "generate": None}))
    return inputs


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_input_is_one_line(inputs, tmp_path, capsys, monkeypatch, case):
    arguments, message = BAD_ARGUMENTS[case]
    config = [] if "--config" in arguments else ["--config", inputs / "plain.json"]
    line = refused(
        capsys,
        monkeypatch,
        "run",
        *config,
        "--data",
        inputs / "data",
        "--workdir",
        tmp_path / "work",
        *arguments,
    )
    assert message.format(data=inputs / "data") in line
    written = [
        path for path in (tmp_path / "work").rglob("*") if path.is_file() and path.parent.name != "data"
    ]
    assert not written, "only what `generate` makes"


def test_paths_start_where_the_user_is(inputs, tmp_path, capsys, monkeypatch):
    """Unless `--data` or the variable says otherwise; no place on the disk is looked at by itself."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LORA_JAX_DATA", raising=False)
    arguments = ["run", inputs / "plain.json", "--workdir", tmp_path / "work"]
    assert "no data file `train.txt`. The config's paths start at `.`" in refused(
        capsys, monkeypatch, *arguments
    )
    monkeypatch.setenv("LORA_JAX_DATA", str(inputs))
    assert f"no data file `{inputs}/train.txt`" in refused(capsys, monkeypatch, *arguments)


def test_a_place_that_cannot_be_written_to(inputs, tmp_path, capsys, monkeypatch):
    """Is found before anything is read, and is no `[Errno 30]`."""
    (tmp_path / "file").write_text("")
    arguments = ["run", inputs / "absent.json", "--workdir", tmp_path / "file" / "work"]
    (inputs / "absent.json").write_text(json.dumps({**LORA, "base": {"path": "./absent"}}))
    line = refused(capsys, monkeypatch, *arguments)
    assert (
        f"`--workdir` {tmp_path / 'file' / 'work'} cannot be written to ({tmp_path / 'file'} is a file)"
        in line
    )

    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(tmp_path))

    with monkeypatch.context() as patch:
        patch.setattr("tempfile.TemporaryFile", read_only)
        line = refused(capsys, monkeypatch, "run", inputs / "absent.json", "--workdir", tmp_path / "work")
    assert f"cannot be written to ({tmp_path}: Read-only file system): choose another" in line
    with monkeypatch.context() as patch:  # of any command
        patch.setattr("experiments.reports.table.table", read_only)
        line = refused(capsys, monkeypatch, "report", tmp_path)
    assert line == f"error: `{tmp_path}`: Read-only file system: choose another place."


def test_a_base_beside_the_config(inputs, tmp_path, capsys, monkeypatch):
    (tmp_path / "config.json").write_text(
        json.dumps({**LORA, "base": {"path": "./bases/tiny"}, "compare_full": False})
    )
    arguments = [
        "run",
        str(tmp_path / "config.json"),
        "--data",
        str(inputs),
        "--workdir",
        str(tmp_path / "run"),
    ]
    line = refused(capsys, monkeypatch, *arguments)
    assert f"no directory `{tmp_path / 'bases' / 'tiny'}`" in line
    shutil.copytree(inputs / "data" / "base", tmp_path / "bases" / "tiny")
    with lost_in(1):
        run(configs.load(tmp_path / "config.json"), tmp_path / "config.json", inputs, tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").is_file()


def test_what_an_adapter_calls_its_base(inputs, monkeypatch):
    """A path that is right from every directory, or the name on the hub."""
    monkeypatch.chdir(inputs)

    def name(path):
        places = bases.Places(Path("data"), Path("."), Path("bases"), None, Path("tokenizer"))
        return bases.load(Base(path=path), places, jax.random.key(0), make_mesh(Mesh()), Precision()).name

    whole = str((inputs / "data" / "base").resolve())
    assert name("base") == name("./data/base") == whole
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: whole)
    assert name("someone/model") == "someone/model"


@pytest.mark.parametrize(
    "override, message",
    [
        ('targets=["attn/c_atn/kernel"]', "matches no leaf"),
        ("data.seq_len=161", "`data.seq_len` (161) is longer than the model, which has 160 positions"),
        ("method.rank=9", "`rank` is 9, above min(in, out) = 8"),
    ],
)
def test_what_a_base_would_not_fit_is_found_before_it_is_trained(
    inputs, tmp_path, capsys, monkeypatch, override, message
):
    line = refused(
        capsys, monkeypatch, "run", inputs / "tiny.json", "--workdir", tmp_path / "work", "--set", override
    )
    assert message in line
    assert not (tmp_path / "work").exists(), "nothing was written"


def test_another_config_is_refused(inputs, tmp_path, capsys, monkeypatch):
    """Whether it has finished or not."""
    (tmp_path / "config.json").write_text(json.dumps(configs.to_json(configs.load(inputs / "tiny.json"))))
    for _ in range(2):
        before = snapshot(tmp_path)
        line = refused(
            capsys, monkeypatch, "run", inputs / "tiny.json", "--workdir", tmp_path, "--set", "train.lr=0.5"
        )
        assert "holds a run of another config: `train.lr` was 0.01 and is now 0.5" in line
        assert snapshot(tmp_path) == before
        (tmp_path / "report.md").write_text("")


def test_a_directory_of_something_else_is_refused(inputs, tmp_path, capsys, monkeypatch):
    (tmp_path / "thesis.tex").write_text("chapter one")
    line = refused(capsys, monkeypatch, "run", inputs / "tiny.json", "--workdir", tmp_path)
    assert "is not empty and holds no run" in line
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_command_line_itself(capsys, monkeypatch):
    assert "takes one config" in refused(capsys, monkeypatch, "run")
    assert "takes one config" in refused(capsys, monkeypatch, "run", "a.json", "--config", "b.json")
    assert "invalid choice" in refused(
        capsys, monkeypatch, "export", "--workdir", "a", "--to", "b", "--format", "onnx"
    )
    assert "unrecognized arguments" in refused(capsys, monkeypatch, "run", "a.json", "--worckdir", "x")
    assert "required" in refused(capsys, monkeypatch)
    for arguments in (
        ["--help"],
        ["run", "--help"],
        ["export", "--help"],
        ["convert", "--help"],
        ["report", "--help"],
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
    with pytest.raises(FileNotFoundError):
        main(["run", "nowhere.json", "--traceback"])
