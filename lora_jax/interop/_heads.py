"""The head that a file of adapters brings along, recognised by its tensors."""

from collections.abc import Mapping
from typing import Any


# The modules of our heads; the last one gives the number of labels. A `classifier` alone does not decide
# between two heads: a BERT or a DeBERTa may have a frozen pooler before it.
_HEADS = (
    ("sequence_classification", ("classifier.dense", "classifier.out_proj")),
    ("sequence_classification", ("pooler.dense", "classifier")),
    ("sequence_classification", ("bert.pooler.dense", "classifier")),
    ("question_answering", ("qa_outputs",)),
)
# A decoder's, the one head without a bias.
_SCORE = "score.weight"


def head_in(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `hf.load` for a head that the file holds as a whole; empty if it holds none."""
    if _SCORE in stored and stored[_SCORE].shape:
        return {"head": "sequence_classification", "num_labels": stored[_SCORE].shape[0]}
    token = ("token_classification", ("classifier",))
    heads = (*_HEADS, token) if any(name.startswith("roberta.") for name in stored) else _HEADS
    for head, modules in heads:
        names = [f"{module}.{last}" for module in modules for last in ("bias", "weight")]
        if stored.keys() >= set(names) and stored[names[-1]].shape:
            return (
                {"head": head, "num_labels": stored[names[-1]].shape[0]}
                if head != "question_answering"
                else {"head": head}
            )
    return {}
