"""Checkpoints that are damaged: each is known as damaged, and the one before it is taken."""

import json
import re
import shutil
import warnings

import checkpoint_states
import numpy as np
import pytest
from checkpoint_states import files_of, intact, orbax_gives_up, restored, same, state

from lora_jax.checkpoint import _storage, Checkpoints, NoneIntact


two = checkpoint_states.two
collected = checkpoint_states.collected


def _cut(content, draw):
    return content[: draw.integers(0, len(content))]


def _flipped(content, draw):
    bit = int(draw.integers(0, 8 * len(content)))
    return content[: bit // 8] + bytes([content[bit // 8] ^ 1 << (bit % 8)]) + content[bit // 8 + 1 :]


@orbax_gives_up
@pytest.mark.parametrize(
    "change", [_cut, _flipped, lambda content, draw: None], ids=["cut short", "a bit flipped", "gone"]
)
def test_damage_is_known_and_the_one_before_is_taken(two, tmp_path, change):
    """Any file of the newest checkpoint: what comes back is that checkpoint, to the bit, or the one
    before it; never something else.
    """
    draw, outcomes = np.random.default_rng(0), set()
    for number, file in enumerate(files_of(two / "7")):
        copied = tmp_path / str(number)
        shutil.copytree(two, copied)
        target = copied / file.relative_to(two)
        content = change(target.read_bytes(), draw)
        target.write_bytes(content) if content is not None else target.unlink()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = restored(copied)
        intact(found)
        outcomes.add(found.step)
        messages = [str(warning.message) for warning in said if "is damaged" in str(warning.message)]
        assert len(messages) == (found.step == 3)
        if messages:
            assert "the checkpoint of step 7" in messages[0] and "going on from step 3" in messages[0]
            assert (copied / "7.damaged").is_dir() and not (copied / "7").exists()
    assert 3 in outcomes


@orbax_gives_up
def test_after_damage_the_step_can_be_saved_again(two, tmp_path):
    shutil.copytree(two, tmp_path / "run")
    for file in files_of(tmp_path / "run" / "7" / "arrays"):
        file.write_bytes(file.read_bytes()[:-1])
    with Checkpoints(tmp_path / "run", identity={"base": "x"}) as checkpoints:
        with pytest.warns(UserWarning, match="step 7 .* is damaged"):
            found = checkpoints.restore(state().delta, state().opt_state)
        assert checkpoints.latest() == found.step == 3
        checkpoints.save(state(7, 5.0))
        assert checkpoints.restore(state().delta, state().opt_state).delta["h"][0]["a"][0, 1] == 5


@pytest.mark.parametrize("part", ["delta", "opt_state"])
def test_arrays_of_another_checkpoint_are_not_taken_for_its_own(two, tmp_path, part):
    """Whole and readable, and not what was saved with the rest: what the checksum of the values is for."""
    shutil.copytree(two, tmp_path / "run")
    other = state(7, 2.0)._replace(**{part: getattr(state(7, 9.0), part)})
    with Checkpoints(tmp_path / "other", identity={"base": "x"}) as checkpoints:
        checkpoints.save(other)
    shutil.rmtree(tmp_path / "run" / "7" / "arrays")
    shutil.copytree(tmp_path / "other" / "7" / "arrays", tmp_path / "run" / "7" / "arrays")
    with pytest.warns(
        UserWarning,
        match=(
            "step 7 .* is damaged: its arrays do not have the checksum that they were saved with; going on "
            "from step 3"
        ),
    ):
        found = restored(tmp_path / "run")
    assert found.step == 3
    intact(found)


CHANGED_FACTS = {
    "format": 1,
    "step": 8,
    "position": [1, 3],
    "key": [0, 8],
    "key_impl": "rbg",
    "identity": {"base": "y"},
    "loss": 0.5,
    "passing": True,
    "arrays": {},
    "sums": {},
}


@pytest.mark.parametrize("name", CHANGED_FACTS)
def test_a_fact_that_has_changed_is_damage(two, tmp_path, name):
    """Readable as ever: what the checksum of the facts is for."""
    shutil.copytree(two, tmp_path / "run")
    file = tmp_path / "run" / "7" / "facts" / "metadata"
    facts = json.loads(file.read_text())
    assert facts.keys() == {*CHANGED_FACTS, "facts"} and facts[name] != CHANGED_FACTS[name]
    file.write_text(json.dumps({**facts, name: CHANGED_FACTS[name]}))
    with pytest.warns(UserWarning, match="step 7 .* is damaged: what it says of itself has changed since"):
        found = restored(tmp_path / "run")
    assert found.step == 3
    intact(found)


def test_a_checkpoint_under_another_number_is_damage(two, tmp_path):
    shutil.copytree(two, tmp_path / "run")
    (tmp_path / "run" / "7").rename(tmp_path / "run" / "9")
    with pytest.warns(UserWarning, match="step 9 .* is damaged: what it says of itself has changed since"):
        assert restored(tmp_path / "run").step == 3


@orbax_gives_up
def test_any_bit_of_what_is_noted_beside_the_arrays(two, tmp_path):
    """Of Orbax's own notes, which make arrays of the files: the state comes back to the bit, or the
    checkpoint before it does.
    """
    shutil.copytree(two, tmp_path / "run")
    file = tmp_path / "run" / "7" / "arrays" / "_METADATA"
    whole, draw = file.read_bytes(), np.random.default_rng(0)
    # What once passed for an array and was none, and some drawn.
    changed = [
        whole.replace(b"jax.Array", b"jax.Qrray"),
        *(_bit_flipped(whole, draw.integers(len(whole)), draw.integers(8)) for _ in range(20)),
    ]
    steps = set()
    for content in changed:
        file.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = restored(tmp_path / "run")
        intact(found)
        steps.add(found.step)
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(two, tmp_path / "run")
    assert steps == {3, 7}


def _bit_flipped(content, place, bit):
    return content[:place] + bytes([content[place] ^ 1 << int(bit)]) + content[place + 1 :]


@orbax_gives_up
def test_the_best_that_is_intact(tmp_path):
    """The best is damaged: it is put aside, and the next best is found. Without a finite loss there is
    none.
    """
    with Checkpoints(tmp_path, identity={}, keep=4) as checkpoints:
        for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, float("nan"))):
            checkpoints.save(state(step, float(step)), loss)
    for file in files_of(tmp_path / "2" / "arrays"):
        file.write_bytes(b"")
    with Checkpoints(tmp_path, identity={}, keep=4) as checkpoints:
        assert checkpoints.best() == 2, "what it says of itself is not damaged"
        with pytest.warns(UserWarning, match="step 2 .* is damaged.*; going on from step 3"):
            assert checkpoints.restore(state().delta, state().opt_state, best=True).step == 3
        assert checkpoints.best() == 3 and checkpoints.steps() == [1, 3, 4]
        with pytest.warns(UserWarning):
            (tmp_path / "4" / "facts" / "metadata").write_text("")
            mean = checkpoints.average(state().delta, last=3)
        same(mean["h"][0]["a"], 2 * state().delta["h"][0]["a"])  # of steps 1 and 3
        checkpoints.save(state(2), 5.0)
        assert checkpoints.best() == 3, "what was put aside is not known any more"
    with Checkpoints(tmp_path / "new", identity={}) as checkpoints:
        checkpoints.save(state(1), float("inf"))
        with pytest.raises(ValueError, match="no checkpoint that was saved with a finite loss"):
            checkpoints.restore(state().delta, state().opt_state, best=True)


def test_saved_in_passing(tmp_path):
    """It is gone on from, takes the place of no other, goes with the next, and is in no average."""
    with Checkpoints(tmp_path, identity={}, keep=2) as checkpoints:
        for step in (4, 8):
            checkpoints.save(state(step, float(step)))
        checkpoints.save(state(10, 10.0), temporary=True)
        assert checkpoints.steps() == [4, 8, 10] and checkpoints.steps(temporary=False) == [4, 8]
    with Checkpoints(tmp_path, identity={}, keep=2) as checkpoints:
        assert checkpoints.restore(state().delta, state().opt_state).step == 10
        same(checkpoints.average(state().delta, last=2)["h"][0]["a"], 6 * state().delta["h"][0]["a"])
        checkpoints.save(state(12, 12.0))
        assert checkpoints.steps() == [8, 12]
        same(checkpoints.average(state().delta, last=2)["h"][0]["a"], 10 * state().delta["h"][0]["a"])


@orbax_gives_up
def test_nothing_intact(two, tmp_path):
    shutil.copytree(two, tmp_path / "run")
    for file in files_of(tmp_path / "run"):
        file.write_bytes(b"")
    with pytest.raises(
        NoneIntact, match="holds no intact checkpoint .step 7: .*; step 3: .*take one from a copy"
    ):
        restored(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["3", "7"], (
        "nothing is put aside where nothing is left"
    )
    with Checkpoints(tmp_path / "run", identity={"base": "x"}) as checkpoints:
        checkpoints.put_aside()
        checkpoints.save(state(3))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["3", "3.damaged", "7.damaged"]


@pytest.mark.parametrize("part", ["facts", "arrays"])
def test_what_is_no_damage_of_the_files(two, tmp_path, monkeypatch, part):
    """Too little memory, or no permission: nothing is put aside for it."""
    shutil.copytree(two, tmp_path / "run")
    whole = _storage._read
    for error in (
        MemoryError("none left"),
        PermissionError(13, "not yours"),
        OSError(5, "the cable"),
        RuntimeError("RESOURCE_EXHAUSTED: 3 GB"),
    ):
        with monkeypatch.context() as patch:

            def fails(path, error=error, **parts):
                if part in parts:
                    raise error
                return whole(path, **parts)

            patch.setattr(_storage, "_read", fails)
            with pytest.raises(type(error), match=re.escape(str(error))):
                restored(tmp_path / "run")
    assert (
        sorted(path.name for path in (tmp_path / "run").iterdir()) == ["3", "7"]
        and restored(tmp_path / "run").step == 7
    )


@orbax_gives_up
def test_a_step_that_is_asked_for_is_not_another(two, tmp_path):
    shutil.copytree(two, tmp_path / "run")
    for file in files_of(tmp_path / "run" / "7" / "arrays"):
        file.unlink()
    with (
        Checkpoints(tmp_path / "run", identity={"base": "x"}) as checkpoints,
        pytest.raises(ValueError, match="holds no intact checkpoint .step 7"),
    ):
        checkpoints.restore(state().delta, state().opt_state, step=7)
