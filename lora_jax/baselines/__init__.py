"""The methods that LoRA's tables compare with and that change a model's function, not its weights: adapters
and prefixes. They need Flax; the models' own code does not change.

Each is a value, which `attach` brings to a model. Its arrays then lie in the model's parameters, beside those
of the module that they act on. So all else is as with any other parameter: `lorafy` with `baseline.targets`
makes them what trains, `LoRA` stands beside them in the same mapping, and checkpoints, optimisers and meshes
see one pytree. What trains parameters of the base itself needs nothing from here but `top_layers`.
"""

from .._extras import brought_by


with brought_by("models", "lora_jax.baselines"):
    from ._adapters import Houlsby as Houlsby, Lin as Lin, Pfeiffer as Pfeiffer
    from ._attach import attach as attach, Extended as Extended
    from ._prefixes import PrefixEmbedding as PrefixEmbedding, PrefixLayer as PrefixLayer
    from ._top import top_layers as top_layers
