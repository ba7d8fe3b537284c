"""The models that can be read and written, with one table each. A new model is one more entry of `FAMILIES`.

A table gives our path of each tensor of a Hugging Face file. `{}` stands for the number of a layer. A star
marks the weights whose axes PyTorch has in the other order: (out, in) of `Linear`, (out, in, width) of a
convolution. GPT-2's `Conv1D` is (in, out) in both.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn

from ..models._config import ModelConfig
from ..models.deberta import DebertaV2, DebertaV2Config
from ..models.gpt2 import GPT2, GPT2Config
from ..models.roberta import Roberta, RobertaConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type` of Hugging Face: its classes, and the names of its tensors there and here."""

    model: type[nn.Module]
    config: type[ModelConfig]
    heads: Mapping[str, str | None]  # their class: our head; of several for one head, `save` writes the first
    layers: str  # the field of the config that has the number of layers
    prefix: str  # of tensors that do not belong to the head; files of the bare model lack it
    embedding: str  # the tensor of the word embedding
    decoder: str  # the tensor that repeats the embedding when tied
    aliases: Mapping[str, str]  # a second name of a tensor: its first name
    fused: Mapping[str, int]  # the end of a module's name: how many projections it has side by side
    leftovers: re.Pattern  # names of further tensors in files, on which no result depends
    # Modules whose weight PyTorch's model reads without calling them, so that PEFT's adapters of them do
    # nothing there, and a tensor of each model where it is so.
    uncalled: Mapping[str, str]
    table: str

    def projections_in(self, module: str) -> int:
        """How many projections a module has side by side: 1 unless it is fused."""
        return self.fused.get(module.rpartition(".")[2], 1)

    def rows(self) -> Iterator[tuple[str, str, bool]]:
        """`(their name, our path, transposed)`, one for each line of the table."""
        for line in self.table.strip().splitlines():
            theirs, ours, *star = line.split()
            yield theirs, ours, bool(star)

    def full_name(self, name: str) -> str:
        """A tensor's name in the table, with the prefix that files of the bare model leave out."""
        known = name in self.aliases or any(name == theirs for theirs, _, _ in self.rows())
        return name if known or name.startswith(self.prefix) else self.prefix + name

    def build(self, config: ModelConfig, head: str | None, **options: Any) -> nn.Module:
        """The model, with that head where there is more than one."""
        return self.model(config, head=head, **options)


def _layers_of_bert(prefix: str, query: str, key: str, value: str) -> str:
    """The rows of BERT's layers. Families differ in the names of the projections only."""
    weights = [
        *(f"attention.self.{name}" for name in (query, key, value)),
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ]
    rows = []
    for name in weights:
        ours = name.replace(".", "/")
        rows.append(f"{prefix}encoder.layer.{{}}.{name}.weight encoder/layer/{{}}/{ours}/kernel *")
        rows.append(f"{prefix}encoder.layer.{{}}.{name}.bias encoder/layer/{{}}/{ours}/bias")
    for name in ("attention.output.LayerNorm", "output.LayerNorm"):
        ours = name.replace(".", "/")
        rows.append(f"{prefix}encoder.layer.{{}}.{name}.weight encoder/layer/{{}}/{ours}/scale")
        rows.append(f"{prefix}encoder.layer.{{}}.{name}.bias encoder/layer/{{}}/{ours}/bias")
    return "\n".join(rows)


ELSEWHERE = (
    "docs/frameworks.md shows them on models of Flax and Equinox, and https://github.com/jax-ml/bonsai has "
    "many such models."
)
FAMILIES = {
    "gpt2": Family(
        model=GPT2,
        config=GPT2Config,
        heads={
            "GPT2LMHeadModel": None,
            "GPT2Model": None,
            "GPT2ForSequenceClassification": "sequence_classification",
        },
        layers="n_layer",
        prefix="transformer.",
        embedding="transformer.wte.weight",
        decoder="lm_head.weight",
        aliases={},
        fused={"c_attn": 3},
        uncalled={},
        leftovers=re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)"),
        table="""
            transformer.wte.weight                 wte/embedding
            transformer.wpe.weight                 wpe/embedding
            transformer.h.{}.ln_1.weight           h/{}/ln_1/scale
            transformer.h.{}.ln_1.bias             h/{}/ln_1/bias
            transformer.h.{}.attn.c_attn.weight    h/{}/attn/c_attn/kernel
            transformer.h.{}.attn.c_attn.bias      h/{}/attn/c_attn/bias
            transformer.h.{}.attn.c_proj.weight    h/{}/attn/c_proj/kernel
            transformer.h.{}.attn.c_proj.bias      h/{}/attn/c_proj/bias
            transformer.h.{}.ln_2.weight           h/{}/ln_2/scale
            transformer.h.{}.ln_2.bias             h/{}/ln_2/bias
            transformer.h.{}.mlp.c_fc.weight       h/{}/mlp/c_fc/kernel
            transformer.h.{}.mlp.c_fc.bias         h/{}/mlp/c_fc/bias
            transformer.h.{}.mlp.c_proj.weight     h/{}/mlp/c_proj/kernel
            transformer.h.{}.mlp.c_proj.bias       h/{}/mlp/c_proj/bias
            transformer.ln_f.weight                ln_f/scale
            transformer.ln_f.bias                  ln_f/bias
            lm_head.weight                         lm_head/kernel *
            score.weight                           score/kernel *
        """,
    ),
    "roberta": Family(
        model=Roberta,
        config=RobertaConfig,
        heads={
            "RobertaForMaskedLM": "masked_lm",
            "RobertaForSequenceClassification": "sequence_classification",
            "RobertaForTokenClassification": "token_classification",
            "RobertaForQuestionAnswering": "question_answering",
            "RobertaModel": "features",
        },
        layers="num_hidden_layers",
        prefix="roberta.",
        embedding="roberta.embeddings.word_embeddings.weight",
        decoder="lm_head.decoder.weight",
        aliases={"lm_head.decoder.bias": "lm_head.bias"},
        fused={},
        uncalled={},
        # Files with any head may hold the pooler of pretraining, which only `features` uses.
        leftovers=re.compile(
            r"roberta\.(embeddings\.(position|token_type)_ids|pooler\.dense\.(weight|bias))"
        ),
        table="""
            roberta.embeddings.word_embeddings.weight          embeddings/word_embeddings/embedding
            roberta.embeddings.position_embeddings.weight      embeddings/position_embeddings/embedding
            roberta.embeddings.token_type_embeddings.weight    embeddings/token_type_embeddings/embedding
            roberta.embeddings.LayerNorm.weight                embeddings/LayerNorm/scale
            roberta.embeddings.LayerNorm.bias                  embeddings/LayerNorm/bias
            roberta.pooler.dense.weight                        pooler/dense/kernel *
            roberta.pooler.dense.bias                          pooler/dense/bias
            lm_head.dense.weight                               lm_head/dense/kernel *
            lm_head.dense.bias                                 lm_head/dense/bias
            lm_head.layer_norm.weight                          lm_head/layer_norm/scale
            lm_head.layer_norm.bias                            lm_head/layer_norm/bias
            lm_head.bias                                       lm_head/bias
            lm_head.decoder.weight                             lm_head/decoder/kernel *
            classifier.dense.weight                            classifier/dense/kernel *
            classifier.dense.bias                              classifier/dense/bias
            classifier.out_proj.weight                         classifier/out_proj/kernel *
            classifier.out_proj.bias                           classifier/out_proj/bias
            classifier.weight                                  classifier/kernel *
            classifier.bias                                    classifier/bias
            qa_outputs.weight                                  qa_outputs/kernel *
            qa_outputs.bias                                    qa_outputs/bias
        """
        + _layers_of_bert("roberta.", "query", "key", "value"),
    ),
    "deberta-v2": Family(
        model=DebertaV2,
        config=DebertaV2Config,
        heads={
            "DebertaV2ForMaskedLM": "masked_lm",
            "DebertaV2ForSequenceClassification": "sequence_classification",
            "DebertaV2ForTokenClassification": "token_classification",
            "DebertaV2ForQuestionAnswering": "question_answering",
            "DebertaV2Model": "features",
        },
        layers="num_hidden_layers",
        prefix="deberta.",
        embedding="deberta.embeddings.word_embeddings.weight",
        decoder="cls.predictions.decoder.weight",
        aliases={"cls.predictions.decoder.bias": "cls.predictions.bias"},
        fused={},
        uncalled={
            "deberta.encoder.rel_embeddings": "deberta.encoder.rel_embeddings.weight",
            "deberta.embeddings.word_embeddings": "lm_predictions.lm_head.dense.weight",
        },
        # The published files hold absolute positions, which `position_biased_input`=false ignores, and a head
        # of pretraining.
        leftovers=re.compile(
            r"deberta\.(embeddings\.(position_ids|position_embeddings\.weight)|mask_predictions\..*)"
        ),
        table="""
            deberta.embeddings.word_embeddings.weight          embeddings/word_embeddings/embedding
            deberta.embeddings.position_embeddings.weight      embeddings/position_embeddings/embedding
            deberta.embeddings.token_type_embeddings.weight    embeddings/token_type_embeddings/embedding
            deberta.embeddings.embed_proj.weight               embeddings/embed_proj/kernel *
            deberta.embeddings.LayerNorm.weight                embeddings/LayerNorm/scale
            deberta.embeddings.LayerNorm.bias                  embeddings/LayerNorm/bias
            deberta.encoder.rel_embeddings.weight              encoder/rel_embeddings/embedding
            deberta.encoder.LayerNorm.weight                   encoder/LayerNorm/scale
            deberta.encoder.LayerNorm.bias                     encoder/LayerNorm/bias
            deberta.encoder.conv.conv.weight                   encoder/conv/conv/kernel *
            deberta.encoder.conv.conv.bias                     encoder/conv/conv/bias
            deberta.encoder.conv.LayerNorm.weight              encoder/conv/LayerNorm/scale
            deberta.encoder.conv.LayerNorm.bias                encoder/conv/LayerNorm/bias
            deberta.encoder.layer.{}.attention.self.pos_key_proj.weight encoder/layer/{}/attention/self/pos_key_proj/kernel *
            deberta.encoder.layer.{}.attention.self.pos_key_proj.bias encoder/layer/{}/attention/self/pos_key_proj/bias
            deberta.encoder.layer.{}.attention.self.pos_query_proj.weight encoder/layer/{}/attention/self/pos_query_proj/kernel *
            deberta.encoder.layer.{}.attention.self.pos_query_proj.bias encoder/layer/{}/attention/self/pos_query_proj/bias
            pooler.dense.weight                                pooler/dense/kernel *
            pooler.dense.bias                                  pooler/dense/bias
            classifier.weight                                  classifier/kernel *
            classifier.bias                                    classifier/bias
            qa_outputs.weight                                  qa_outputs/kernel *
            qa_outputs.bias                                    qa_outputs/bias
            cls.predictions.transform.dense.weight             cls/predictions/transform/dense/kernel *
            cls.predictions.transform.dense.bias               cls/predictions/transform/dense/bias
            cls.predictions.transform.LayerNorm.weight         cls/predictions/transform/LayerNorm/scale
            cls.predictions.transform.LayerNorm.bias           cls/predictions/transform/LayerNorm/bias
            cls.predictions.bias                               cls/predictions/bias
            cls.predictions.decoder.weight                     cls/predictions/decoder/kernel *
            lm_predictions.lm_head.dense.weight                lm_predictions/lm_head/dense/kernel *
            lm_predictions.lm_head.dense.bias                  lm_predictions/lm_head/dense/bias
            lm_predictions.lm_head.LayerNorm.weight            lm_predictions/lm_head/LayerNorm/scale
            lm_predictions.lm_head.LayerNorm.bias              lm_predictions/lm_head/LayerNorm/bias
            lm_predictions.lm_head.bias                        lm_predictions/lm_head/bias
        """  # noqa: E501
        + _layers_of_bert("deberta.", "query_proj", "key_proj", "value_proj"),
    ),
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that a `config.json` names. The error for any other names the supported ones."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(
            f"`model_type` is {kind!r} in config.json, which is not supported; supported are "
            f"{sorted(FAMILIES)}. Any JAX implementation of it will do: `lorafy` and `adapt` need no model "
            f"of ours. {ELSEWHERE}"
        )
    return FAMILIES[kind]


def chosen_head(config: Mapping[str, Any], family: Family, wanted: str | None = None) -> str | None:
    """`wanted`, or our name for the head of the class that a `config.json` names."""
    named = config.get("architectures") or ()
    strangers = set(named) - set(family.heads)
    known = sorted(filter(None, set(family.heads.values())))
    if wanted is not None:
        if wanted not in known:
            if known:
                raise ValueError(f"`head` is {wanted!r}; it must be one of {known}.")
            raise ValueError(
                f"`head` is {wanted!r}, and {config['model_type']!r} has one head; leave it out."
            )
        return wanted
    if strangers:
        fix = f" Pass `head=`, one of {known}, to choose a head by hand." if known else ""
        raise ValueError(
            f"`architectures` is {sorted(strangers)} in config.json, which is not supported; of "
            f"{config['model_type']!r} there are {list(family.heads)}.{fix}"
        )
    if not named and None in family.heads.values():
        return None
    found = {family.heads[name] for name in named} or set(family.heads.values())
    if len(found) > 1:
        raise ValueError(
            f"config.json does not name one class in `architectures`; pass `head=`, one of {known}."
        )
    return found.pop()


def family_of_model(model: nn.Module) -> tuple[str, str, Family]:
    """`(model_type, architecture, family)` of a model."""
    for kind, family in FAMILIES.items():
        if isinstance(model, family.model):
            head = getattr(model, "head", None)
            return kind, next(name for name, ours in family.heads.items() if ours == head), family
    names = [family.model.__name__ for family in FAMILIES.values()]
    raise TypeError(
        f"`model` is a {type(model).__name__}, which has no Hugging Face form here; pass one of {names}."
    )
