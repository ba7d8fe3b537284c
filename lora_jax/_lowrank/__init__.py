"""A weight `(W + A·B) ⊙ m` that is never formed: its factors, their views, and what uses it."""
