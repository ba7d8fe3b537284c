"""The model card of a run's adapter: the `README.md` that Hugging Face's hub shows."""

import json
from pathlib import Path
from typing import Any

from experiments import config as configs, tasks
from experiments.config import Config


def render(config: Config, facts: dict[str, Any], prompt: list[str]) -> str:
    """The card, as Markdown under a header of YAML. `prompt`: the lines on how a prompt is written.

    A base that is a directory is not in the header, where the hub takes its own names only.
    """
    found, base, name = facts["numbers"], facts["base"], facts["base"]["name"]
    on_hub = name is not None and not Path(name).is_absolute()
    header = [f"base_model: {name}"] if on_hub else []
    method = f"`{configs.method_value(config.method)}` on {', '.join(f'`{each}`' for each in config.targets)}"
    lines = [
        "---",
        *header,
        "library_name: peft",
        "tags: [lora_jax]",
        "---",
        "",
        f"# {config.name}",
        "",
        f"An adapter in PEFT's format, {facts['trainable']:,} parameters: {method}.",
        "",
        f"- Base: {f'`{name}`' if name else base['origin']}, {base['parameters']:,} parameters, fingerprint "
        f"`{base['fingerprint']}`.",
        f"- Training: {found['steps']:,} steps of {config.train.batch} examples, by `{facts['command']}`.",
        f"- Validation loss: {found['first_valid_loss']:.4f} before, {found['valid_loss']:.4f} after.",
        f"- Exported: {facts['result']}. The whole report is in the run's `report.md`.",
        "",
    ]
    return "\n".join([*lines, *prompt, *_use(name, facts.get("labels"), tasks.of(config.data).head)])


def _use(name: str | None, labels: list[str] | None, head: str) -> list[str]:
    """`labels`: of a head that the task has given; None: texts are continued."""
    kind, count, more = "AutoPeftModelForCausalLM", "", ""
    if labels is not None:
        kind, count = "AutoPeftModelForSequenceClassification", f", num_labels={len(labels)}"
        more = ', **peft.head_of("path/to/adapter")'
        if head == "question_answering":
            kind, count = "AutoPeftModelForQuestionAnswering", ""
    if name is None:
        return ["The base was drawn at random and is in no file: only the run's `merged/` has the model.", ""]
    return [
        "## Use",
        "",
        "```python",
        f"from peft import {kind}",
        "",
        f'model = {kind}.from_pretrained("path/to/adapter"{count})  # and the base that it names',
        "```",
        "",
        "Without PyTorch, with the directory of the base:",
        "",
        "```python",
        "from lora_jax.interop import hf, peft",
        "",
        f"model, params = hf.load({json.dumps(name)}{more})",
        'frozen, delta = peft.load("path/to/adapter", model, params)',
        "```",
        "",
    ]
