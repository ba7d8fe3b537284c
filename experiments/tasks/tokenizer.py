"""Training a tokenizer: GPT-2's kind, a byte-level BPE, so that no text is outside of it."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from experiments.tasks.text import SEPARATOR


def train(documents: Iterable[str], size: int, directory: Path) -> Path:
    """Writes a tokenizer of `size` tokens, one of them the end of text, to `directory`; one that is there is kept."""
    if directory.is_dir():
        return directory
    import tokenizers
    import transformers

    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(documents, vocab_size=size, special_tokens=[SEPARATOR], show_progress=False)
    state = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in state["merges"]]
    fresh = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    transformers.GPT2Tokenizer(vocab=state["vocab"], merges=merges).save_pretrained(fresh)
    fresh.rename(directory)
    return directory
