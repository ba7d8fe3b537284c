"""PEFT's names for the arrays of an adapter, and their shapes in its files."""

from typing import NamedTuple

from .._modules import Module


PREFIX = "base_model.model."
# VeRA's pair, one for all modules: (r, largest in) and (largest out, r).
PROJECTIONS = {"shared_a": "base_model.vera_A", "shared_b": "base_model.vera_B"}
# The end of the name of the rows of an embedding that train by themselves.
TOKENS = "token_adapter.trainable_tokens_delta"
# Our heads, and PEFT's task with the same head.
TASKS = {
    "sequence_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "question_answering": "QUESTION_ANS",
    "features": "FEATURE_EXTRACTION",
    "masked_lm": None,
    None: "CAUSAL_LM",
}


class Entry(NamedTuple):
    """An array of an adapter in a file."""

    ending: str  # of its name, after the name of its module
    shape: tuple[int, ...]
    own_shape: tuple[int, ...]  # without the axes of length one that only files have


def entries(peft_type: str, dora: bool, module: Module, rank: int) -> dict[str, Entry]:
    """The arrays of a module's adapter, by our names for them."""
    a, b, ones = (rank, *module.ins), (module.outs, rank), (1,) * (len(module.ins) - 1)
    outs = module.outs
    if peft_type == "VERA":
        return {"b": Entry("vera_lambda_b", (outs,), (outs,)), "d": Entry("vera_lambda_d", (rank,), (rank,))}
    if peft_type == "ADALORA":
        return {
            "a": Entry("lora_A", a, a),
            "b": Entry("lora_B", b, b),
            "e": Entry("lora_E", (rank, 1), (rank,)),
        }
    magnitude = (
        {"m": Entry("lora_magnitude_vector", (1, outs, *ones) if ones else (outs,), (outs,))} if dora else {}
    )
    if module.kind == "embedding":
        return {"a": Entry("lora_embedding_A", a, a), "b": Entry("lora_embedding_B", b, b), **magnitude}
    return {"a": Entry("lora_A.weight", a, a), "b": Entry("lora_B.weight", (*b, *ones), b), **magnitude}
