"""The configuration of BERT."""

import dataclasses
from typing import ClassVar

from ._bert_layers import BertLayersConfig
from ._config import IDLE


@dataclasses.dataclass(frozen=True)
class BertConfig(BertLayersConfig):
    """Sizes and choices of a BERT, under the names and with the defaults of Hugging Face's `config.json`.

    ```python
    BertConfig.named("bert-base-uncased")  # 12 layers of width 768 (Devlin et al. 2019)
    BertConfig.named("bert-large-uncased", labels=("no", "yes"))
    BertConfig.from_hf(json.loads(text))                                # what a config.json says
    ```

    `all-MiniLM-L6-v2` has the size of MiniLM (Wang et al. 2020) with every other layer left out.
    `problem_type` and the token ids take no part in the computation; they are kept for other tools.

    Raises:
      ValueError: a value out of range.
      TypeError: a value of the wrong type.
    """

    vocab_size: int = 30522
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | tuple | None = None

    family: ClassVar = "BERT"
    sizes: ClassVar = {
        "bert-base-uncased": {},
        "bert-large-uncased": dict(
            hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
        ),
        "all-MiniLM-L6-v2": dict(hidden_size=384, num_hidden_layers=6, intermediate_size=1536),
    }
    # The authors' files describe a pooler that no class has, and sentence-transformers what it does with a
    # model's results.
    idle: ClassVar = IDLE | frozenset(
        """
        pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type
        sbert_ce_default_activation_function sentence_transformers
    """.split()
    )
