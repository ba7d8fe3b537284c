"""LoRA for JAX: a pure parameter transform and a pure function transform. See README.md."""

from . import methods as methods, optim as optim
from ._adapt import adapt as adapt, explain as explain
from ._interpret import MaterializeError as MaterializeError
from ._lorafy import Lorafied as Lorafied, combine as combine, lorafy as lorafy, partition as partition
from ._merge import count as count, merge as merge, merge_report as merge_report, summary as summary, unmerge as unmerge
from ._stack import stack as stack, take as take
from .methods import Full as Full, LoRA as LoRA

__version__ = "0.1.0"
