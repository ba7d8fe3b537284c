"""WebNLG and DART: their files, what is made of them, and what a run writes and scores."""

import json
import lzma
from pathlib import Path

import pytest
import small_base

import experiments
from experiments import config as configs
from experiments.config import E2EData
from experiments.running.base import load_tokenizer
from experiments.running.finish import scored
from experiments.tasks import dart, prepare, read, TASKS, triples, webnlg
from experiments.tasks.dart import DARTData
from experiments.tasks.examples import Prompt
from experiments.tasks.webnlg import WebNLGData
from experiments.training import order


XML = """<?xml version="1.0" encoding="UTF-8"?>
<benchmark><entries>
<entry category="{category}" eid="Id1" size="2">
  <originaltripleset><otriple>A | b | C</otriple></originaltripleset>
  <modifiedtripleset>
    <mtriple>Aarhus | leaderName | Jacob</mtriple>
    <mtriple>Aarhus | in | Å</mtriple>
  </modifiedtripleset>
  <lex comment="good" lid="Id1">Jacob leads Aarhus.</lex>
  <lex comment="bad" lid="Id2">Jacob Aarhus.</lex>
</entry></entries></benchmark>"""
CONFIGS = Path(experiments.__file__).parent / "configs"
CONTEXT = "Aarhus : leaderName : Jacob | Aarhus : in : Å"


@pytest.fixture(scope="module")
def small_tokenizer():
    return load_tokenizer(small_base.TOKENIZER)


@pytest.fixture
def files(data_dir):
    """The directory of both challenges, or a skip."""
    if not (data_dir / "webnlg2017").is_dir() or not (data_dir / "dart").is_dir():
        pytest.skip(
            f"no webnlg2017/ and dart/ at {data_dir}: set LORA_JAX_DATA to the directory that holds them"
        )
    return data_dir


@pytest.fixture
def written(tmp_path):
    """A seen entry to train on, and one seen and one unseen entry to test."""
    (tmp_path / "train.xml").write_text(XML.format(category="City"), "utf-8")
    entries = [
        {
            "category": category,
            "modifiedtripleset": [{"subject": f"S{number}", "property": "Is", "object": "O"}],
            "lexicalisations": [{"comment": "good", "lex": f"It is  {each} ."} for each in range(count)],
        }
        for number, (category, count) in enumerate((("Food", 8), ("Artist", 1)))
    ]
    numbered = {"entries": [{str(number): entry} for number, entry in enumerate(entries, 1)]}
    with lzma.open(tmp_path / "test.json.xz", "wt", encoding="utf-8") as file:
        json.dump(numbered, file)
    return tmp_path


# -- the real files ------------------------------------------------------------------------------------------


def test_both_forms_of_webnlg_are_the_same(files):
    ours = triples.read_file(files / "webnlg2017" / "testdata_with_lex.xml")
    authors = triples.read_file(files / "webnlg2017" / "test.json.xz")
    assert ours == authors and len(ours) == 1862
    parts = [webnlg.part_of(entry) for entry in ours]
    assert parts == ["seen"] * 971 + ["unseen"] * 891
    assert TASKS["webnlg"].parts == {"seen": range(971), "unseen": range(971, 1862)}


def test_sizes_of_webnlg(files, small_tokenizer):
    """Rows and contexts as the authors' converter has them."""
    names = (f"webnlg2017/{split}.json.xz" for split in ("train", "dev", "test"))
    section = WebNLGData("webnlg", *names, max_rows=2, max_valid_rows=2)
    found = read(section, files)
    rows = {split: sum(len(webnlg.rows_of(entry)) for entry in found[split]) for split in found}
    assert {split: len(found[split]) for split in found} == {"train": 6940, "valid": 872, "test": 1862}
    assert rows == {"train": 18025, "valid": 2258, "test": 4928}
    prompts = prepare(section, found, small_tokenizer).prompts
    assert len(prompts) == 1862 and max(len(prompt.references) for prompt in prompts) == 6
    assert [prompt.part for prompt in prompts] == ["seen"] * 971 + ["unseen"] * 891
    train = configs.load(CONFIGS / "webnlg_gpt2_medium.json").train
    assert train.steps == 5 * order.batches_per_epoch(rows["train"], train.batch), "five epochs"


def test_inputs_without_wordings(files):
    entries = triples.read_file(files / "webnlg2017" / "testdata_no_lex.xml")
    assert len(entries) == 1862 and all(webnlg.rows_of(entry)[0][1] == "" for entry in entries)


def test_dart_as_its_reference_files_have_it(files):
    """The challenge's three files are the first three wordings of each entry, as a run writes them."""
    entries = triples.read_file(files / "dart" / "dart-v1.1.1-full-test.xml.xz")
    assert len(entries) == 5097 and sum(len(entry.wordings) for entry in entries) == 12552
    for place in range(3):
        lines = (files / "dart" / f"all-delex-reference{place}.lex").read_text("utf-8").split("\n")[:-1]
        ours = [
            dart.as_scored(entry.wordings[place][1]) if len(entry.wordings) > place else ""
            for entry in entries
        ]
        assert sum(one != line.strip() for one, line in zip(ours, lines, strict=True)) <= 1, (
            "a capital I with a dot of its own is two letters in lower case"
        )


def test_dart_of_json(files, small_tokenizer):
    """Properties are lower-cased, and entries of the same triples are one input."""
    name = "dart/dart-v1.1.1-full-dev.json.xz"
    section = DARTData("dart", name, name, name, max_rows=2, max_valid_rows=2)
    found = read(section, files)
    assert len(found["valid"]) == 6980
    assert found["valid"][0] == (
        "Mars Hill College : joined : 1973 | Mars Hill College : location : Mars Hill, North Carolina",
        "A school from Mars Hill, North Carolina, joined in 1973.",
    )
    prompts = prepare(section, found, small_tokenizer).prompts
    assert len({prompt.text for prompt in prompts}) == len(prompts) == len(dict(found["test"]))


# -- small files ---------------------------------------------------------------------------------------------


def test_good_wordings_of_an_entry(written):
    section = WebNLGData("webnlg", "train.xml", "train.xml")
    assert [webnlg.rows_of(entry) for entry in read(section, written)["train"]] == [
        [(CONTEXT, "Jacob leads Aarhus.")]
    ]
    section = DARTData("dart", "train.xml", "train.xml")
    assert read(section, written)["train"] == [
        (CONTEXT.replace("leaderName", "leadername"), text)
        for text in ("Jacob leads Aarhus.", "Jacob Aarhus.")
    ]


def test_examples_and_prompts(written, small_tokenizer):
    """enc(context) + end, enc(" " + wording) + end; six references at most."""
    section = WebNLGData("webnlg", "train.xml", "train.xml", "test.json.xz")
    splits = prepare(section, read(section, written), small_tokenizer)
    end = small_tokenizer.eos_token_id
    encoded = [
        small_tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (CONTEXT, " Jacob leads Aarhus.")
    ]
    assert splits.train.ids(0).tolist() == [*encoded[0], end, *encoded[1], end] and len(splits.train) == 1
    assert [(prompt.text, prompt.part) for prompt in splits.prompts] == [
        ("S0 : Is : O", "seen"),
        ("S1 : Is : O", "unseen"),
    ]
    assert splits.prompts[0].references == tuple(f"It is  {each} ." for each in range(6))


@pytest.mark.parametrize("part, texts", [("seen", ["S0 : Is : O"]), ("unseen", ["S1 : Is : O"])])
def test_a_filter_chooses_test_inputs(written, small_tokenizer, part, texts):
    section = WebNLGData("webnlg", "train.xml", "train.xml", "test.json.xz", filter=part)
    splits = prepare(section, read(section, written), small_tokenizer)
    assert [prompt.text for prompt in splits.prompts] == texts and len(splits.train) == 1


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", "", "neither .xml nor .json"),
        ("a.xml", "<benchmark>", "`.*a.xml` cannot be read"),
        ("a.json", "{", "`.*a.json` cannot be read"),
        ("a.json", "{}", "neither `entries`, as WebNLG's files, nor a list, as DART's"),
        (
            "a.json",
            '[{"tripleset": [["a", "b"]], "annotations": []}]',
            "entry 1 is not of the challenge's form",
        ),
        ("a.json", '{"entries": [{"1": {"category": "Food"}}]}', "entry 1 is not of .*modifiedtripleset"),
        ("a.json", '[{"tripleset": [], "annotations": []}]', "entry 1 has no triples"),
        ("a.json.xz", "not xz", "cannot be read"),
        ("a.json", "[]", "the data set `a.json` is empty"),
    ],
)
def test_bad_files_name_the_entry(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read(DARTData("dart", name, name), tmp_path)


def test_training_needs_wordings(written):
    (written / "mute.json").write_text('[{"tripleset": [["a", "b", "c"]], "annotations": []}]')
    with pytest.raises(ValueError, match="the data set `mute.json` is empty"):
        read(DARTData("dart", "mute.json", "mute.json"), written)
    text = XML.format(category="City")
    (written / "mute.xml").write_text(text[: text.index("<lex")] + "</entry></entries></benchmark>", "utf-8")
    with pytest.raises(ValueError, match="example 1 of `mute.xml` has no reference"):
        read(WebNLGData("webnlg", "mute.xml", "mute.xml"), written)
    with pytest.raises(FileNotFoundError, match="no data file"):
        read(WebNLGData("webnlg", "absent.xml", "absent.xml"), written)


# -- what a run scores ---------------------------------------------------------------------------------------


def test_parts_are_scored_by_themselves(monkeypatch):
    monkeypatch.setenv("PATH", "")  # no java
    same = ("It is a pub in the city.",)
    prompts = [Prompt("a", (1,), same, "seen"), Prompt("b", (1,), same, "unseen")]
    found = scored(
        TASKS["webnlg"], prompts, ["it is a pub in the city .", "A pub!"], tell=lambda reason: None
    )
    assert list(found)[:4] == ["BLEU", "METEOR", "TER", "BLEU seen"] and len(found) == 9
    assert found["BLEU seen"] == 1.0 and found["TER seen"] == 0.0 and found["METEOR unseen"] is None
    assert found["TER unseen"] == pytest.approx(6 / 8) and found["TER"] == pytest.approx(3 / 8)
    alone = scored(TASKS["webnlg"], prompts[:1], ["It is a pub."], tell=lambda reason: None)
    assert list(alone) == ["BLEU", "METEOR", "TER"], "a part of its own is all"


def test_dart_is_scored_in_the_challenge_s_form(monkeypatch):
    monkeypatch.setenv("PATH", "")
    prompts = [Prompt("a", (1,), ("Hawaii Five-O, in 1982.",))]
    found = scored(TASKS["dart"], prompts, ["hawaii five - O , in 1982 ."], tell=lambda reason: None)
    assert found == {"BLEU": 1.0, "METEOR": None, "TER": 0.0}


def test_every_task_says_its_name():
    for name, task in TASKS.items():
        assert task.name == name
    assert TASKS["e2e"].section is E2EData
