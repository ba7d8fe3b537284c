"""Compiled programs are kept from one run to the next: where the user expects them, and nowhere else."""

import json
import os
import sys
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from runs import BASE, without_java as without_java
from training import optax_promotes as optax_promotes

from experiments.command_line import main
from experiments.running import compiled


OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def untold(tmp_path, monkeypatch):
    """As if the environment said nothing of JAX's cache, with `tmp_path` as the user's. Then all is as it
    was.
    """
    before = {option: getattr(jax.config, option) for option in OPTIONS}
    for option in OPTIONS:
        monkeypatch.delenv(option.upper(), raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
    yield tmp_path / "lora_jax" / "jax"
    for option, value in before.items():
        jax.config.update(option, value)
    compilation_cache.reset_cache()


def test_the_second_run_compiles_from_the_first_ones_programs(untold, tmp_path, monkeypatch):
    """Of the same config: none is compiled again, and nothing is added."""
    monkeypatch.setattr(compiled, "SHORTEST", 0)  # programs of this size take less than a tenth of a second
    monkeypatch.setitem(sys.modules, "torch", None)  # which takes longer to import than the runs take
    config = tmp_path / "config.json"
    config.write_text(json.dumps(BASE))
    found = []
    listen = lambda event, **_: found.append(event.rpartition("/")[2])
    jax.monitoring.register_event_listener(listen)
    try:
        hits, files = [], []
        for name in ("first", "second"):
            jax.clear_caches()
            found.clear()
            assert main(["run", str(config), "--workdir", str(tmp_path / name)]) == 0
            hits.append((found.count("cache_hits"), found.count("cache_misses")))
            files.append(sorted(file.name for file in untold.iterdir()))
    finally:
        jax.monitoring.unregister_event_listener(listen)
    assert hits[0][1] > 10, hits
    assert hits[1][0] > 10 and hits[1][1] == 0, hits
    assert files[0] == files[1]
    assert any("jit_function" in name for name in files[0]), "the step"
    first, second = (tmp_path / name / "merged" / "model.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


def test_where_programs_are_kept(monkeypatch):
    home = Path.home() / ".cache" / "lora_jax" / "jax"
    assert compiled.directory({}) == compiled.directory({"XDG_CACHE_HOME": "here"}) == home
    assert compiled.directory({"XDG_CACHE_HOME": "/there"}) == Path("/there/lora_jax/jax")


def test_short_programs_are_kept_too(untold):
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    compiled.keep()
    assert jax.config.jax_compilation_cache_dir == str(untold)
    assert jax.config.jax_persistent_cache_min_compile_time_secs == compiled.SHORTEST < 1


def test_the_users_own_words_stand(untold, monkeypatch):
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 7.0)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "7")
    for own in ("/elsewhere", ""):
        jax.config.update("jax_compilation_cache_dir", own)  # as JAX reads it from the environment
        compiled.keep()
        assert jax.config.jax_compilation_cache_dir == own
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    compiled.keep()
    assert jax.config.jax_compilation_cache_dir is None and not untold.exists()
    jax.config.update("jax_enable_compilation_cache", True)
    compiled.keep()
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 7


def test_a_place_that_cannot_be_written_to_is_one_line(untold, capsys, monkeypatch):
    untold.parent.mkdir()
    untold.write_text("a file where the directory would be")
    compiled.keep()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: compiled programs are not kept (") and str(untold) in line
    assert jax.config.jax_compilation_cache_dir is None
    monkeypatch.setattr(compiled.processes, "first", lambda: False)
    compiled.keep()
    assert not capsys.readouterr().err, "the first of several processes has said it"


def test_without_a_home(untold, capsys, monkeypatch):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(compiled.Path, "home", nobody)
    compiled.keep()
    assert "not kept (Could not determine home directory.)" in capsys.readouterr().err


def test_the_tests_keep_nothing_in_the_users_cache():
    """Not in this process, nor in those that it starts."""
    directory = jax.config.jax_compilation_cache_dir
    assert directory is not None or not jax.config.jax_enable_compilation_cache
    if directory is not None:
        assert os.environ["JAX_COMPILATION_CACHE_DIR"] == directory
    else:
        assert os.environ["JAX_ENABLE_COMPILATION_CACHE"] == "False"
