"""`mesh` and `precision`: how a run computes, which changes no result beyond rounding or at all."""

from dataclasses import dataclass
from typing import Literal

from experiments.checks import at_least


# The axes of a mesh, which are the fields of `Mesh`.
AXES = ("data", "fsdp", "tensor")


@dataclass(frozen=True)
class Mesh:
    """Devices along each axis: the batch is split over data and fsdp, frozen weights over fsdp and tensor."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        at_least(1, "mesh", self, *AXES)


@dataclass(frozen=True)
class Precision:
    """Which dtype each part of a run has; null leaves it as it is without this section.

    `parameters`: what the frozen base is stored in, and the merged model with it (null: as in its file;
    float32 where it is drawn). Merging itself is float32, rounded once. `compute`: activations and products
    (null: the parameters' own); attention's softmax, the statistics of layer norm and the logits stay
    float32.

    `adapters`: what trains, that is A, B, and weights and biases with the method Full, which in float32
    beside a bfloat16 base are master weights; the optimiser's moments follow (null: the method's, float32 for
    A and B, and a trained weight's own). Some arrays of a method are float32 always (DoRA's magnitude). In
    bfloat16, of 8 significant bits, an update of less than 1/512 of a number is lost: it learns until updates
    are small, then stands still.

    `reduce`: what gradients and losses are added in over the parts of a batch, and the gradients of A and B
    come out of their products in, so that XLA adds those of several devices in it. In "bfloat16", they come
    out in `compute`'s. Not governed by it: gradients of Full's weights and biases before they are added over
    parts; the model's own products have made and summed them over devices, in `compute`. The loss of a token
    and numbers of tokens are always float32.
    """

    parameters: Literal["bfloat16", "float32"] | None = None
    compute: Literal["bfloat16", "float32"] | None = None
    adapters: Literal["bfloat16", "float32"] | None = None
    reduce: Literal["bfloat16", "float32"] = "float32"
