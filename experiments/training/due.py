"""What follows a step of training: a line in the log, an evaluation, a checkpoint. Left out: doing it,
which is `train`'s.
"""

from typing import NamedTuple

from experiments.config import Train


class Due(NamedTuple):
    """What follows a step. `passing`: its checkpoint is only there to go on from."""

    log: bool
    evaluate: bool
    save: bool
    passing: bool

    def any(self) -> bool:
        return self.log or self.evaluate or self.save


def due(done: int, train: Train, stop: bool) -> Due:
    """What follows step `done`, which may be the last, or the one at which the run was asked to `stop`.

    >>> due(20, Train(100, 8, 1e-3, log_every=10, eval_every=50, checkpoint_every=30), stop=True)
    Due(log=True, evaluate=False, save=True, passing=True)
    """
    last, best = done == train.steps, train.result == "best"
    log, evaluate, save = (
        last or done % every == 0 for every in (train.log_every, train.eval_every, train.checkpoint_every)
    )
    # The best is chosen among checkpoints, so that each that was evaluated is one, and knows its loss.
    lasting = save or (best and evaluate)
    # Asked to stop, it leaves the evaluation to whoever goes on, unless nobody does, or the checkpoint has to
    # know.
    return Due(log, evaluate and (last or best or not stop), lasting or stop, passing=not lasting)
