"""BERT: the names of its tensors and classes."""

import re

from ...models.bert import Bert, BertConfig
from .bert_layers import layers_of_bert
from .family import Family


FAMILY = Family(
    model=Bert,
    config=BertConfig,
    heads={
        "BertForMaskedLM": "masked_lm",
        "BertForSequenceClassification": "sequence_classification",
        "BertForTokenClassification": "token_classification",
        "BertForQuestionAnswering": "question_answering",
        "BertModel": "features",
    },
    layers="num_hidden_layers",
    prefix="bert.",
    pooler=("bert.pooler.",),
    embedding="bert.embeddings.word_embeddings.weight",
    decoder="cls.predictions.decoder.weight",
    aliases={"cls.predictions.decoder.bias": "cls.predictions.bias"},
    fused={},
    uncalled={},
    # Files with any head may hold the pooler of pretraining and its other head, that of two sentences.
    leftovers=re.compile(
        r"bert\.(embeddings\.(position|token_type)_ids|pooler\.dense\.(weight|bias)|cls\.seq_relationship\..*)"
    ),
    table="""
        bert.embeddings.word_embeddings.weight             embeddings/word_embeddings/embedding
        bert.embeddings.position_embeddings.weight         embeddings/position_embeddings/embedding
        bert.embeddings.token_type_embeddings.weight       embeddings/token_type_embeddings/embedding
        bert.embeddings.LayerNorm.weight                   embeddings/LayerNorm/scale
        bert.embeddings.LayerNorm.bias                     embeddings/LayerNorm/bias
        bert.pooler.dense.weight                           pooler/dense/kernel *
        bert.pooler.dense.bias                             pooler/dense/bias
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
    """
    + layers_of_bert("bert.", "query", "key", "value"),
)
