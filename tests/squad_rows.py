"""Questions written for the tests, in SQuAD's official form, and tiny encoders with tokenizers for them."""

import json
import re

import encoders
import jax
import jax.numpy as jnp
import small_base

from lora_jax.interop import hf
from lora_jax.models import BertConfig, DebertaV2Config, RobertaConfig


MILL = "The mill on the river opened in 1903. A cook from the town bought it for seven crowns."
# Longer than a window, with an answer near either end.
FERRY = (
    "The ferry leaves the north pier at dawn. It carries bread and milk, and in summer a brass band. The "
    "crossing is "
    "slow, because the captain stops wherever somebody waves. Rain or sun, a grey heron waits for it on a "
    "post. The last stop of the day is Otter Landing."
)
# By context: what is asked, and the answers, of which the first is that of training.
ROWS = {
    MILL: (
        ("When did the mill open?", "1903", "in 1903"),
        ("Who bought the mill?", "A cook from the town", "A cook"),
        ("What did the mill cost?", "seven crowns"),
    ),
    FERRY: (
        ("Where does the ferry start?", "the north pier", "north pier"),
        ("What is the last stop?", "Otter Landing"),
    ),
}
NEVER = (("Who sold the river?", MILL), ("Which bird steers the ferry?", FERRY))


def rows(version):
    """The official form, as objects."""
    paragraphs = []
    for one, (context, asked) in enumerate(ROWS.items()):
        qas = []
        for two, (question, *answers) in enumerate(asked):
            found = [{"text": text, "answer_start": context.index(text)} for text in answers]
            said = {"is_impossible": False} if version == "2.0" else {}
            qas.append({"id": f"{one}{two}", "question": question, "answers": found, **said})
        for two, (question, where) in enumerate(NEVER):
            if version == "2.0" and where == context:
                plausible = [{"text": "the river", "answer_start": context.index("e")}]
                said = {"answers": [], "plausible_answers": plausible, "is_impossible": True}
                qas.append({"id": f"never{two}", "question": question, **said})
        paragraphs.append({"context": context, "qas": qas})
    return {
        "version": "1.1" if version == "1.1" else "v2.0",
        "data": [{"title": "Own", "paragraphs": paragraphs}],
    }


def write(directory, version):
    """One file, to train and to be answered."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "own.json").write_text(json.dumps(rows(version)), "utf-8")


def tokenizer():
    """BERT's kind: the words of all texts here."""
    import transformers

    texts = [*ROWS, *(asked[0] for group in ROWS.values() for asked in group), *(asked for asked, _ in NEVER)]
    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]", text.lower())})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", *(word for word in words if word != "a")]
    return transformers.BertTokenizer(vocab={word: number for number, word in enumerate(vocabulary)})


def roberta_tokenizer():
    """RoBERTa's kind: bytes, and two marks between the texts."""
    import transformers

    model = json.loads((small_base.TOKENIZER / "tokenizer.json").read_text("utf-8"))["model"]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]
    words = ["<s>", "<pad>", "</s>", "<unk>", *sorted(model["vocab"], key=model["vocab"].get), "<mask>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    return transformers.RobertaTokenizer(vocab=vocabulary, merges=merges)


_SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}


def write_encoder(directory, kind="bert"):
    """A model of one layer of width 32 that knows these words, as a Hugging Face directory without a head."""
    found = roberta_tokenizer() if kind == "roberta" else tokenizer()
    config = {"bert": BertConfig, "roberta": RobertaConfig, "deberta": DebertaV2Config}[kind](
        **_SIZES, vocab_size=len(found), max_position_embeddings=48, pad_token_id=found.pad_token_id
    )
    model = encoders.ours(config, "features")
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    # Wide enough that a few steps learn something.
    params = jax.tree.map(lambda leaf: leaf * 12 if leaf.ndim == 2 else leaf, params)
    directory.mkdir(parents=True, exist_ok=True)
    hf.save(directory, model, params)
    found.save_pretrained(directory)
