"""Sentences of guests, made here for two of the notebooks: is the guest content?

No adjective and no thing of the test is in training, so that whoever learns words by heart fails, and what
helps is what a pretrained base knows of language. Half of the sentences deny what they say.
"""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np


BAD, GOOD = 0, 1
WORDS = {
    "train": {
        BAD: "bad dirty rude bland useless noisy ugly slow".split(),
        GOOD: "good clean friendly tasty helpful quiet pretty quick".split(),
    },
    "test": {
        BAD: "awful filthy hostile tasteless broken dreadful shabby boring".split(),
        GOOD: "excellent spotless polite delicious generous wonderful elegant charming".split(),
    },
}
THINGS = {
    "train": "room bed food service staff bar".split(),
    "test": "kitchen garden waiter soup lobby pool".split(),
}
SAID = (
    "The {} was {}.",
    "We found the {} {}.",
    "I would call the {} {}.",
    "Everybody says that the {} is {}.",
)
DENIED = (
    "The {} was not {}.",
    "We never found the {} {}.",
    "Nobody would call the {} {}.",
    "The {} was anything but {}.",
)


def rows(split: str, count: int, seed: int) -> Iterator[tuple[str, int]]:
    """`count` sentences of "train" or "test", each with its label."""
    chance = random.Random(seed)
    for _ in range(count):
        label, denied = chance.randrange(2), chance.random() < 0.5
        word = chance.choice(WORDS[split][1 - label if denied else label])
        yield chance.choice(DENIED if denied else SAID).format(chance.choice(THINGS[split]), word), label


def arrays(tokenizer: Any, split: str, count: int, seed: int) -> dict[str, np.ndarray]:
    """The same as `ids` and `mask`, (count, tokens), and `label`, (count,). The tokenizer pads."""
    texts, labels = zip(*rows(split, count, seed), strict=True)
    found = tokenizer.encode_batch(list(texts))
    return {
        "ids": np.array([each.ids for each in found]),
        "mask": np.array([each.attention_mask for each in found]),
        "label": np.array(labels),
    }
