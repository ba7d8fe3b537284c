"""Evaluates a jaxpr in which some values are factored weights. All contact with jaxprs is in this folder.

An equation without factored operands is bound as it is (`equation.py`). One that views or uses a factored
weight follows its rule in `views.py` or `uses.py`. One that holds an inner jaxpr is emitted again through
JAX's public API, over a closure that evaluates the inner jaxpr (`calls.py`). For anything else the weight
would have to be formed: `materialize` decides (`interpreter.py`). Each use goes on record (`recorder.py`).
`function.py` does all this for a function on trees.

JAX promises nothing about jaxprs, and they differ between its versions. Only attributes that jax 0.10 to 0.12
share are read here, or both spellings where they differ.
"""
