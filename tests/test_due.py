"""What follows a step of training: its schedules, the last step, and being asked to stop."""

import pytest

from experiments.config import Train
from experiments.training.due import due


_EVERY = {"log": 2, "evaluate": 3, "save": 5}


def _after(done, *, result="last", stop=False):
    train = Train(
        31,
        8,
        1e-3,
        log_every=_EVERY["log"],
        eval_every=_EVERY["evaluate"],
        checkpoint_every=_EVERY["save"],
        result=result,
    )
    return due(done, train, stop)


@pytest.mark.parametrize("result", ["last", "mean"])
def test_each_on_its_own_schedule(result):
    for done in range(1, 31):
        found = _after(done, result=result)
        assert {name: getattr(found, name) for name in _EVERY} == {
            name: done % every == 0 for name, every in _EVERY.items()
        }
        assert found.any() == any(done % every == 0 for every in _EVERY.values())
        assert not (found.save and found.temporary)


@pytest.mark.parametrize(
    "result, stop", [(result, stop) for result in ("last", "best", "mean") for stop in (False, True)]
)
def test_the_last_step_has_everything(result, stop):
    found = _after(31, result=result, stop=stop)
    assert found.log and found.evaluate and found.save and not found.temporary


def test_for_the_best_each_evaluation_is_a_checkpoint_that_lasts():
    found = _after(3, result="best")
    assert found.evaluate and found.save and not found.temporary
    assert not _after(2, result="best").save


def test_asked_to_stop_it_saves_a_temporary_checkpoint_and_does_not_evaluate():
    found = _after(3, stop=True)
    assert found.save and found.temporary and not found.evaluate, "whoever goes on evaluates"
    assert not _after(5, stop=True).temporary, "this one would have been saved anyway"
    assert _after(1, stop=True).any()


def test_asked_to_stop_where_the_checkpoint_has_to_know_its_loss():
    found = _after(3, result="best", stop=True)
    assert found.evaluate and found.save and not found.temporary
