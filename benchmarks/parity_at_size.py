"""RoBERTa-base at its real size: our logits and gradients beside PyTorch's.

    python -m benchmarks.parity_at_size

On what: 125 million random parameters, drawn and saved by `transformers`, read by `hf.load`; two rows of 64
tokens, one of them padded; the masked-LM head, and the cross entropy's gradient with respect to every
parameter. Bounds (exit status 1 if one is missed): logits within 1e-5 and gradients within 1e-4, in float32.
Needs PyTorch, 4 GB and a minute; the tests do the same at small sizes.
"""

import argparse
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from experiments.reports.provenance import provenance
from lora_jax.interop import hf
from lora_jax.models import RobertaConfig

from . import record


BOUNDS = {"logits": 1e-5, "gradients": 1e-4}


def compare(directory: str) -> list[dict[str, Any]]:
    import torch
    import transformers

    torch.manual_seed(0)
    settings = {
        key: value for key, value in RobertaConfig.named("roberta-base").to_hf().items() if value is not None
    }
    theirs = transformers.RobertaForMaskedLM(transformers.RobertaConfig(**settings)).eval()
    theirs.save_pretrained(directory)
    model, params = hf.load(directory)

    rng = np.random.default_rng(0)
    ids, mask = rng.integers(2, 50265, (2, 64)), np.ones((2, 64), int)
    ids[1, 40:], mask[1, 40:] = 1, 0

    def loss(params):
        logits = model.apply({"params": params}, ids, mask)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, ids)
        return jnp.sum(each * mask) / mask.sum(), logits

    (_, logits), ours = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    expected = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits
    torch.nn.functional.cross_entropy(expected[mask == 1], torch.tensor(ids[mask == 1])).backward()

    # The gradients take the same way as the weights did: PyTorch's are saved in their place.
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad)
    theirs.save_pretrained(directory)
    gradients = traverse_util.flatten_dict(hf.load(directory)[1], sep="/")
    ours = traverse_util.flatten_dict(ours, sep="/")
    for path in ("embeddings/word_embeddings/embedding", "embeddings/position_embeddings/embedding"):
        # PyTorch leaves the padding's row out of the look-up's gradient.
        ours[path], gradients[path] = (np.delete(np.asarray(tree[path]), 1, 0) for tree in (ours, gradients))
    logits, expected = np.asarray(logits)[mask == 1], expected.detach().numpy()[mask == 1]
    differences = [float(np.abs(ours[path] - gradients[path]).max()) for path in ours]
    largest = max(float(np.abs(leaf).max()) for leaf in gradients.values())
    return [
        {
            "what": "logits",
            "largest difference": f"{np.abs(logits - expected).max():.1e}",
            "largest value": f"{np.abs(expected).max():.2f}",
        },
        {
            "what": "gradients",
            "largest difference": f"{max(differences):.1e}",
            "largest value": f"{largest:.2f}",
        },
    ]


def main() -> int:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    import torch

    with tempfile.TemporaryDirectory() as directory:
        rows = compare(directory)
    record.save(
        "parity_at_size",
        "python -m benchmarks.parity_at_size",
        {**provenance(), "torch": torch.__version__},
        rows,
    )
    print(record.table(rows))
    missed = [row for row in rows if float(row["largest difference"]) > BOUNDS[row["what"]]]
    for row in missed:
        print(
            f"{row['what']}: {row['largest difference']} is more than {BOUNDS[row['what']]:g}",
            file=sys.stderr,
        )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
