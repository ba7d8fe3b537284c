"""The E2E data set in all its forms, plain text, generated data, batches, and the order in which they are
seen.
"""

import dataclasses
import lzma
from pathlib import Path

import datasets
import gguf_files
import numpy as np
import pytest
import small_base

import experiments
from experiments import config as configs
from experiments.config import E2EData, Generate, TextData
from experiments.decoding.decoder import end_tokens
from experiments.running.base import load_tokenizer
from experiments.strict_json import build
from experiments.tasks import e2e, examples, generate, text, tokenizer
from experiments.training import order
from lora_jax.interop import gguf


FILES = [
    ("trainset.csv.xz", "train.txt.xz", 42061),
    ("devset.csv", "valid.txt", 4672),
    ("testset_w_refs.csv", "test.txt", 4693),
]
CONFIGS = Path(experiments.__file__).parent / "configs"
SECTION = Generate(seed=1, meanings=12, held_out=4, references=3)


@pytest.fixture(scope="module")
def gpt2_tokenizer(data_dir):
    return load_tokenizer(data_dir / "gpt2_bpe")


@pytest.fixture(scope="module")
def small_tokenizer():
    return load_tokenizer(small_base.TOKENIZER)


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    return generate.write(SECTION, tmp_path_factory.mktemp("generated"))


@pytest.mark.parametrize("table, lines, count", FILES)
def test_both_formats_give_the_same_contexts(data_dir, table, lines, count):
    ours = e2e.read_file(data_dir / "e2e" / table)
    authors = e2e.read_file(data_dir / "e2e" / "lora_nlg_txt" / lines)
    assert len(ours) == len(authors) == count
    assert [context for context, _ in ours] == [context for context, _ in authors]


def test_inputs_without_references(data_dir):
    rows = e2e.read_file(data_dir / "e2e" / "testset.csv")
    assert len(rows) == 630
    assert all(not reference for _, reference in rows)


def test_through_datasets(data_dir, tmp_path):
    """Files handed to `datasets`, a directory of files, and what `save_to_disk` leaves: the rows of our
    own reader.
    """
    for kind, name in (("csv", "devset.csv"), ("text", "lora_nlg_txt/valid.txt")):
        expected = e2e.read_file(data_dir / "e2e" / name)
        loaded = datasets.load_dataset(
            kind, data_files={"validation": str(data_dir / "e2e" / name)}, cache_dir=str(tmp_path / "cache")
        )
        assert e2e.rows_of(loaded["validation"], name) == expected
        loaded.save_to_disk(tmp_path / kind)
        assert e2e.read_datasets(kind, "validation", tmp_path) == expected
    folder = tmp_path / "folder"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.csv").write_text('mr,ref\n"name[A], area[riverside]","A is by the river."\n')
    assert e2e.read_datasets("folder", "train", tmp_path) == [
        ("name : A | area : riverside", "A is by the river.")
    ]
    with pytest.raises(ValueError, match="has the splits train, test, not `valid`"):
        e2e.read_datasets("folder", "valid", tmp_path)


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "a.txt",
            "one||two\nno separator\n",
            r"row 2: expected exactly one `\|\|` .* found 0 in 'no separator'",
        ),
        ("a.txt", "a||b||c\n", "row 1: .* found 2"),
        ("a.csv", 'mr,ref\n"name[A]",x\n"name A",y\n', "row 3: the meaning 'name A' is not of the form"),
        ("a.csv", "x,y\n1,2\n", "has the columns x, y; expected mr,ref"),
        ("a.json", "{}", "neither .csv nor .txt"),
        ("a.txt.xz", "not xz", "cannot be read"),
    ],
)
def test_bad_files_name_the_row(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        e2e.read_file(tmp_path / name)


def test_missing_empty_and_without_references(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "mute.csv").write_text("mr\nname[A]\n")
    with pytest.raises(FileNotFoundError, match="no data file"):
        e2e.read(E2EData("e2e", "absent.txt", "absent.txt"), tmp_path)
    with pytest.raises(ValueError, match="the data set `empty.txt` is empty"):
        e2e.read(E2EData("e2e", "empty.txt", "empty.txt"), tmp_path)
    with pytest.raises(ValueError, match="example 1 of `mute.csv` has no reference"):
        e2e.read(E2EData("e2e", "mute.csv", "mute.csv"), tmp_path)


def test_ids_of_the_first_example(gpt2_tokenizer, data_dir):
    """enc(context) + [50256], enc(" " + completion) + [50256]; the ids were computed by hand from the
    published vocabulary.
    """
    (pair,) = e2e.encode(e2e.read_file(data_dir / "e2e" / "lora_nlg_txt" / "valid.txt")[:1], gpt2_tokenizer)
    pieces = [gpt2_tokenizer.convert_ids_to_tokens(ids) for ids in pair]
    assert pieces[0][:6] == ["name", "Ġ:", "ĠAl", "iment", "um", "Ġ|"] and pieces[0][-1] == "<|endoftext|>"
    assert pieces[1][:3] == ["ĠThere", "Ġis", "Ġa"] and pieces[1][-2:] == ["Ġ.", "<|endoftext|>"]
    assert pair[0][-1] == pair[1][-1] == 50256


def whole(batch):
    """Labels and mask of every position, as the authors have them, from those of the counted columns."""
    labels, mask = np.zeros((2, *batch["input_ids"].shape), int)
    for row, column in zip(*np.nonzero(batch["mask"]), strict=True):
        place = row, batch["columns"][row, column]
        assert not mask[place], "no position is counted twice"
        labels[place], mask[place] = batch["labels"][row, column], 1
    return labels.tolist(), mask.tolist()


def test_batch_is_the_authors():
    """Padded with 0, targets one to the left, the mask from len(context) - 1 for each token of the
    completion.
    """
    data = examples.Examples([([5, 6, 9], [7, 8, 9]), ([5, 9], [7, 9])], seq_len=8)
    batch = data.batch(np.array([0, 1]))
    assert batch["input_ids"].tolist() == [[5, 6, 9, 7, 8, 9, 0, 0], [5, 9, 7, 9, 0, 0, 0, 0]]
    labels, mask = whole(batch)
    assert labels == [[0, 0, 7, 8, 9, 0, 0, 0], [0, 7, 9, 0, 0, 0, 0, 0]]
    assert mask == [[0, 0, 1, 1, 1, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0, 0]]
    assert not batch["columns"][batch["mask"] == 0].any(), "what fills up a row is a column that exists"


def test_a_batch_is_as_wide_as_its_longest_example_and_completion():
    """To the next width: what is cut off is padding."""
    pairs = [([5] * 10, [7] * 10), ([5] * 2, [7] * 3), ([5] * 30, [7] * 17), ([5] * 10, [7] * 36)]
    data, wide = (
        examples.Examples(pairs, seq_len=56),
        examples.Examples([*pairs, ([5], [7] * 60)], seq_len=56),
    )
    for rows, width, columns in (
        ([1], 16, 16), ([0, 1], 32, 16), ([1, 2], 48, 32), ([0, 1, 2, 3], 48, 48), ([-1, 0], 32, 16)
    ):  # fmt: skip
        narrow, broad = data.batch(np.array(rows)), wide.batch(np.array([*rows, 4]))
        for name, array in narrow.items():
            end = width if name == "input_ids" else columns
            assert array.shape == (len(rows), end)
            if -1 not in rows:
                np.testing.assert_array_equal(np.pad(array, [(0, 0), (0, 56 - end)]), broad[name][:-1])
    assert not narrow["mask"][0].any(), "-1 is none"


def test_widths_are_few_and_close():
    """A quarter of a power of two apart at most, and never below what is asked for."""
    widths = [examples.padded_width(longest, 1024) for longest in range(1, 1025)]
    assert sorted(set(widths))[:9] == [16, 32, 48, 64, 80, 96, 112, 128, 160]
    assert len(set(widths)) == 8 + 3 * 4
    for longest, width in enumerate(widths, 1):
        assert longest <= width < max(longest + 16, 1.25 * longest)
    assert examples.padded_width(0, 1024) == 16, "a batch of which nothing is counted has a shape too"


@pytest.mark.parametrize("seq_len, labels", [(5, [0, 0, 7, 8, 0]), (3, [0, 0, 0]), (2, [0, 0])])
def test_truncation_is_the_authors(seq_len, labels):
    """Inputs lose their end, and n = kept inputs - len(context) tokens are counted."""
    batch = examples.Examples([([5, 6, 9], [7, 8, 9])], seq_len).batch(np.array([0]))
    assert batch["input_ids"].tolist() == [[5, 6, 9, 7, 8, 9][:seq_len]]
    assert whole(batch) == ([labels], [[int(label > 0) for label in labels]])


def test_too_long_is_refused_by_name(generated, small_tokenizer):
    section = E2EData("e2e", "train.txt", "valid.txt", seq_len=10)
    with pytest.raises(
        ValueError,
        match=r"example 1 of `train.txt` \('name : .*'\) has \d+ tokens, more than `data.seq_len` \(10\)",
    ):
        e2e.prepare(section, e2e.read(section, generated), small_tokenizer)
    section = E2EData("e2e", "train.txt", "valid.txt", seq_len=10, truncate=True)
    assert e2e.prepare(section, e2e.read(section, generated), small_tokenizer).train.batch(np.array([0]))[
        "input_ids"
    ].shape == (1, 10)


def test_prompts_are_grouped_by_context(generated, small_tokenizer):
    section = E2EData("e2e", "train.txt", "valid.txt", "test.txt", max_rows=5, max_valid_rows=3)
    splits = e2e.prepare(section, e2e.read(section, generated), small_tokenizer)
    assert (len(splits.train), len(splits.valid)) == (5, 3)
    assert len(splits.prompts) == SECTION.held_out
    first = splits.prompts[0]
    assert (
        small_tokenizer.decode(first.ids[:-1]) == first.text and first.ids[-1] == small_tokenizer.eos_token_id
    )
    assert 1 <= len(first.references) <= SECTION.references


def test_a_prompt_has_every_wording_that_there_is(small_tokenizer):
    """In the order of the file, wherever they stand, one that is repeated twice, and none that is empty."""
    rows = [("b", ""), ("a", "one"), ("b", "three"), ("a", "two"), ("a", "one"), ("a", ""), ("c", "")]
    section = E2EData("e2e", "train.txt", "valid.txt", "test.txt")
    splits = e2e.prepare(
        section, {"train": [("a", "x")], "valid": [("a", "x")], "test": rows}, small_tokenizer
    )
    found = [(prompt.text, prompt.references) for prompt in splits.prompts]
    assert found == [("b", ("three",)), ("a", ("one", "two", "one")), ("c", ())]


def test_generated_data(generated, tmp_path):
    again = generate.write(SECTION, tmp_path / "again")
    for name in ("train.txt", "valid.txt", "test.txt"):
        assert (again / name).read_bytes() == (generated / name).read_bytes(), "a function of its section"
    meanings = [
        {context for context, _ in e2e.read_file(generated / f"{split}.txt")}
        for split in ("train", "valid", "test")
    ]
    assert [len(found) for found in meanings] == [12, 4, 4]
    assert len(set.union(*meanings)) == 20, "no meaning is in two files"
    with pytest.raises(ValueError, match="another `generate` section"):
        generate.write(Generate(2, 12, 4, 3), again)


@pytest.mark.parametrize("suffix", ["txt", "txt.xz", "txt.zst"])
def test_text_is_packed(small_tokenizer, tmp_path, suffix):
    content = "First döcument.\n<|endoftext|>\nSecond one.\n"
    path = tmp_path / f"a.{suffix}"
    if suffix == "txt.zst":
        import pyarrow

        with pyarrow.output_stream(str(path), compression="zstd") as stream:
            stream.write(content.encode())
    else:
        path.write_bytes(lzma.compress(content.encode()) if suffix.endswith("xz") else content.encode())
    parts = text.documents(text.read_file(path))
    assert parts == ["First döcument.", "Second one."]
    # Nine bytes end inside the two-byte letter, which is left out.
    assert [text.read_file(path, limit) for limit in (7, 8, 9)] == ["First d", "First d", "First dö"]
    row = text.tokens(parts, small_tokenizer)
    assert small_tokenizer.decode(row) == "First döcument.<|endoftext|>Second one.<|endoftext|>"
    blocks = examples.Blocks(row, 4)
    batch = blocks.batch(np.arange(len(blocks)))
    flat = row[: len(blocks) * 4 + 1]
    assert batch["input_ids"].ravel().tolist() == flat[:-1].tolist()
    assert batch["labels"].ravel().tolist() == flat[1:].tolist()
    assert batch["mask"].all()


def test_blocks_are_told_apart():
    """By every token and by their length; what is left of the tokens makes no block."""
    tokens = np.arange(30)
    assert [len(examples.Blocks(tokens[:count], 4)) for count in (0, 1, 4, 5, 8, 9)] == [0, 0, 0, 1, 1, 2]
    other = tokens.copy()
    other[17] += 1
    made = [examples.Blocks(tokens, 4), examples.Blocks(other, 4), examples.Blocks(tokens, 5)]
    assert len({blocks.fingerprint() for blocks in made}) == 3
    assert examples.Blocks(tokens.tolist(), 4).fingerprint() == made[0].fingerprint()
    batch = made[0].batch(np.array([2, 0]))
    assert batch["input_ids"].tolist() == [[8, 9, 10, 11], [0, 1, 2, 3]]
    assert batch["labels"].tolist() == [[9, 10, 11, 12], [1, 2, 3, 4]]


def test_examples_are_told_apart():
    """By every token, by where the completion begins and where an example ends, and by their length."""
    pairs = [([5, 6], [7]), ([5], [6, 7])], [([5], [6, 7]), ([5], [6, 7])], [([5, 6], [7]), ([5], [6, 8])]
    made = [examples.Examples(each, 8) for each in (*pairs, [([5, 6], [7, 5]), ([6], [7])])]
    made.append(examples.Examples(pairs[0], 9))
    assert len({each.fingerprint() for each in made}) == len(made)
    assert examples.Examples(pairs[0], 8).fingerprint() == made[0].fingerprint()


def test_text_of_several_files(generated, tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(
            f"The text of {name}, which is long enough for a block of it.\n"
        )
    limited = text.read(
        TextData("text", ("one.txt", "two.txt"), "one.txt", 4, max_bytes=11, max_valid_bytes=8), tmp_path
    )
    assert limited == {"train": ["The text of"] * 2, "valid": ["The text"]}
    section = TextData("text", ("one.txt", "two.txt"), "one.txt", 4)
    assert text.read(section, tmp_path)["train"] == [
        f"The text of {name}, which is long enough for a block of it." for name in ("one", "two")
    ]
    assert (
        build(TextData, {"task": "text", "train": ["one.txt", "two.txt"], "valid": "one.txt", "seq_len": 4})
        == section
    )


def test_a_tokenizer_is_found_again_or_refused(tmp_path):
    documents = ["one and two and three and four"] * 3
    directory = tokenizer.train(documents, 260, tmp_path / "tokenizer")
    before = (directory / "tokenizer.json").stat().st_mtime_ns
    assert tokenizer.train(iter(documents), 260, directory) == directory
    assert (directory / "tokenizer.json").stat().st_mtime_ns == before
    for other in (([*documents, "five"], 260), (documents, 259)):
        with pytest.raises(ValueError, match="holds a tokenizer of another size or text"):
            tokenizer.train(*other, directory)
    with pytest.raises(
        ValueError, match="a vocabulary of 4096 tokens was asked for, and the training text gives 2"
    ):
        tokenizer.train(documents, 4096, tmp_path / "large")
    assert not (tmp_path / "large").exists()


def test_unfinished_data_is_written_anew(generated, tmp_path):
    """The mark is written last: without it, everything is made again."""
    made = generate.write(dataclasses.replace(SECTION, seed=5), tmp_path / "data")
    (made / "generate.json").unlink()
    generate.write(SECTION, made)
    assert (made / "train.txt").read_bytes() == (generated / "train.txt").read_bytes()


def test_text_refusals(small_tokenizer, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "short.txt").write_text("a")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff\xfe\xff\xfe")
    (tmp_path / "a.zst").write_bytes(b"not zstd")
    for name, message in [
        ("empty.txt", "is empty"),
        ("bytes.txt", "not UTF-8"),
        ("a.zst", "cannot be read"),
        ("a.pdf", "no data file"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            text.read(TextData("text", name, name, 8), tmp_path)
    section = TextData("text", "short.txt", "short.txt", 8)
    with pytest.raises(ValueError, match="shorter than one block"):
        text.prepare(section, text.read(section, tmp_path), small_tokenizer)


@pytest.mark.parametrize("count, batch", [(10, 5), (11, 4), (3, 8)])
def test_order_is_a_function_of_seed_and_step(count, batch):
    steps = order.batches_per_epoch(count, batch)
    assert steps == -(-count // batch)
    epochs = [
        np.concatenate([order.indices(7, epoch * steps + n, count, batch) for n in range(steps)])
        for epoch in range(2)
    ]
    for drawn in epochs:
        assert sorted(drawn[:count]) == list(range(count)), (
            "each example once, then draws that fill the last batch"
        )
        assert len(drawn) == steps * batch and drawn.max() < count
    fillers = [drawn[count:].tolist() for drawn in epochs]
    assert len(fillers[0]) < 5 or (len(set(fillers[0])) > 1 and fillers[0] != fillers[1])
    backwards = [order.indices(7, step, count, batch).tolist() for step in reversed(range(2 * steps))]
    assert backwards[::-1] == [order.indices(7, step, count, batch).tolist() for step in range(2 * steps)]
    assert order.indices(7, 0, 1000, 8).tolist() != order.indices(8, 0, 1000, 8).tolist()
    assert order.indices(7, 0, 1000, 8).tolist() != order.indices(7, 125, 1000, 8).tolist(), (
        "another epoch, another order"
    )


@gguf_files.needs_real
@pytest.mark.slow
def test_all_of_e2e_fits_smollm2(data_dir):
    """`data.seq_len` of its rows holds every example, decoding has room, and 600 steps are a ninth of an
    epoch, as their notes say.
    """
    config = configs.load(CONFIGS / "e2e_smollm2_lora_r8.json")
    tokenizer = gguf.tokenizer(gguf_files.REAL)
    splits = e2e.prepare(config.data, e2e.read(config.data, data_dir), tokenizer)
    assert order.batches_per_epoch(len(splits.train), config.train.batch) // config.train.steps == 8
    assert len(splits.prompts) == 630
    assert max(len(prompt.ids) for prompt in splits.prompts) + config.decode.max_tokens <= 8192
    assert end_tokens(config.decode, tokenizer) == (tokenizer.eos_token_id, *tokenizer.encode("\n\n"))
