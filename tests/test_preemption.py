"""Being told to stop, in one process: the first signal is noted, the second ends it as ever. Several:
`test_experiments_processes`.
"""

import os
import signal

from experiments.running.preemption import StopRequest


def test_the_first_is_noted_and_the_second_goes_where_it_went_before():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(True))
    try:
        with StopRequest() as asked:
            assert not asked()
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked() and not heard
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked() and len(heard) == 1
    finally:
        signal.signal(signal.SIGTERM, before)


def test_nothing_stays_behind():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
