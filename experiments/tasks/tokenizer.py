"""Training a tokenizer: GPT-2's kind, a byte-level BPE, so that no text is outside of it."""

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from experiments.tasks.text import SEPARATOR


# Says what a tokenizer was trained on; written with it, in one move.
MARK = "training.json"


def train(documents: Iterable[str], size: int, directory: Path) -> Path:
    """Writes a tokenizer of `size` tokens, one of them the end of text, to `directory`, or finds it there.

    Raises `ValueError` if another one is there, or if the text has too little in it for so many tokens (257
    are the bytes and the end).
    """
    documents = list(documents)
    digest = hashlib.sha256("\0".join(documents).encode()).hexdigest()[:32]
    described = json.dumps({"vocabulary": size, "text": digest}) + "\n"
    if directory.is_dir():
        mark = directory / MARK
        if not mark.is_file() or mark.read_text("utf-8") != described:
            raise ValueError(
                f"`{directory}` holds a tokenizer of another size or text: use another --workdir, or remove "
                "it."
            )
        return directory
    import tokenizers
    import transformers

    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(documents, vocab_size=size, special_tokens=[SEPARATOR], show_progress=False)
    state = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in state["merges"]]
    if len(state["vocab"]) != size:
        raise ValueError(
            f"a vocabulary of {size} tokens was asked for, and the training text gives "
            f"{len(state['vocab'])}: ask for fewer, or give more text."
        )
    fresh = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    transformers.GPT2Tokenizer(vocab=state["vocab"], merges=merges).save_pretrained(fresh)
    (fresh / MARK).write_text(described, "utf-8")
    fresh.rename(directory)
    return directory
