"""RoBERTa: the names of its tensors and classes."""

import re

from ...models.roberta import Roberta, RobertaConfig
from .bert_layers import layers_of_bert
from .family import Family


FAMILY = Family(
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
    leftovers=re.compile(r"roberta\.(embeddings\.(position|token_type)_ids|pooler\.dense\.(weight|bias))"),
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
    + layers_of_bert("roberta.", "query", "key", "value"),
)
