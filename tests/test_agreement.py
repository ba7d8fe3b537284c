"""The protocol of `lora_jax.processes` for a failure, on threads in place of processes. Real processes:
`test_checkpoint_processes`, `test_interop_processes` and `test_experiments_processes`.
"""

import json
import threading

import jax
import pytest

from lora_jax import processes


@pytest.fixture
def three(monkeypatch):
    """Runs `work(index)` in three threads, as processes. The results: what each returned or raised."""
    own, said = threading.local(), {}
    barrier = threading.Barrier(3, timeout=20)

    def exchange(value):
        said[own.index] = json.loads(json.dumps(value))
        barrier.wait()
        found = [said[index] for index in range(3)]
        barrier.wait()
        return found

    monkeypatch.setattr(processes, "exchange", exchange)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(jax, "process_index", lambda: own.index)

    def run(work):
        results = [None] * 3

        def body(index):
            own.index = index
            try:
                results[index] = work(index)
            except Exception as error:
                results[index] = error

        threads = [threading.Thread(target=body, args=(index,)) for index in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return results

    return run


def raises(errors):
    def work(index):
        if index in errors:
            raise errors[index]
        return index

    return work


def test_a_value_of_each(three):
    assert three(lambda index: processes.together(lambda: index)) == [0, 1, 2]
    assert three(lambda index: processes.on_first(lambda: [index, "text"])) == [[0, "text"]] * 3


def test_the_gravest_error_counts_and_names_its_process(three):
    errors = {0: ValueError("a wrong word."), 1: OSError("the disk is full."), 2: OSError("no permission")}
    work = raises(errors)
    found = three(lambda index: processes.together(lambda: work(index)))
    assert found[1] is errors[1] and found[2] is errors[2], "as grave: its own"
    assert isinstance(found[0], OSError) and isinstance(found[0], processes.Elsewhere)
    assert (str(found[0]), found[0].process) == ("the disk is full (process 1).", 1)
    assert found[0].__cause__ is errors[0]


def test_kinds_are_the_callers_choice(three):
    errors = {0: ValueError("a wrong word"), 2: OSError("gone")}
    work = raises(errors)
    found = three(lambda index: processes.together(lambda: work(index), (OSError, ValueError)))
    assert found[0] is errors[0]
    assert [str(error) for error in found[1:]] == ["a wrong word (process 0)"] * 2


def test_an_error_of_no_kind_has_its_name_in_the_text(three):
    work = raises({2: KeyError("rank")})
    found = three(lambda index: processes.together(lambda: work(index)))
    assert isinstance(found[2], KeyError) and not isinstance(found[2], processes.Elsewhere)
    for error in found[:2]:
        assert isinstance(error, RuntimeError) and str(error) == "KeyError: 'rank' (process 2)"


@pytest.mark.parametrize("result", [object(), {1, 2}], ids=["object", "set"])
def test_a_result_that_json_cannot_hold_is_an_error_of_all(three, result):
    found = three(lambda index: processes.on_first(lambda: result))
    assert isinstance(found[0], TypeError) and not isinstance(found[0], processes.Elsewhere)
    assert all(isinstance(error, processes.Elsewhere) and error.process == 0 for error in found[1:])


def test_the_others_learn_at_a_point_of_agreement_and_do_nothing_after_it(three):
    done = []

    def work(index):
        with processes.all_or_none(True) as writes:
            if index == 1:
                raise ValueError("a wrong word")
            assert writes == (index == 0)
            try:
                processes.agree()
            except ValueError:  # code on the way does not take the error for its own
                done.append("taken")
            done.append("after")

    found = three(work)
    assert not done
    assert type(found[1]) is ValueError and not isinstance(found[1], processes.Elsewhere)
    for error in (found[0], found[2]):
        assert isinstance(error, ValueError) and isinstance(error, processes.Elsewhere) and error.process == 1


def test_a_block_that_is_not_shared_exchanges_nothing(three):
    def work(index):
        with processes.all_or_none(False) as writes:
            processes.agree()
            if index == 2:
                raise ValueError("its own")
            return writes

    found = three(work)
    assert found[:2] == [True, True] and str(found[2]) == "its own"
