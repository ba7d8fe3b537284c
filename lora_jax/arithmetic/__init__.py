"""Arithmetic on adapters: as LoRA, scaled, summed, compressed, merged.

What adapters add to the weights, ΔW = s·A·B, can be scaled, negated, summed and approximated without the base
(task arithmetic, Ilharco et al., ICLR 2023, arXiv 2212.04089), and mostly without being formed. The rules are
those of PEFT's `add_weighted_adapter`; its names are given with each. Its `linear` is left out: it sums the
A's and the B's apart, so that the product has cross terms, which are as large as what is wanted.

All but `as_lora` and `scaled` take plain LoRA adapters, `LoRA` without `blocks`: every other adapter first
becomes one by `as_lora`.
"""

from ._as_lora import as_lora as as_lora
from ._compress import compress as compress, singular_values as singular_values
from ._sums import scaled as scaled, weighted as weighted
from ._ties import dare as dare, ties as ties
