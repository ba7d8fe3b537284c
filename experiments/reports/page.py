"""The page of a finished run, `report.md`."""

import json
from typing import Any

from experiments import config as configs, tasks
from experiments.config import Config
from experiments.reports import provenance, scores
from experiments.reports.cost import STEPS
from experiments.reports.figures import of_training_only
from experiments.reports.words import megabytes, what_trains


def render(config: Config, facts: dict[str, Any]) -> str:
    """The page, as Markdown."""
    found, base, comparison = facts["numbers"], facts["base"], facts["comparison"]
    stored = "" if config.quantize is None else f", base stored in {config.quantize}"
    smoothed = (
        f" (with label smoothing {config.train.label_smoothing:g})" if config.train.label_smoothing else ""
    )
    attached = None if config.baseline is None else str(configs.baseline_value(config.baseline))
    rows = {
        "base": f"{base['origin']}, {base['parameters']:,} parameters, fingerprint `{base['fingerprint']}`",
        "method": what_trains(str(configs.method_value(config.method)), config.targets, attached) + stored,
        "trainable parameters": f"{facts['trainable']:,} "
        f"({facts['trainable'] / base['parameters']:.3%} of the base)",
        "sizes": _sizes(config, facts["bytes"]),
        "examples": ", ".join(f"{count:,} {split}" for split, count in facts["examples"].items() if count),
        "steps": (
            f"{found['steps']:,} of {config.train.batch} examples, of at most {config.data.seq_len} tokens "
            "each"
        ),
        "validation loss": f"{found['first_valid_loss']:.4f} before, {found['valid_loss']:.4f} after "
        f"(best {found['best_valid_loss']:.4f})",
        "last training loss": f"{found['train_loss']:.4f}{smoothed}",
        "exported": facts["result"],
        "time": (
            f"{found['median_seconds_per_step']:.3f} s a step (median) on {facts['device']}, jax "
            f"{facts['jax']}"
        ),
        **_peak_memory(facts.get("peak_memory", {})),
        "merged and reloaded": f"largest difference of a logit {comparison['max_difference']:.2e}, "
        f"largest logit {comparison['max_logit']:.1f}",
        **({} if config.baseline else {"merged, in PyTorch": _in_pytorch(comparison["pytorch"])}),
        "command": f"`{facts['command']}`",
        "data": f"fingerprint `{facts['data']}`",
        # An older report knows its last process alone.
        "commit, date": provenance.commits(facts.get("processes", [{"step": 0, **facts}])),
    }
    lines = [f"# {config.name}", "", *_source(config), "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    lines += ["", *(f"- {note}" for note in facts["notes"])] if facts["notes"] else []
    lines += ["", "![loss](figures/loss.png)", ""]
    if only := of_training_only(config):
        lines += [
            f"The training loss is that of each batch, with {' and '.join(only)}. The validation loss is "
            "without, and so may lie below it.",
            "",
        ]
    lines += [
        "`merged/` is the result in Hugging Face's format, with the tokenizer; `checkpoints/` holds the "
        "adapter and the"
        if config.baseline is None
        else "`trained.safetensors` holds every array that was trained; `checkpoints/` holds the same and the"
    ]
    lines += [
        "optimiser's state. `config.json` is the whole configuration and `metrics.jsonl` every number of "
        "the curve.",
        _adapter(facts["adapter"]),
        *_llama_cpp(facts.get("llama_cpp")),
        "",
    ]
    lines += [
        *prompt(facts.get("prompt")),
        *scores.scored(facts["scores"], config),
        *scores.named(facts.get("values", {})),
        *_cost(facts["cost"]),
        *_samples(facts["samples"], _how(config)),
    ]
    lines += ["## Trainable parameters", "", "```", facts["summary"].strip(), "```", ""]
    return "\n".join(lines)


def prompt(found: dict[str, Any] | None) -> list[str]:
    """How a prompt is written, in Markdown; nothing where there are none, or in an older version's report."""
    if found is None:
        return []
    ends = " or ".join(f"`{json.dumps(end)}`" for end in found["ends"])
    return [
        "## The prompt",
        "",
        "The model has learned to continue texts of this form. The first test input, as it was given:",
        "",
        "```",
        found["text"],
        "```",
        "",
        f"The tokenizer adds nothing to it. The answer ends at {ends}.",
        "",
    ]


def _peak_memory(found: dict[str, int | None]) -> dict[str, str]:
    """Nothing in an older version's report, and nothing of devices that do not count."""
    words = {"process": "of the process", "device": "of a device"}
    known = [f"{megabytes(found[of])} {word}" for of, word in words.items() if found.get(of)]
    return {"peak memory": f"{', '.join(known)}, when training had ended"} if known else {}


def _sizes(config: Config, found: dict[str, int]) -> str:
    """`frozen` is all that training holds beside what trains. The report of an older version has none."""
    base, trained = f"base {megabytes(found['base'])}", f"what trains {megabytes(found['delta'])}"
    if config.quantize is None or "frozen" not in found:
        return f"{base}, {trained}"
    return f"{base}, stored in {config.quantize} as {megabytes(found['frozen'])}, {trained}"


def _in_pytorch(found: dict[str, Any] | None) -> str:
    if found is None:
        return "not tried: PyTorch is not installed"
    return (
        f"largest difference of a logit {found['max_difference']:.2e}; missing and unexpected keys: "
        f"{', '.join(found['keys']) or 'none'}"
    )


def _adapter(files: dict[str, Any]) -> str:
    if files["bytes"] is None:
        return f"There is no `adapter/`: {files['missing']}."
    size, merged = megabytes(files["bytes"]), megabytes(files["merged_bytes"])
    return (
        f"`adapter/` is what was trained, in PEFT's format: a file of {size}, beside the merged model's "
        f"{merged}."
    )


def _llama_cpp(file: dict[str, Any] | None) -> list[str]:
    """The adapter as llama.cpp reads it; nothing where the base is no file of llama.cpp's."""
    if file is None:
        return []
    if file["bytes"] is None:
        return [f"There is no `adapter.gguf`: {file['missing']}."]
    return [
        f"`adapter.gguf` ({megabytes(file['bytes'])}) is the same for llama.cpp, beside the base's own "
        f"file: `llama-cli -m {file['base']} --lora adapter.gguf`."
    ]


def _source(config: Config) -> list[str]:
    source = config.source
    if source.paper is None:
        words = "This run reproduces no published row."
    else:
        words = f"Row: {', '.join(part for part in (source.paper, source.table, source.row) if part)}."
        if source.expected:
            words += (
                f" Published: {', '.join(f'{name} {value:g}' for name, value in source.expected.items())}."
            )
    return [f"{words} {source.note}" if source.note else words]


def _cost(cost: dict[str, dict[str, float]]) -> list[str]:
    if not cost:
        return []
    ours, full = cost["this run"], cost["full fine-tuning"]
    shown = {
        "bytes": megabytes,
        "optimiser bytes": megabytes,
        "seconds": "{:.3f} s".format,
        "FLOPs": "{:.3g}".format,
    }
    words = {"bytes": "memory", "optimiser bytes": "optimiser state", "seconds": f"time (median of {STEPS})"}
    lines = [
        "## A training step, beside full fine-tuning's",
        "",
        "| | this run | full fine-tuning | ratio |",
        "|---|---|---|---|",
    ]
    for name in ours:
        cells = [shown.get(name, "{:,}".format)(value) for value in (ours[name], full[name])]
        lines.append(f"| {words.get(name, name)} | {' | '.join(cells)} | {ours[name] / full[name]:.3f} |")
    return [
        *lines,
        "",
        "Memory and FLOPs are the compiler's figures for a whole step on one device; the times were "
        "measured one after the other.",
        "",
    ]


def _how(config: Config) -> str:
    """How the test inputs were answered, in words."""
    task, section = tasks.of(config.data), config.decode
    if task.labels is not None:
        return "answered" if task.head == "question_answering" else "labelled"
    if section.sample:
        return "drawn"
    return "greedy decoding" if section.beams == 1 else f"beam search, width {section.beams}"


def _samples(samples: list[dict[str, Any]], how: str) -> list[str]:
    if not samples:
        return []
    lines = [f"## Samples ({how}, test inputs)", ""]
    for sample in samples:
        lines += [
            f"**{sample['input']}**",
            "",
            f"- before: {sample['before'] or '(nothing)'}",
            f"- after: {sample['after'] or '(nothing)'}",
        ]
        lines += [f"- a person: {text}" for text in sample["references"][:1]] + [""]
    return lines
