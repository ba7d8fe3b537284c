"""What follows a step of training: a line in the log, an evaluation, a checkpoint. Left out: doing it, which
is the trainer's.
"""

from typing import NamedTuple

from experiments.config import Train


class Due(NamedTuple):
    """What follows a step. `temporary`: its checkpoint serves only to go on from."""

    log: bool
    evaluate: bool
    save: bool
    temporary: bool

    def any(self) -> bool:
        return self.log or self.evaluate or self.save


def due(done: int, train: Train, stop: bool) -> Due:
    """What follows step `done`. `stop`: the run was asked to stop at it.

    >>> due(20, Train(100, 8, 1e-3, log_every=10, eval_every=50, checkpoint_every=30), stop=True)
    Due(log=True, evaluate=False, save=True, temporary=True)
    """
    last, best = done == train.steps, train.result == "best"
    log, evaluate, save = (
        last or done % every == 0 for every in (train.log_every, train.eval_every, train.checkpoint_every)
    )
    # The best is chosen among checkpoints, so that every step that is evaluated has one, with its loss.
    lasting = save or (best and evaluate)
    # A run that is asked to stop leaves the evaluation to its next start, unless there is none, or the
    # checkpoint needs the loss.
    return Due(log, evaluate and (last or best or not stop), lasting or stop, temporary=not lasting)
