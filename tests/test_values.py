"""Which of a record's values a text names: texts written by hand, people's texts of E2E, and where the
figures are shown.
"""

import json
import random
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from experiments import config as configs
from experiments.command_line import main
from experiments.metrics import values
from experiments.reports import figures, page, report
from experiments.tasks import generate


_REPOSITORY = Path(__file__).resolve().parent.parent
_RUN = _REPOSITORY / "experiments" / "results" / "e2e_smollm2" / "rates" / "full_3e-4"
# What no table has to know: each wording names one value, and no other of its list.
_VALUES = {
    "Type": ["coffee shop", "pub", "restaurant"],
    "food": ["Chinese", "English", "Fast food", "French", "Indian", "Italian", "Japanese"],
    "area": ["city centre", "riverside"],
    "price": ["cheap", "moderate", "high"],
    "customer rating": ["low", "average", "high"],
    "family friendly": ["yes", "no"],
}
_SAME = {
    **{
        ("price", "less than £ 20"): "cheap",
        ("price", "£ 20 - 25"): "moderate",
        ("price", "more than £ 30"): "high",
    },
    **{("customer rating", f"{n} out of 5"): level for n, level in ((1, "low"), (3, "average"), (5, "high"))},
    ("customer rating", "excellent"): "high",
}


def _level(attribute, value):
    return _SAME.get((attribute, value), value)


def _names(attribute, text):
    """The values of the list that the text names, each asked for by itself."""
    return [value for value in _VALUES[attribute] if values.named({attribute: value}, text)[attribute]]


@pytest.mark.parametrize(
    "attribute, value, text",
    [
        ("Type", "coffee shop", "A café by the sea."),
        ("Type", "pub", "The Mill is a public house"),
        ("Type", "pub", "Two Pubs!"),
        ("food", "Japanese", "It sells sushi , wine and cheese"),
        ("food", "English", "classic British cooking"),
        ("food", "Fast food", "a burger and chips"),
        ("area", "city centre", "in the center of town"),
        ("area", "riverside", "on the banks of the river"),
        ("price", "cheap", "for under £20 a head"),
        ("price", "cheap", "costs 20 pounds or less"),
        ("price", "cheap", "The prices are quite low , and customers rate it highly"),
        ("price", "moderate", "£ 20 - 25"),
        ("price", "moderate", "between 20 and 25 pounds"),
        ("price", "moderate", "reasonably-priced"),
        ("price", "high", "meals are more than £30"),
        ("price", "high", "a high rating and a high price"),
        ("customer rating", "low", "1 out of 5 stars"),
        ("customer rating", "low", "It is not well rated."),
        ("customer rating", "average", "customers rate it 3 of 5"),
        ("customer rating", "average", "ratings are average , prices high"),
        ("customer rating", "high", "one five star place"),
        ("customer rating", "high", "5 out of 5 but low prices"),
        ("family friendly", "yes", "kids are welcome"),
        ("family friendly", "yes", "It is not cheap, but a good place for families."),
        ("family friendly", "yes", "feel free to bring the children"),
        ("family friendly", "no", "It isn't family-friendly."),
        ("family friendly", "no", "it does n't welcome children"),
        ("family friendly", "no", "for adults only"),
        ("family friendly", "no", "a child-free pub"),
        ("family friendly", "no", "non family friendly"),
    ],
)
def test_a_wording_names_its_value_and_no_other(attribute, value, text):
    assert _names(attribute, text) == [value]


@pytest.mark.parametrize(
    "attribute, text",
    [
        ("price", "a high customer rating"),
        ("price", "It has 20 tables and 30 chairs."),
        ("price", "not expensive"),
        ("customer rating", "high prices"),
        ("customer rating", "low prices and a rating"),
        ("area", "near the old town"),
        ("family friendly", "a friendly pub"),
        ("Type", "republican publicity"),
    ],
)
def test_a_trap_names_nothing(attribute, text):
    assert _names(attribute, text) == []


@pytest.mark.parametrize(
    "record, text, found",
    [
        ({"near": "Raja Indian Cuisine", "food": "Indian"}, "near Raja Indian Cuisine", {"near"}),
        (
            {"near": "Raja Indian Cuisine", "food": "Indian"},
            "Indian, near Raja Indian Cuisine",
            {"near", "food"},
        ),
        ({"name": "The Mill", "near": "The Old Mill"}, "by The Old Mill", {"near"}),
        ({"name": "The Mill", "near": "The Old Mill"}, "Mill, by the Old Mill", {"name", "near"}),
        ({"name": "The Mill", "near": "Mill House"}, "by Mill House", {"near"}),
        ({"name": "The Mill"}, "A windmill.", set()),
        ({"name": "The Mill"}, "Mill's food is good", {"name"}),
        ({"near": "Café Sicilia"}, "near cafe sicilia.", {"near"}),
        ({"near": "Cafe\u0301 Sicilia"}, "Café Sicilia", {"near"}),
        ({"name": "Marks & Sons"}, "Marks and Sons", {"name"}),
        ({"name": "Marks and Sons"}, "Marks & Sons", {"name"}),
        ({"name": "Fish (and) Co."}, "a+b", set()),
        ({"name": "東京"}, "東京 is a pub", {"name"}),
        ({"name": "東京"}, "a pub", set()),
        ({"name": "", "near": "!", "food": "", "dogs": ""}, "a pub", set()),
        ({"name": "", "food": ""}, "", set()),
        ({"food": "Indian"}, "Indian food", {"food"}),
        ({"name": "All Bar One", "family friendly": "no"}, "Children should avoid All Bar One.", {"name"}),
        ({"name": "Noah", "family friendly": "yes"}, "Noah is a family place", {"name", "family friendly"}),
        ({"price": "£ 5 - 6", "stars": "4"}, "for £5-6", {"price"}),
    ],
)
def test_names_and_what_is_beside_them(record, text, found):
    assert {attribute for attribute, hit in values.named(record, text).items() if hit} == found


def _e2e_contexts(count=200):
    """Records of all values of E2E, the same for each attribute however it is worded."""
    chance = random.Random(0)
    every = {attribute: list(kinds) for attribute, kinds in _VALUES.items()}
    for attribute, value in _SAME:
        every[attribute].append(value)
    every["near"] = ["Café Rouge", "Raja Indian Cuisine", "All Bar One", "Yippee Noodle Bar"]
    for _ in range(count):
        kept = chance.sample(list(every), chance.randint(1, len(every)))
        yield " | ".join(["name : The Mill", *(f"{kind} : {chance.choice(every[kind])}" for kind in kept)])


def _made_here(count=200):
    chance = random.Random(1)
    return [generate.meaning(chance) for _ in range(count)]


@pytest.mark.parametrize("contexts", [list(_e2e_contexts()), list(map(generate.context, _made_here()))])
def test_a_records_own_words_name_all_of_it(contexts):
    """In any order, and nothing names nothing."""
    whole = {"values": 1, "all_values": 1}
    chance = random.Random(2)
    shuffled = [" | ".join(chance.sample(parts, len(parts))) for parts in (c.split(" | ") for c in contexts)]
    for texts in (contexts, shuffled):
        found = values.score(contexts, texts)
        assert {key: found[key] for key in whole} == whole and set(found["attributes"].values()) == {1}
        assert values.score(texts, contexts)["values"] == 1
    nothing = values.score(contexts, [""] * len(contexts))
    assert nothing["values"] == nothing["all_values"] == 0 and not any(nothing["attributes"].values())


def test_the_texts_that_are_made_here_name_all():
    chance, facts = random.Random(3), _made_here()
    found = values.score(
        list(map(generate.context, facts)), [generate.wording(each, chance) for each in facts]
    )
    assert found["values"] == 1 and set(found["attributes"]) == {"name", *generate.VALUES}


def test_shares_are_of_values_and_of_texts():
    contexts = ["name : Cotto | food : Indian", "name : Zizzi | food : French | area : riverside"]
    assert values.score(contexts, ["Cotto is Indian", "Zizzi is by the river, near Cotto"]) == {
        "values": 4 / 5,
        "all_values": 1 / 2,
        "attributes": {"name": 1, "food": 1 / 2, "area": 1},
    }
    assert values.score(contexts, ["Cotto is Indian"] * 2)["attributes"]["name"] == 1 / 2
    with pytest.raises(ValueError):
        values.score(contexts, ["one text"])


@pytest.mark.parametrize(
    "contexts",
    [[], ["food : Indian"], ["name : Cotto", "once upon a time"], ["name : Cotto | cheap"], [""]],
)
def test_no_records_no_score(contexts):
    assert values.score(contexts, [""] * len(contexts)) is None


def test_peoples_texts_of_e2e(data_dir):
    """What the documentation says of each attribute: of people's texts, how many name the value, and a wrong
    one, which for names is another place of the data set. No attribute has more than 4% of these.
    """
    lines = (data_dir / "e2e" / "lora_nlg_txt" / "test.txt").read_text("utf-8").splitlines()
    contexts, texts = zip(*(line.split("||") for line in lines), strict=True)
    records = [dict(part.split(" : ") for part in context.strip().split(" | ")) for context in contexts]
    every = {attribute: dict.fromkeys(kinds) for attribute, kinds in _VALUES.items()}
    for kind in ("name", "near"):
        every[kind] = dict.fromkeys(record[kind] for record in records if kind in record)
    places = frozenset(every["name"] | every["near"])
    given, wrong = Counter(), Counter()
    for number, (record, text) in enumerate(zip(records, texts, strict=True)):
        others = defaultdict(dict)
        for attribute, value in record.items():
            kinds = [kind for kind in every[attribute] if kind != _level(attribute, value)]
            if attribute in ("name", "near"):  # one of many
                kinds = [kinds[number % len(kinds)]]
            for place, kind in enumerate(kinds):
                others[place][attribute] = kind
        for other in others.values():
            given.update(other.keys())
            found = values.named(other, text, places)
            wrong.update(attribute for attribute, hit in found.items() if hit)
    shares = values.score(contexts, texts)
    mistaken = {name: wrong[name] / given[name] for name in shares["attributes"]}
    assert max(mistaken.values()) < 0.04
    rows = [f"| all values | {100 * shares['values']:.1f} | |"]
    rows += [
        f"| {name} | {100 * share:.1f} | {100 * mistaken[name]:.1f} |"
        for name, share in shares["attributes"].items()
    ]
    rows += [f"| texts with all | {100 * shares['all_values']:.1f} | |"]
    shown = (_REPOSITORY / "docs" / "values_named.md").read_text("utf-8")
    assert not [row for row in rows if f"\n{row}\n" not in shown]


@pytest.fixture
def written(tmp_path, monkeypatch):
    """The scorer's arguments for two records, of whose values the texts name four of five."""
    monkeypatch.setenv("PATH", "")  # no java
    files = {
        "refs": "Cotto serves Indian food .\n\nZizzi is a French place by the river .\n",
        "hyps": "Cotto serves Indian food .\nZizzi is by the river .\n",
        "contexts": "name : Cotto | food : Indian\nname : Zizzi | food : French | area : riverside\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, "utf-8")
    return ["score", "e2e", *(word for name in files for word in (f"--{name}", str(tmp_path / name)))]


def test_score_with_contexts(written, capsys):
    assert main(written) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr", "values", "all_values"]
    assert (found["values"], found["all_values"]) == (0.8, 0.5)
    assert main(written[:-2]) == 0
    without = json.loads(capsys.readouterr().out)
    assert without == {name: found[name] for name in list(found)[:5]}


@pytest.mark.parametrize(
    "contexts, error",
    [
        (
            "name : Cotto\n",
            "has 1 input and the hypotheses are for 2 inputs: contexts need exactly one line an input.",
        ),
        (
            "name : Cotto\nfood : Indian\n",
            "has lines that are no records with a name, such as `name : The Mill | ",
        ),
        ("Cotto\nZizzi\n", "has lines that are no records with a name, such as `name : The Mill | "),
        ("", "is empty."),
        (None, "error: no file `"),
    ],
)
def test_contexts_that_cannot_be_scored(contexts, error, written, capsys):
    file = Path(written[-1])
    file.write_text(contexts, "utf-8") if contexts is not None else file.unlink()
    assert main(written) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and error in said.err and str(file) in said.err


_CONTEXTS = ["name : Cotto | food : Indian", "name : Zizzi | food : French | area : riverside"]
_TEXTS = {
    "before": ["", "Zizzi"],
    "after": ["Cotto is Indian", "Zizzi is by the river"],
    "people": ["Cotto is Indian", "Zizzi is French, by the river"],
}


def _run(directory, name, writers=()):
    """A committed run without test inputs, as if its texts were those of these writers."""
    shutil.copytree(_RUN, directory)
    facts = json.loads((directory / "report.json").read_text("utf-8"))
    facts["scores"] = {"after": {"BLEU": 0.5, "NIST": 8.0, "METEOR": 0.4, "ROUGE_L": 0.6, "CIDEr": 2.0}}
    if writers:
        facts["values"] = {who: values.score(_CONTEXTS, _TEXTS[who]) for who in writers}
    (directory / "report.json").write_text(json.dumps(facts), "utf-8")
    config = json.loads((directory / "config.json").read_text("utf-8")) | {"name": name}
    (directory / "config.json").write_text(json.dumps(config), "utf-8")
    return facts


@pytest.fixture
def bars(monkeypatch):
    """The bars of each figure that is drawn: by writer, the height over each group."""
    drawn, original = [], figures.new_figure

    def kept(*size):
        drawn.append(original(*size))
        return drawn[-1]

    def read(number):
        axes = drawn[number][1]
        groups = [label.get_text().replace("\n", " ") for label in axes.get_xticklabels()]
        middles = {
            bars.get_label(): {
                groups[round(bar.get_x() + bar.get_width() / 2)]: round(bar.get_height(), 1) for bar in bars
            }
            for bars in axes.containers
        }
        colours = {bars.get_label(): bars[0].get_facecolor() for bars in axes.containers}
        assert len(set(colours.values())) == len(colours), "a colour each"
        return middles

    monkeypatch.setattr(figures, "new_figure", kept)
    return read


_AFTER = {"all values": 80.0, "name": 100.0, "food": 50.0, "area": 100.0, "texts with all": 50.0}
_BEFORE = {"all values": 20.0, "name": 50.0, "food": 0.0, "area": 0.0, "texts with all": 0.0}
_PEOPLE = dict.fromkeys(_AFTER, 100.0)


def test_a_report_has_the_table_and_the_figure(tmp_path, bars):
    facts = _run(tmp_path / "run", "tiny", ("after", "before", "people"))
    config = configs.load(_REPOSITORY / "experiments" / "configs" / "e2e_smollm2_full.json")
    report.write(tmp_path / "run", config, facts)
    text = (tmp_path / "run" / "report.md").read_text("utf-8")
    table = text.partition("## Values named (test inputs)")[2]
    assert table.startswith(
        "\n\n| | all values | name | food | area | texts with all |\n|---|---|---|---|---|---|\n"
        "| base, untouched | 20.0 | 50.0 | 0.0 | 0.0 | 0.0 |\n"
        "| this run | 80.0 | 100.0 | 50.0 | 100.0 | 50.0 |\n"
        "| people | 100.0 | 100.0 | 100.0 | 100.0 | 100.0 |\n"
    )
    assert "![values](figures/values.png)" in table
    assert (tmp_path / "run" / "figures" / "values.png").read_bytes().startswith(b"\x89PNG")
    assert bars(1) == {"base, untouched": _BEFORE, "this run": _AFTER, "people": _PEOPLE}
    assert list(bars(1)) == ["base, untouched", "this run", "people"]


@pytest.mark.parametrize("older", [{}, {"values": {}}])
def test_an_older_report_has_neither(older, tmp_path, capsys):
    """As one whose test inputs are no records."""
    run, picture = tmp_path / "run", tmp_path / "values.png"
    facts = _run(run, "tiny") | older
    config = configs.load(_REPOSITORY / "experiments" / "configs" / "e2e_smollm2_full.json")
    text = page.render(config, facts)
    assert "Values named" not in text and "values.png" not in text and "## Scores" in text
    (run / "report.json").write_text(json.dumps(facts), "utf-8")
    assert main(["report", str(run), "--values", str(picture)]) == 1
    said = capsys.readouterr()
    (row,) = _cells(said.out)
    assert (row["rate"], row["values named"], row["texts with all"]) == ("0.0003", "-", "-")
    assert f"error: `{run}` has no values named in its report" in said.err and "Leave it out of" in said.err
    assert not picture.exists()


def _cells(table):
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines())
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_several_runs_beside_each_other(tmp_path, capsys, bars):
    """The base is that of the first run that has it; runs of one name are told apart."""
    runs = {"one": ("after",), "two": ("after", "before", "people"), "three": ("after", "people")}
    for directory, writers in runs.items():
        _run(tmp_path / directory, "same" if directory != "two" else "other", writers)
    facts = json.loads((tmp_path / "three" / "report.json").read_text("utf-8"))
    facts["values"]["before"] = facts["values"]["after"]
    (tmp_path / "three" / "report.json").write_text(json.dumps(facts), "utf-8")
    paths = [tmp_path / directory for directory in runs]
    assert main(["report", *map(str, paths), "--values", str(tmp_path / "values.png")]) == 0
    names = [f"same ({paths[0]})", "other", f"same ({paths[2]})"]
    rows = _cells(capsys.readouterr().out)
    assert [row["run"] for row in rows] == names
    assert [(row["rate"], row["values named"], row["texts with all"]) for row in rows] == [
        ("0.0003", "80.0", "50.0")
    ] * 3
    assert (tmp_path / "values.png").read_bytes().startswith(b"\x89PNG")
    assert list(bars(0)) == ["base, untouched", *names, "people"]
    assert bars(0) == {"base, untouched": _BEFORE, **dict.fromkeys(names, _AFTER), "people": _PEOPLE}


def test_many_runs_have_a_colour_each(tmp_path, bars):
    found = values.score(_CONTEXTS, _TEXTS["after"])
    figures.draw_values({f"run {number}": found for number in range(12)}, "", tmp_path / "values.png")
    assert len(bars(0)) == 12
