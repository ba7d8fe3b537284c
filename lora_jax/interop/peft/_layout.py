"""What PEFT calls the arrays of an adapter, and their shapes in its files."""

from typing import NamedTuple

from .._modules import Module


PREFIX = "base_model.model."
# VeRA's pair, one for all modules: (r, largest in) and (largest out, r).
PROJECTIONS = {"shared_a": "base_model.vera_A", "shared_b": "base_model.vera_B"}
# Our heads, and the task that has the same one.
TASKS = {
    "sequence_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "question_answering": "QUESTION_ANS",
    "features": "FEATURE_EXTRACTION",
    "masked_lm": None,
    None: "CAUSAL_LM",
}


class Place(NamedTuple):
    """Where an array of ours is: the name after that of its module, the shape there, and the shape
    without the ones that only files have.
    """

    ending: str
    shape: tuple[int, ...]
    ours: tuple[int, ...]


def places(peft_type: str, dora: bool, module: Module, rank: int) -> dict[str, Place]:
    """By our names of the arrays."""
    a, b, ones = (rank, *module.ins), (module.outs, rank), (1,) * (len(module.ins) - 1)
    outs = module.outs
    if peft_type == "VERA":
        return {"b": Place("vera_lambda_b", (outs,), (outs,)), "d": Place("vera_lambda_d", (rank,), (rank,))}
    if peft_type == "ADALORA":
        return {
            "a": Place("lora_A", a, a),
            "b": Place("lora_B", b, b),
            "e": Place("lora_E", (rank, 1), (rank,)),
        }
    magnitude = (
        {"m": Place("lora_magnitude_vector", (1, outs, *ones) if ones else (outs,), (outs,))} if dora else {}
    )
    if module.kind == "embedding":
        return {"a": Place("lora_embedding_A", a, a), "b": Place("lora_embedding_B", b, b), **magnitude}
    return {"a": Place("lora_A.weight", a, a), "b": Place("lora_B.weight", (*b, *ones), b), **magnitude}
