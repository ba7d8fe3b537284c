"""What several commands share: the type of the table that they enter, and the types of their options."""

import argparse
import math
from typing import TypeAlias


# As `add_subparsers` returns it.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
# What `--to` or `--format` takes, and what each writes.
FORMATS = ("hf", "peft", "loralib", "gguf")
WRITES = (
    "hf: the model with the adapter merged, for from_pretrained; peft, loralib, gguf: the adapter, gguf for "
    "llama.cpp"
)
TARGET = "a directory; for loralib a file .pt or .bin, for gguf a file .gguf"


def alpha(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no number")
    # As configs spell it: 32, not 32.0.
    return int(value) if value.is_integer() else value


def blocks(text: str) -> tuple[bool, ...]:
    words = text.split(",")
    if not set(words) <= {"0", "1"}:
        raise argparse.ArgumentTypeError(f"{text!r} is not a 0 or 1 for each block, such as 1,0,1")
    return tuple(word == "1" for word in words)
