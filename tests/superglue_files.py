"""The files of SuperGLUE in miniature: objects of the official form, in the words of `glue_files`."""

import json

from glue_files import NOUNS, texts


DIRECTORIES = {
    "boolq": "BoolQ",
    "cb": "CB",
    "copa": "COPA",
    "multirc": "MultiRC",
    "record": "ReCoRD",
    "rte": "RTE",
    "wic": "WiC",
    "wsc": "WSC",
}
COMMITMENTS = ("entailment", "contradiction", "neutral")


def row(name, number, idx, labelled=True):
    """An object of the set; of a test set it has no label."""
    one, two = texts(number)
    label, fields = {
        "boolq": lambda: (number % 2 == 0, {"question": one, "passage": two}),
        "cb": lambda: (COMMITMENTS[number % 3], {"premise": one, "hypothesis": two}),
        "rte": lambda: (("entailment", "not_entailment")[number % 2], {"premise": one, "hypothesis": two}),
        "copa": lambda: (number % 2, _alternatives(number)),
        "wic": lambda: (number % 2 == 0, _word(number)),
        "wsc": lambda: (number % 2 == 0, _spans(number)),
        "multirc": lambda: (None, _paragraph(number, idx, labelled)),
        "record": lambda: (None, _article(number, idx, labelled)),
    }[name]()
    found = {**fields, "idx": idx}
    return found if label is None or not labelled else {**found, "label": label}


def _alternatives(number):
    one, two = texts(number)
    choices = [two, "the pub waits again"]
    return {
        "premise": one,
        **dict(zip(("choice1", "choice2"), choices[:: 1 - 2 * (number % 2)], strict=True)),
        "question": ("cause", "effect")[number % 3 == 0],
    }


def _word(number):
    one, two = texts(number)
    noun = NOUNS[number % len(NOUNS)]
    return {
        "word": noun,
        "sentence1": one,
        "sentence2": two,
        **{"start1": 4, "end1": 4 + len(noun), "start2": 4, "end2": 4 + len(noun), "version": 1.1},
    }


def _spans(number):
    noun = NOUNS[number % len(NOUNS)]
    text = f"The {noun} never waits, {noun} again, because it moves."
    target = {"span1_index": 0, "span1_text": f"The {noun}", "span2_index": 7, "span2_text": "it"}
    return {"text": text, "target": target}


def _paragraph(number, idx, labelled):
    one, two = texts(number)
    text = f"<b>Sent 1: </b>{one}<br><b>Sent 2: </b>{two}<br>"

    def answer(place):
        right = {"label": int((number + place) % 2 == 0)} if labelled else {}
        return {"text": f"the {NOUNS[place % len(NOUNS)]}", "idx": 5 * idx + place, **right}

    questions = [
        {"question": "Who opens?", "answers": [answer(place) for place in (0, 1)], "idx": 2 * idx},
        {"question": "Who waits?", "answers": [answer(place) for place in (2, 3, 4)], "idx": 2 * idx + 1},
    ]
    return {"version": 1.1, "passage": {"text": text, "questions": questions}}


def _article(number, idx, labelled):
    names = [f"the {NOUNS[(number + place) % len(NOUNS)]}" for place in range(2 + number % 2)]
    answer = names[number % 2]
    text = f"{' moves, '.join([*names, answer])} waits\n@highlight\nthe town opens"
    starts = [text.index(name) for name in names] + [text.rindex(answer)]
    entities = [
        {"start": start, "end": start + len(name) - 1}
        for start, name in zip(starts, [*names, answer], strict=True)
    ]
    query = {"query": "again @placeholder waits", "idx": idx}
    if labelled:
        query["answers"] = [{"start": starts[-1], "end": len(text), "text": answer}]
    passage = {"text": text, "entities": entities}
    return {"source": "Daily mail", "passage": passage, "qas": [query]}


def write(directory, name, rows=12, held_out=6):
    """Writes the files of a set below `directory`, as the benchmark's archives have them."""
    place = directory / DIRECTORIES[name]
    place.mkdir(parents=True, exist_ok=True)
    splits = {"train": (rows, 0), "val": (held_out, rows), "test": (held_out, rows + 50)}
    for split, (count, start) in splits.items():
        objects = [row(name, start + idx, idx, split != "test") for idx in range(count)]
        (place / f"{split}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in objects))
    return place
