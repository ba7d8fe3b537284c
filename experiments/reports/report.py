"""`report.md` and the loss curve of a finished run, and one table of several runs.

`report.json` holds what the page says as numbers; the page is a rendering of it, of `config.json` and of
`metrics.jsonl`.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import config as configs
from experiments.config import Config, Decode
from experiments.progress import read_metrics
from experiments.reports import card
from experiments.reports.cost import STEPS
from experiments.reports.provenance import command, provenance


def write(workdir: Path, config: Config, facts: dict[str, Any]) -> None:
    """Draws the figure, then writes `report.json`, then `report.md`, whose presence says that the run is
    finished.
    """
    metrics = read_metrics(workdir / "metrics.jsonl")
    facts = {
        **facts,
        "numbers": numbers(metrics),
        "notes": [line["note"] for line in metrics if "note" in line],
        "command": command(),
        **provenance(),
    }
    (workdir / "figures").mkdir(exist_ok=True)
    draw(metrics, config, workdir / "figures" / "loss.png")
    if facts.get("values"):
        draw_values(facts["values"], config, workdir / "figures" / "values.png")
    (workdir / "report.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", "utf-8")
    if (workdir / "adapter").is_dir():
        (workdir / "adapter" / "README.md").write_text(
            card.render(config, facts, prompt(facts["prompt"])), "utf-8"
        )
    page = workdir / "report.tmp"
    page.write_text(render(config, facts), "utf-8")
    page.replace(workdir / "report.md")


def numbers(metrics: list[dict[str, Any]]) -> dict[str, float]:
    """What a table of runs shows of a run's metrics."""
    valid = [line["valid_loss"] for line in metrics if "valid_loss" in line]
    train = [line["loss"] for line in metrics if "loss" in line]
    seconds = [line["seconds_per_step"] for line in metrics if "seconds_per_step" in line]
    return {
        "steps": metrics[-1]["step"],
        "first_valid_loss": valid[0],
        "valid_loss": valid[-1],
        "best_valid_loss": min(valid),
        "train_loss": train[-1],
        "median_seconds_per_step": statistics.median(seconds),
    }


def draw(metrics: list[dict[str, Any]], config: Config, path: Path) -> None:
    """Training and validation loss over the steps, with what only the former has."""
    only = _of_training_only(config)
    training = f"training, with {' and '.join(only)}" if only else "training"
    _plot({training: _curve(metrics, "loss"), "validation": _curve(metrics, "valid_loss")}, config.name, path)


def _of_training_only(config: Config) -> list[str]:
    """What raises the training loss and is not in the validation loss."""
    smoothing, dropout = config.train.label_smoothing, config.method.get("dropout")
    found = {f"label smoothing {smoothing:g}": smoothing, f"dropout {dropout}": dropout}
    return [words for words, value in found.items() if value]


# Whose texts name values, in words: the reports' keys, in the order of the table.
WRITERS = {"before": "base, untouched", "after": "this run", "people": "people"}


def draw_values(found: dict[str, dict[str, Any]], config: Config, path: Path) -> None:
    """The share of values that texts name: a group of bars for all, and one for each attribute."""
    figure, axes = _figure()
    attributes = list(found["after"]["attributes"])
    groups = ["all values", *attributes, "texts with all"]
    width = 0.8 / len(found)
    writers = [writer for writer in WRITERS if writer in found]
    for place, writer in enumerate(writers):
        scores = found[writer]
        shares = [
            scores["values"],
            *(scores["attributes"][name] for name in attributes),
            scores["all_values"],
        ]
        left = [group + (place - (len(writers) - 1) / 2) * width for group in range(len(groups))]
        axes.bar(left, [100 * share for share in shares], width, label=WRITERS[writer])
    axes.set(ylabel="named (%)", title=config.name, ylim=(0, 100))
    axes.set_xticks(range(len(groups)), groups, rotation=30, ha="right")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.08), ncols=len(writers), frameon=False)
    figure.savefig(path, dpi=120)


def draw_together(workdirs: Sequence[Path], path: Path) -> None:
    """The validation losses of several finished runs in one picture."""
    curves = {
        _name(workdir): _curve(read_metrics(workdir / "metrics.jsonl"), "valid_loss") for workdir in workdirs
    }
    _plot(curves, "validation", path)


def _curve(metrics: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in metrics if name in line]


def _plot(curves: dict[str, list[tuple[int, float]]], title: str, path: Path) -> None:
    figure, axes = _figure()
    for label, points in curves.items():
        # Few points, as of a validation loss, are shown as such.
        axes.plot(
            *zip(*points, strict=True),
            "o-" if len(points) < 30 else "-",
            label=label,
            linewidth=1,
            markersize=3,
        )
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=title)
    axes.legend()
    figure.savefig(path, dpi=120)


def _figure() -> tuple[Any, Any]:
    # The object interface: no display, no global state, whatever backend the user has chosen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def render(config: Config, facts: dict[str, Any]) -> str:
    """The page, as Markdown."""
    found, base, comparison = facts["numbers"], facts["base"], facts["comparison"]
    stored = "" if config.quantize is None else f", base stored in {config.quantize}"
    smoothed = (
        f" (with label smoothing {config.train.label_smoothing:g})" if config.train.label_smoothing else ""
    )
    rows = {
        "base": f"{base['origin']}, {base['parameters']:,} parameters, fingerprint `{base['fingerprint']}`",
        "method": (
            f"`{configs.method_value(config.method)}` on "
            f"{', '.join(f'`{pattern}`' for pattern in config.targets)}{stored}"
        ),
        "trainable parameters": f"{facts['trainable']:,} "
        f"({facts['trainable'] / base['parameters']:.3%} of the base)",
        "sizes": f"base {_megabytes(facts['bytes']['base'])}, "
        f"what trains {_megabytes(facts['bytes']['delta'])}",
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
        "merged and reloaded": f"largest difference of a logit {comparison['max_difference']:.2e}, "
        f"largest logit {comparison['max_logit']:.1f}",
        "merged, in PyTorch": _in_pytorch(comparison["pytorch"]),
        "command": f"`{facts['command']}`",
        "data": f"fingerprint `{facts['data']}`",
        "commit, date": f"{facts['commit'] or 'outside of a clone'}, {facts['date']}",
    }
    lines = [f"# {config.name}", "", *_source(config), "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    lines += ["", *(f"- {note}" for note in facts["notes"])] if facts["notes"] else []
    lines += ["", "![loss](figures/loss.png)", ""]
    if only := _of_training_only(config):
        lines += [
            f"The training loss is that of each batch, with {' and '.join(only)}. The validation loss is "
            "without, and so may lie below it.",
            "",
        ]
    lines += [
        "`merged/` is the result in Hugging Face's format, with the tokenizer; `checkpoints/` holds the "
        "adapter and the"
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
        *_scores(facts["scores"], config),
        *_values(facts.get("values", {})),
        *_cost(facts["cost"]),
        *_samples(facts["samples"], config.decode),
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
    size, merged = _megabytes(files["bytes"]), _megabytes(files["merged_bytes"])
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
        f"`adapter.gguf` ({_megabytes(file['bytes'])}) is the same for llama.cpp, beside the base's own "
        "file: "
        f"`llama-cli -m {file['base']} --lora adapter.gguf`."
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


# Of the five, these are fractions that papers print as percentages.
PERCENTAGES = ("BLEU", "METEOR", "ROUGE_L")


def _as_printed(name: str, value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}" if name in PERCENTAGES else f"{value:.4f}"


def _scores(scores: dict[str, dict[str, float | None]], config: Config) -> list[str]:
    if not scores:
        return []
    names = list(scores["after"])
    rows = {words: scores[key] for key, words in WRITERS.items() if key in scores}
    lines = ["## Scores (test inputs)", "", f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines += [
        f"| {words} | {' | '.join(_as_printed(name, found[name]) for name in names)} |"
        for words, found in rows.items()
    ]
    expected = config.source.expected
    if expected:
        cells = (f"{expected[name]:g}" if name in expected else "-" for name in names)
        lines.append(f"| published | {' | '.join(cells)} |")
    lines += [
        "",
        "`python -m experiments score e2e --refs references.txt --hyps predictions.txt` gives these numbers "
        "again; BLEU, METEOR and",
    ]
    return [
        *lines,
        "ROUGE-L are percentages here. A dash under METEOR: java or its package was not there.",
        "",
    ]


def _values(found: dict[str, dict[str, Any]]) -> list[str]:
    """Which of the values of its record a text names; nothing in an older version's report."""
    if not found:
        return []
    attributes = list(found["after"]["attributes"])
    names = ["all values", *attributes, "texts with all"]
    lines = ["## Values named (test inputs)", "", f"| | {' | '.join(names)} |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for writer, words in WRITERS.items():
        if writer in found:
            scores = found[writer]
            shares = [
                scores["values"],
                *(scores["attributes"][name] for name in attributes),
                scores["all_values"],
            ]
            lines.append(f"| {words} | {' | '.join(f'{100 * share:.1f}' for share in shares)} |")
    return [
        *lines,
        "",
        "Percent of the values of the records that the texts name, and of texts that name all of theirs: "
        "names "
        "by their words, the rest",
        "by the wordings of `experiments/metrics/values.py`. People leave some out. `score e2e` with "
        "`--contexts contexts.txt` gives the first and last number again.",
        "",
        "![values](figures/values.png)",
        "",
    ]


def _cost(cost: dict[str, dict[str, float]]) -> list[str]:
    if not cost:
        return []
    ours, full = cost["this run"], cost["full fine-tuning"]
    shown = {
        "bytes": _megabytes,
        "optimiser bytes": _megabytes,
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


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.2f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


def _samples(samples: list[dict[str, Any]], section: Decode) -> list[str]:
    if not samples:
        return []
    how = (
        "drawn"
        if section.sample
        else "greedy decoding"
        if section.beams == 1
        else f"beam search, width {section.beams}"
    )
    lines = [f"## Samples ({how}, test inputs)", ""]
    for sample in samples:
        lines += [
            f"**{sample['input']}**",
            "",
            f"- before: {sample['before']}",
            f"- after: {sample['after']}",
        ]
        lines += [f"- a person: {text}" for text in sample["references"][:1]] + [""]
    return lines


def table(workdirs: Sequence[Path]) -> str:
    """One line a finished run, as Markdown. Raises `ValueError` for a directory that holds none."""
    lines = [
        "| run | trainable | steps | validation loss before | after | BLEU before | after | s/step | merged "
        "- adapted |",
        "|---" * 9 + "|",
    ]
    for workdir in workdirs:
        if not (workdir / "report.md").is_file():
            raise ValueError(f"`{workdir}` holds no finished run.")
        facts, name = json.loads((workdir / "report.json").read_text("utf-8")), _name(workdir)
        found, scores = (
            facts["numbers"],
            facts.get("scores", {}),
        )  # pretraining has none, nor had older reports
        bleu = [_as_printed("BLEU", scores.get(when, {}).get("BLEU")) for when in ("before", "after")]
        lines.append(
            f"| {name} | {facts['trainable']:,} | {found['steps']:,} | {found['first_valid_loss']:.4f} | "
            f"{found['valid_loss']:.4f} | {' | '.join(bleu)} | "
            f"{found['median_seconds_per_step']:.3f} | {facts['comparison']['max_difference']:.1e} |"
        )
    return "\n".join(lines)


def _name(workdir: Path) -> str:
    return json.loads((workdir / "config.json").read_text("utf-8"))["name"]
