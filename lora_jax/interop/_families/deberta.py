"""DeBERTa-v2 and v3: the names of its tensors and classes."""

import re

from ...models.deberta import DebertaV2, DebertaV2Config
from .bert_layers import layers_of_bert
from .family import Family


FAMILY = Family(
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
    + layers_of_bert("deberta.", "query_proj", "key_proj", "value_proj"),
)
