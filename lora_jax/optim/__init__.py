"""The optax side: masks for training one combined tree, and the update rules that some methods come with.

The plain way needs none of this: `tx.init(delta)` and `jax.grad` with respect to `delta`.
"""

from ._adalora import AdaLoRAState as AdaLoRAState, adalora as adalora, ranks as ranks
from ._lorafa import LoRAFAState as LoRAFAState, lorafa as lorafa
from ._loraplus import loraplus as loraplus
from ._masks import labels as labels, only_trainable as only_trainable, trainable_mask as trainable_mask
