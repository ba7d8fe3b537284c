"""`decode`: how the test inputs are continued."""

import math
from dataclasses import dataclass

from experiments.checks import at_least


@dataclass(frozen=True)
class Sample:
    """Each token drawn from softmax(logits / temperature): of the `top_k` likeliest, then of the fewest
    that hold `top_p` of what is left.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(
                f"`decode.sample.temperature` must be positive, got {self.temperature}; for the likeliest "
                "token leave `decode.sample` out."
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"`decode.sample.top_k` must be at least 1 or null, got {self.top_k}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(
                f"`decode.sample.top_p` must be more than 0 and at most 1, or null, got {self.top_p}."
            )


@dataclass(frozen=True)
class Decode:
    """How the test inputs, the first `prompts` of them or all, are continued; the report shows the first
    `shown`.

    Beam search of width `beams`, or greedy decoding (1), or drawing (`sample`). Beams are compared by their
    summed log-probability over length ** `length_penalty`, and `no_repeat_ngram` forbids a second occurrence
    of that many generated tokens in a row. A text ends at the tokenizer's end of text or at one of `end`:
    ids, or texts that the tokenizer encodes as one token. `before`: the base, as it was, answers all of the
    inputs too and is scored beside the result.
    """

    max_tokens: int = 64
    batch: int = 32
    beams: int = 1
    length_penalty: float = 0.0
    no_repeat_ngram: int | None = None
    end: tuple[str | int, ...] = ()
    sample: Sample | None = None
    prompts: int | None = None
    shown: int = 10
    before: bool = False

    def __post_init__(self):
        at_least(1, "decode", self, "max_tokens", "batch", "beams", "no_repeat_ngram", "prompts")
        at_least(0, "decode", self, "shown")
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"`decode.length_penalty` must be finite, got {self.length_penalty}.")
        if self.sample is not None and self.beams > 1:
            raise ValueError(
                f"`decode.sample` draws one text, and `decode.beams` is {self.beams}: leave one of them out."
            )
