"""Evaluates a jaxpr in which some values are factored weights. All contact with jaxprs is in this folder.

An equation without factored operands is bound as it is (`equation.py`). One that views or uses a factored
weight follows its rule in `views.py` or `uses.py`; one that holds an inner jaxpr is emitted again through
JAX's public API, over a closure that evaluates the inner jaxpr (`calls.py`). For anything else the weight
would have to be formed: `materialize` decides (`interpreter.py`).

JAX promises nothing about jaxprs, and what is read of them here differs between versions: only attributes
that jax 0.10 to 0.12 share are used, or both spellings where they differ.
"""

from .equation import trace as trace
from .interpreter import Interpreter as Interpreter, MaterializeError as MaterializeError
from .uses import Use as Use
