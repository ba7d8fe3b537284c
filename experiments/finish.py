"""From trained arrays to files: merge, export, read back, compare, decode.

The comparison is of the logits of the adapted model in memory with those of the exported one, read back from its files: whatever
goes wrong on that way, a wrong scale, a transposed matrix, a tensor left out, is a number in the report.
"""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from experiments.base import Loaded
from experiments.decode import Decoder
from experiments.progress import Count
from experiments.tasks.examples import Splits
from experiments.train import Trainer
from lora_jax.interop import hf

# Rows of validation data on which the export is compared.
ROWS = 4


def export(trainer: Trainer, delta: Any, base: Loaded, directory: Path) -> Any:
    """Writes the merged model to `directory`, all of it or nothing, and returns the merged parameters."""
    merged = lora_jax.merge(trainer.frozen, delta)
    fresh = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    hf.save(fresh, base.model, merged, source=base.directory)
    shutil.rmtree(directory, ignore_errors=True)
    fresh.rename(directory)
    return merged


def compare(trainer: Trainer, delta: Any, directory: Path, splits: Splits) -> dict[str, Any]:
    """The largest difference of a logit between the adapted model and the exported one, and the largest logit beside it."""
    rows = np.arange(min(ROWS, len(splits.valid)))
    ids = jnp.asarray(splits.valid.batch(rows)["input_ids"])
    adapted = jax.jit(lambda delta, frozen: trainer.forward({"params": lora_jax.combine(frozen, delta)}, ids))(delta, trainer.frozen)
    model, params = hf.load(directory)
    reloaded = jax.jit(model.apply)({"params": params}, ids)
    # On the host, because the two may live on different devices.
    adapted, reloaded = np.asarray(adapted, np.float32), np.asarray(reloaded, np.float32)
    return {
        "max_difference": float(np.abs(adapted - reloaded).max()),
        "max_logit": float(np.abs(adapted).max()),
        "pytorch": _in_pytorch(directory, np.asarray(ids), adapted),
    }


def _in_pytorch(directory: Path, ids: np.ndarray, adapted: np.ndarray) -> dict[str, Any] | None:
    """The same comparison with what `transformers` makes of the export; None where PyTorch is not installed."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch
    import transformers

    model, loading = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    with torch.no_grad():
        logits = model(torch.tensor(ids)).logits.float().numpy()
    keys = sorted(str(key) for name in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in loading[name])
    return {"max_difference": float(np.abs(adapted - logits).max()), "keys": keys}


def predict(decoder: Decoder, before: Any, merged: Any, directory: Path) -> list[dict[str, Any]]:
    """Writes `predictions.txt`, a line a test input, and returns the samples for the report: before, after, and by people."""
    if not decoder.prompts:
        return []
    with Count("decoding", len(decoder.prompts)) as count:
        after = decoder.texts(merged, tell=count.update)
    (directory / "predictions.txt").write_text("".join(line + "\n" for line in after), "utf-8")
    return [
        {"input": prompt.text, "before": old, "after": new, "references": list(prompt.references[:2])}
        for prompt, old, new in zip(decoder.prompts, decoder.texts(before, decoder.section.shown), after, strict=False)
    ]
