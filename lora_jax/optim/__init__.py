"""The optax side: masks for training one combined tree, and the update rules that some methods come with.

The plain way needs none of this: `tx.init(delta)` and `jax.grad` with respect to `delta`.
"""

from ._adalora import adalora as adalora, AdaLoRAState as AdaLoRAState, ranks as ranks
from ._lorafa import lorafa as lorafa, LoRAFAState as LoRAFAState
from ._loraplus import loraplus as loraplus
from ._masks import labels as labels, only_trainable as only_trainable, trainable_mask as trainable_mask
