"""GPT-2: the names of its tensors and classes."""

import re

from ...models.gpt2 import GPT2, GPT2Config
from .family import Family


FAMILY = Family(
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
)
