"""A data set in E2E's form, made here: places to stay, their attributes, and several wordings of each.

Nothing is downloaded and nothing is anybody else's, so the demo runs from the repository alone. `write`
leaves

    train.txt valid.txt test.txt  `name : Otter Landing | Type : inn | …||wording`, several wordings a meaning

Meanings of one file are in no other, and the whole is a function of the config's `generate` section.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any


FIRST = (
    "Amber Birch Clover Copper Falcon Fern Granite Heron Juniper Lantern Maple Marble Otter Raven Saffron "
    "Sparrow Thistle Willow"
)
SECOND = "Corner Court Farm Gate Haven Hollow Landing Loft Mill Perch Rest Row Terrace Yard"
PLACES = (
    "Mill Bridge|North Station|the ferry pier|the glass works|Kestrel Lake|the town museum|Saint Olaf "
    "Square|the old brewery"
)

VALUES = {
    "Type": ["inn", "lodge", "hostel", "guesthouse", "cabin", "campsite"],
    "price": ["low", "moderate", "high", "less than 40", "40 - 80", "more than 80"],
    "rating": ["2 out of 5", "3 out of 5", "5 out of 5", "poor", "average", "excellent"],
    "area": ["old town", "lakeside", "harbour", "forest edge", "mountain pass"],
    "dogs": ["yes", "no"],
    "near": PLACES.split("|"),
}
# How often a meaning has each attribute; the name it always has.
PRESENT = {"Type": 0.9, "price": 0.6, "rating": 0.6, "area": 0.7, "dogs": 0.5, "near": 0.5}

WHERE: dict[str, Any] = {
    "area": {
        "old town": ["in the old town", "in the heart of the old town"],
        "lakeside": ["by the lakeside", "on the lakeside"],
        "harbour": ["at the harbour", "down by the harbour"],
        "forest edge": ["at the forest edge", "along the forest edge"],
        "mountain pass": ["up on the mountain pass", "on the mountain pass"],
    },
    "near": ["near {}", "close to {}", "a short walk from {}"],
}
PRICE_WORDS = ["has {} prices", "asks {} prices"]
PRICE_AMOUNTS = ["costs {} a night", "charges {} for a room"]
RATING_WORDS = ["is rated {} by its guests", "has {} reviews"]
RATING_STARS = ["is rated {}", "scores {} with its guests"]
DOGS = {
    "yes": ["welcomes dogs", "is happy to take dogs"],
    "no": ["does not allow dogs", "asks you to leave dogs at home"],
}

Meaning = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Generate:
    """The project's own data set in E2E's form, made in the work directory; `data` then names files of it.

    `meanings` to train on and `held_out` ones for validation and for test, each in `references` wordings."""

    seed: int
    meanings: int
    held_out: int
    references: int


def meaning(chance: random.Random) -> Meaning:
    """A name and at least two further attributes, in the order of `VALUES`."""
    name = f"{chance.choice(FIRST.split())} {chance.choice(SECOND.split())}"
    while True:
        rest = [
            (key, chance.choice(values)) for key, values in VALUES.items() if chance.random() < PRESENT[key]
        ]
        if len(rest) >= 2:
            return (("name", name), *rest)


def context(facts: Meaning) -> str:
    return " | ".join(f"{name} : {value}" for name, value in facts)


def wording(facts: Meaning, chance: random.Random) -> str:
    """One way to say it: where and what in the first sentence, the other facts in one or two more, or all
    in one.
    """
    known = dict(facts)
    name, kind = known["name"], known.get("Type")
    noun = f"{'an' if kind == 'inn' else 'a'} {kind}" if kind else "a place to stay"
    where = []
    if "area" in known:
        where.append(chance.choice(WHERE["area"][known["area"]]))
    if "near" in known:
        where.append(chance.choice(WHERE["near"]).format(known["near"]))
    said = _predicates(known, chance)

    style = chance.randrange(3)
    if style == 0 and where:
        opening = f"{_capital(' , '.join(where))} you will find {name} , {noun}"
        return _sentences([opening, *_joined(said, chance, "It")])
    if style == 1 and said:
        described = f"{noun} {' , '.join(where)}".strip()
        return _sentences([f"{name} , {described} , {said[0]}", *_joined(said[1:], chance, "It also")])
    opening = " ".join([name, "is", noun, " , ".join(where)]).strip()
    return _sentences([opening, *_joined(said, chance, f"This {kind}" if kind else "This place")])


def _predicates(known: dict[str, str], chance: random.Random) -> list[str]:
    said = []
    if price := known.get("price"):
        phrases = PRICE_AMOUNTS if any(letter.isdigit() for letter in price) else PRICE_WORDS
        said.append(chance.choice(phrases).format(price))
    if rating := known.get("rating"):
        said.append(chance.choice(RATING_STARS if "out of" in rating else RATING_WORDS).format(rating))
    if dogs := known.get("dogs"):
        said.append(chance.choice(DOGS[dogs]))
    chance.shuffle(said)
    return said


def _joined(said: list[str], chance: random.Random, subject: str) -> list[str]:
    """One sentence for all, or the last one apart."""
    if len(said) > 1 and chance.random() < 0.5:
        return [f"{subject} {' and '.join(said[:-1])}", f"It {said[-1]}"]
    return [f"{subject} {' and '.join(said)}"] if said else []


def _sentences(parts: list[str]) -> str:
    return " ".join(f"{part} ." for part in parts)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def write(section: Generate, directory: Path) -> Path:
    """Writes the whole data set to `directory`, or finds it there. Raises `ValueError` if another one is."""
    described = json.dumps(section.__dict__, sort_keys=True) + "\n"
    # Written last: a directory without it was not finished, and is written anew.
    mark = directory / "generate.json"
    if mark.is_file():
        if mark.read_text("utf-8") != described:
            raise ValueError(
                f"`{directory}` holds data of another `generate` section: {mark.read_text('utf-8').strip()}."
            )
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    chance = random.Random(section.seed)
    counts = {"train": section.meanings, "valid": section.held_out, "test": section.held_out}
    seen: set[Meaning] = set()
    for split, count in counts.items():
        lines = []
        for facts in _distinct(count, seen, chance):
            wordings = [wording(facts, chance) for _ in range(section.references)]
            lines += [f"{context(facts)}||{text}\n" for text in dict.fromkeys(wordings)]
        (directory / f"{split}.txt").write_text("".join(lines), "utf-8")
    mark.write_text(described, "utf-8")
    return directory


def _distinct(count: int, seen: set[Meaning], chance: random.Random) -> list[Meaning]:
    """`count` meanings that were never drawn before."""
    found: list[Meaning] = []
    while len(found) < count:
        facts = meaning(chance)
        if facts not in seen:
            seen.add(facts)
            found.append(facts)
    return found
