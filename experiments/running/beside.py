"""What stands beside the tensors of `merged/`, so that `transformers` pads, cuts and continues as the run
did.

Left out of `generation_config.json`: `decode.no_repeat_ngram`, which there counts the prompt too.
"""

import json
from pathlib import Path
from typing import Any

from experiments.config import Decode
from experiments.decoding.decoder import Decoder


def write(directory: Path, decoder: Any) -> None:
    """Of a model that continues texts, writes `generation_config.json`, and into `tokenizer_config.json` the
    end of text for padding, unless there is one, and the model's number of positions.
    """
    if not isinstance(decoder, Decoder):
        return
    tokenizer, positions = decoder.tokenizer, decoder.model.config.positions
    pad = {} if tokenizer.pad_token is not None else {"pad_token": tokenizer.eos_token}
    longest = {} if positions is None else {"model_max_length": positions}
    _change(directory / "tokenizer_config.json", {**pad, **longest})
    begin = tokenizer.bos_token_id
    ids = {
        # Some tokenizers name none where the model's own config does.
        "bos_token_id": decoder.model.config.bos_token_id if begin is None else begin,
        "eos_token_id": list(decoder.end),
        "pad_token_id": tokenizer.eos_token_id if pad else tokenizer.pad_token_id,
    }
    _change(directory / "generation_config.json", ids | (_search(decoder.section) if decoder.prompts else {}))


def _search(section: Decode) -> dict[str, Any]:
    """`decode`, as `transformers` calls it."""
    found: dict[str, Any] = {"max_new_tokens": section.max_tokens, "do_sample": section.sample is not None}
    if section.sample is not None:
        sample = section.sample
        return found | {
            "temperature": sample.temperature,
            "top_k": sample.top_k or 0,
            "top_p": 1.0 if sample.top_p is None else sample.top_p,
        }
    if section.beams > 1:
        found |= {"num_beams": section.beams, "length_penalty": section.length_penalty}
    return found


def _change(file: Path, values: dict[str, Any]) -> None:
    before = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    file.write_text(
        json.dumps({**before, **values}, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8"
    )


def example(decoder: Any) -> dict[str, Any] | None:
    """None where there is nothing to continue. The first prompt as the model gets it, special tokens
    included, and the tokens that end an answer.
    """
    if not isinstance(decoder, Decoder) or not decoder.prompts:
        return None
    return {
        "text": decoder.tokenizer.decode(decoder.prompts[0].ids, clean_up_tokenization_spaces=False),
        "ends": [decoder.tokenizer.decode([token]) for token in decoder.end],
    }
