"""GLUE's nine sets as files in the official format, with rows written for the tests, and a tiny BERT with a
tokenizer of their words.
"""

import jax
import jax.numpy as jnp

from lora_jax.interop import hf
from lora_jax.models import Bert, BertConfig


PARSED = "\t".join(
    f"{name}_{kind}" for kind in ("binary_parse", "parse") for name in ("sentence1", "sentence2")
)
MNLI = f"index\tpromptID\tpairID\tgenre\t{PARSED}\tsentence1\tsentence2"
STSB = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2"
# Of each set: its directory, the first line of its training file, and how a row has an index, two texts and a
# label; the same of its test file.
FORMS = {
    "cola": ("CoLA", "", "gj04\t{label}\t*\t{one}", "index\tsentence", "{index}\t{one}"),
    "sst2": ("SST-2", "sentence\tlabel", "{one}\t{label}", "index\tsentence", "{index}\t{one}"),
    "mrpc": (
        "MRPC",
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        "{label}\t7\t8\t{one}\t{two}",
        "index\t#1 ID\t#2 ID\t#1 String\t#2 String",
        "{index}\t7\t8\t{one}\t{two}",
    ),
    "stsb": (
        "STS-B",
        f"{STSB}\tscore",
        "{index}\tnews\tf\t2012\t0\tnone\tnone\t{one}\t{two}\t{label}",
        STSB,
        "{index}\tnews\tf\t2012\t0\tnone\tnone\t{one}\t{two}",
    ),
    "qqp": (
        "QQP",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "{index}\t1\t2\t{one}\t{two}\t{label}",
        "id\tquestion1\tquestion2",
        "{index}\t{one}\t{two}",
    ),
    "mnli": (
        "MNLI",
        f"{MNLI}\tlabel1\tgold_label",
        "{index}\t1\t1n\tfiction\t( b\t( b\t(R p\t(R p\t{one}\t{two}\tneutral\t{label}",
        MNLI,
        "{index}\t1\t1n\tfiction\t( b\t( b\t(R p\t(R p\t{one}\t{two}",
    ),
    "qnli": (
        "QNLI",
        "index\tquestion\tsentence\tlabel",
        "{index}\t{one}\t{two}\t{label}",
        "index\tquestion\tsentence",
        "{index}\t{one}\t{two}",
    ),
    "rte": (
        "RTE",
        "index\tsentence1\tsentence2\tlabel",
        "{index}\t{one}\t{two}\t{label}",
        "index\tsentence1\tsentence2",
        "{index}\t{one}\t{two}",
    ),
    "wnli": (
        "WNLI",
        "index\tsentence1\tsentence2\tlabel",
        "{index}\t{one}\t{two}\t{label}",
        "index\tsentence1\tsentence2",
        "{index}\t{one}\t{two}",
    ),
}
LABELS = {
    "stsb": ("5.000", "0.500", "2.250"),
    "mnli": ("entailment", "neutral", "contradiction"),
    "qnli": ("entailment", "not_entailment"),
    "rte": ("entailment", "not_entailment"),
}
NOUNS = ("mill", "pub", "river", "town", "cook", "guest")
VERBS = ("opens", "closes", "moves", "waits")


def texts(number):
    """Two sentences, of 3 to 9 words; a quotation mark stands alone in some, as in the official files."""
    noun, verb = NOUNS[number % len(NOUNS)], VERBS[number % len(VERBS)]
    mark = ' "' if number % 3 == 0 else ""
    return f"the {noun} {verb}{mark}", " ".join(["the", noun, "never", verb, *["again"] * (number % 5)])


def labels(name):
    return LABELS.get(name, ("0", "1"))


def write(directory, name, rows=12, held_out=6):
    """Writes the files of a set below `directory`, as GLUE's archives have them."""
    place, head, row, test_head, test_row = FORMS[name]
    (directory / place).mkdir(parents=True, exist_ok=True)

    def put(split, count, head, form, start):
        lines = [head] if head else []
        for number in range(start, start + count):
            one, two = texts(number)
            label = labels(name)[number % len(labels(name))]
            lines.append(form.format(index=number - start, one=one, two=two, label=label))
        (directory / place / f"{split}.tsv").write_text("\n".join(lines) + "\n", "utf-8")

    put("train", rows, head, row, 0)
    for number, split in enumerate(("_matched", "_mismatched") if name == "mnli" else ("",)):
        put(f"dev{split}", held_out, head, row, rows + number * held_out)
        put(f"test{split}", held_out, test_head, test_row, rows + 50)
    return directory / place


def write_bert(directory):
    """A BERT of one layer of width 16 that knows these words, as a Hugging Face directory without a head."""
    import transformers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", '"', "the", "never", "again", *NOUNS, *VERBS]
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=40,
    )
    model = Bert(config, head="features")
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    # Wide enough that a few steps learn something.
    params = jax.tree.map(lambda leaf: leaf * 15 if leaf.ndim == 2 else leaf, params)
    directory.mkdir(parents=True, exist_ok=True)
    hf.save(directory, model, params)
    vocabulary = {word: number for number, word in enumerate(words)}
    transformers.BertTokenizer(vocab=vocabulary).save_pretrained(directory)
