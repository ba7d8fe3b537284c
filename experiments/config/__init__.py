"""What a config file may say: one frozen dataclass a section, and the only place that holds a default. The
sections of `data` are the tasks' own (`experiments/tasks/`).

A config is a row of a table: `source` names the paper, the table and the numbers to expect, or says that
there are none. Paths inside a config are relative to `--data`; `base.run`, and a `base.path` that begins with
a dot, to the config's own file; a `base.name` is below `--bases`. Left out: anything that describes the
machine (device counts aside) or where results go: those are arguments of the command line.

A config may say only what differs from another: `like` names that one's file, from this file's directory. A
section is taken over key by key, and a key below it is replaced whole. A section with another `name` or
`task` replaces all of the other's: the keys of a method, a baseline or a task mean nothing to another. A null
stands in place of a value, and is what most keys are when they are left out. The other config says everything
itself and has no `like`, so that two files are a row. Paths that begin at a config's own file begin at the
one that is run. A work directory keeps the whole (`to_json`).
"""

from experiments.tasks.e2e import E2EData as E2EData
from experiments.tasks.generate import Generate as Generate
from experiments.tasks.text import TextData as TextData

from .base import Architecture as Architecture, Base as Base
from .computing import AXES as AXES, Mesh as Mesh, Precision as Precision
from .decode import Decode as Decode, Sample as Sample
from .experiment import Config as Config, Source as Source
from .files import (
    difference as difference,
    load as load,
    to_json as to_json,
    with_defaults as with_defaults,
    without_defaults as without_defaults,
    without_mesh as without_mesh,
)
from .method import (
    baseline_value as baseline_value,
    baselines as baselines,
    method_value as method_value,
    methods as methods,
)
from .training import Budget as Budget, Optimizer as Optimizer, Train as Train
