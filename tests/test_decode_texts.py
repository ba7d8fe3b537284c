"""From prompts to texts: what is refused, what is cut off, and what is said meanwhile."""

import io

import pytest
from continuing import END, generated, MODEL, PROMPTS, weights

from experiments import progress
from experiments.config import Architecture, Base, Config, Decode, E2EData, Source, Train
from experiments.decoding import decoder as decode
from experiments.tasks.examples import Prompt


class Tokenizer:
    """Letters, a is token 1; 0 ends a text."""

    eos_token_id = 0
    all_special_tokens = ["`"]
    bos_token = eos_token = pad_token = unk_token = "`"

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(letter) - 96 for letter in text]}

    def decode(self, ids, clean_up_tokenization_spaces):
        return "".join(chr(token + 96) for token in ids)


def settings(section, **data):
    data = E2EData("e2e", "none", "none", **data)
    architecture = Base(architecture=Architecture(8, 2, 2, 40), tokenizer="none")
    return Config(
        "tiny", Source(None), architecture, data, {"name": "LoRA"}, ("c",), Train(1, 1, 1.0), decode=section
    )


def decoder(section, prompts=PROMPTS, **data):
    prompts = [Prompt(str(number), tuple(ids), ()) for number, ids in enumerate(prompts)]
    return decode.Decoder.create(settings(section, **data), MODEL, Tokenizer(), prompts)


def test_texts_of_prompts():
    section = Decode(max_tokens=6, beams=3, end=("e",), batch=2, prompts=4)
    made, done = decoder(section), []
    assert made.end == END
    expected = [
        "".join(chr(token + 96) for token in tokens) for tokens in generated(weights(0), PROMPTS[:4], section)
    ]
    assert made.texts(weights(0), tell=done.append) == expected
    assert done == [2, 4]
    assert made.texts(weights(0), 2) == expected[:2]


def test_long_prompts_are_refused_or_lose_their_beginning():
    section = Decode(max_tokens=6, prompts=3)
    long = [[1, 2], list(range(1, 13)) * 3, [4]]
    with pytest.raises(
        ValueError,
        match=r"a prompt of 36 tokens and `decode.max_tokens` \(6\) exceed the model's 40 positions",
    ):
        decoder(section, long)
    cut = decoder(section, long, truncate=True, seq_len=16)
    assert [prompt.ids for prompt in cut.prompts] == [(1, 2), tuple(range(3, 13)), (4,)]
    with pytest.raises(
        ValueError, match=r"`decode.max_tokens` \(6\) leaves no room for a prompt in `data.seq_len` \(6\)"
    ):
        decoder(section, truncate=True, seq_len=6)


@pytest.mark.parametrize(
    "section, message",
    [
        (
            Decode(max_tokens=1, end=("ab",)),
            r"`decode.end` has 'ab', which the tokenizer encodes as 2 tokens \(\[1, 2\]\)",
        ),
        (Decode(max_tokens=1, end=("",)), r"`decode.end` has '', which the tokenizer encodes as 0 tokens"),
        (
            Decode(max_tokens=1, end=(13,)),
            "`decode.end` has the token 13, which is not in the vocabulary of 13",
        ),
        (
            Decode(max_tokens=1, beams=14),
            r"`decode.beams` \(14\) is more than the vocabulary has tokens \(13\)",
        ),
    ],
)
def test_what_a_vocabulary_does_not_have(section, message):
    with pytest.raises(ValueError, match=message):
        decoder(section)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="prompt 2 is empty"):
        decoder(Decode(max_tokens=1), [[1], []])


def test_the_blank_line_of_gpt2_is_one_token(data_dir):
    from experiments.running.base import load_tokenizer

    tokenizer = load_tokenizer(data_dir / "gpt2_bpe")
    assert decode.end_tokens(Decode(end=("\n\n",)), tokenizer) == (50256, 628)
    assert decode.end_tokens(Decode(end=(628, "<|endoftext|>")), tokenizer) == (50256, 628)


@pytest.mark.parametrize(
    "text, kept",
    [
        (" The Mill is a pub .", "The Mill is a pub ."),
        (" A pub .\n\n B", "A pub ."),
        (" A\npub . \n", "A pub ."),
        ("A<|endoftext|>B\n\nC", "A"),
        ("", ""),
    ],
)
def test_what_is_kept_of_a_text(text, kept):
    assert decode.clean(text, ["<|endoftext|>"]) == kept


def test_a_text_ends_where_the_tokenizer_has_a_boundary():
    """A model of chats ends a turn by another token than a text, and begins the next by a third. An unknown
    word ends nothing.
    """
    import tokenizers
    import transformers

    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "pub": 1}, unk_token="<unk>"))
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|endoftext|>"],
    )
    marks = decode.boundaries(made)
    assert set(marks) == {"<|im_start|>", "<|im_end|>", "<|endoftext|>"}
    for mark in marks:
        assert decode.clean(f"a <unk> pub{mark}rest", marks) == "a <unk> pub"
    made.eos_token = "<unk>"  # as GPT-2 has one token for everything
    assert "<unk>" in decode.boundaries(made)


def test_long_decoding_says_how_far_it_is(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(progress, "QUIET", 0.0)
    with progress.Count("decoding", 4, out) as count:
        count.update(2)
        count.update(4)
    assert out.getvalue() == "decoding: 2/4\ndecoding: 4/4\n"
    monkeypatch.setattr(progress, "QUIET", 20.0)
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    with progress.Count("decoding", 4, terminal) as count:
        count.update(4)
    assert "decoding" in terminal.getvalue() and "4/4" in terminal.getvalue()
