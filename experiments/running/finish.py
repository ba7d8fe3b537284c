"""From trained arrays to files: choose, merge, export, keep the adapter, read back, compare, decode, score.

The logits of the adapted model in memory are compared with those of the exported one, read back from its
files. So a wrong scale, a transposed matrix or a missing tensor shows as a number in the report.
"""

import importlib.util
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

import lora_jax
from experiments import config as configs, tasks
from experiments.config import Config, Train
from experiments.metrics import values, warn
from experiments.progress import Count
from experiments.reports import cost, report
from experiments.running import baselines, beside, memory, processes
from experiments.running.base import Loaded
from experiments.running.inputs import Ready
from experiments.tasks import Task
from experiments.tasks.losses import extras
from experiments.tasks.splits import Prompt, Splits
from experiments.tasks.task import Predictor
from experiments.training import precision
from experiments.training.trainer import Trainer
from lora_jax.checkpoint import Checkpoints, State
from lora_jax.interop import gguf, hf, peft
from lora_jax.processes import on_first


# Rows of validation data on which the export is compared.
ROWS = 4
# Of a head that a task has given, `transformers`' class.
_CLASSES = {
    "sequence_classification": "AutoModelForSequenceClassification",
    "question_answering": "AutoModelForQuestionAnswering",
}
PREDICTIONS = {"after": "predictions.txt", "before": "predictions_before.txt"}


def finish(ready: Ready, state: State, checkpoints: Checkpoints, config: Config, workdir: Path) -> None:
    """From the trained state to the report."""
    started, trainer, splits = time.perf_counter(), ready.trainer, ready.splits
    peak = memory.peak()  # before the export, which PyTorch may read back

    def begin(what: str) -> None:
        processes.say(f"{config.name}: {what}")

    words, delta = chosen(checkpoints, state, config.train, judged=tasks.of(config.data).judge is not None)
    if config.baseline is None:
        begin("writing the merged model and the adapter")
        merged = export(trainer, delta, ready.base, workdir / "merged")
        on_first(lambda: beside.write(workdir / "merged", ready.decoder))
        adapter = write_adapter(trainer, delta, ready.base, workdir)
        llama_cpp = write_llama_cpp(trainer, delta, ready.base, workdir)
        begin("reading the merged model back, and comparing it with the trained one")
        comparison = compare(trainer, delta, workdir / "merged", splits)
    else:
        begin("writing what was trained, reading it back, and comparing it")
        baselines.write(delta, workdir / baselines.FILE)
        reread = lora_jax.merge(trainer.frozen, baselines.read(delta, workdir / baselines.FILE))
        merged = precision.stored(reread, ready.base.params)
        comparison = differences(trainer, delta, ready.base.model, merged, splits)
        kind = type(configs.baseline_value(config.baseline)).__name__
        missing = f"Hugging Face and PEFT have no form for {kind}"
        adapter, llama_cpp = {"bytes": None, "merged_bytes": None, "missing": missing}, None
    predicted = predict(ready.decoder, ready.base.params, merged, workdir, begin)
    files = tasks.of(config.data).files
    if files is not None:
        begin("writing the predictions with their probabilities")
        contents = files(ready.decoder, splits, merged)
        on_first(lambda: _write_files(workdir, contents))
    if config.compare_full:
        begin("measuring a step, beside one of full fine-tuning")
    facts: dict[str, Any] = {
        "base": {
            "origin": ready.base.origin,
            "name": ready.base.name,
            "fingerprint": ready.identity["base"],
            "parameters": _size(baselines.bare(ready.base).params),
        },
        "data": ready.identity["data"],
        "trainable": lora_jax.count(delta),
        "summary": str(lora_jax.summary(ready.base.params, delta)),
        "result": words,
        "adapter": adapter,
        "llama_cpp": llama_cpp,
        "comparison": comparison,
        "bytes": {
            "base": _bytes(ready.base.params),
            "frozen": _bytes(trainer.frozen),
            "delta": _bytes(delta),
        },
        "peak_memory": peak,
        "prompt": beside.example(ready.decoder),
        "labels": getattr(ready.decoder, "labels", None),
        **predicted,
        "examples": {"train": len(splits.train), "valid": len(splits.valid), "test": len(splits.prompts)},
        "cost": cost.beside_full(
            trainer, state, ready.base.params, ready.specs, splits.train, baselines.whole(ready.base)
        )
        if config.compare_full
        else {},
        "finishing_seconds": time.perf_counter() - started,
    }
    on_first(lambda: report.write(workdir, config, facts))


def chosen(checkpoints: Checkpoints, state: State, train: Train, *, judged: bool = False) -> tuple[str, Any]:
    """The result of the run that `train.result` names: in words, and its trained arrays. `judged`: the best
    is so by a metric of the task's.
    """
    if train.result == "best":
        best = checkpoints.restore(state.delta, state.opt_state, best=True)
        why = "is the best in validation by the task's metric" if judged else "has the lowest validation loss"
        return f"step {best.step}, which {why}", best.delta
    if train.result == "mean":
        count = lambda: min(train.keep_checkpoints, len(checkpoints.steps(temporary=False)))
        mean = checkpoints.average(state.delta, last=count())  # puts damaged checkpoints aside
        return f"the mean of the last {count()} checkpoints", mean
    return f"the last step, {state.step}", state.delta


def export(trainer: Trainer, delta: Any, base: Loaded, directory: Path) -> Any:
    """Writes the merged model to `directory`, all of it or nothing, in the base's dtypes, and returns the
    merged parameters.
    """
    merged = precision.stored(lora_jax.merge(trainer.frozen, delta), base.params)
    hf.save(directory, base.model, merged, source=base.directory, overwrite=True)
    return merged


def write_adapter(trainer: Trainer, delta: Any, base: Loaded, workdir: Path) -> dict[str, Any]:
    """Writes `adapter/` beside `merged/`; returns both sizes, or why there is no adapter. A run does not fail
    for want of one.
    """
    facts = {"bytes": None, "merged_bytes": _tensor_bytes(workdir / "merged"), "missing": None}
    if isinstance(configs.method_value(trainer.config.method), lora_jax.Full):
        return {
            **facts,
            "missing": "the method is Full, which adapts nothing: the weights themselves were trained",
        }
    try:
        peft.save(
            workdir / "adapter",
            base.model,
            trainer.frozen,
            delta,
            base=base.name,
            overwrite=True,
        )
    except ValueError as error:
        return {**facts, "missing": f"PEFT has no form for it: {str(error).rstrip('.')}"}
    return {**facts, "bytes": _tensor_bytes(workdir / "adapter")}


def write_llama_cpp(trainer: Trainer, delta: Any, base: Loaded, workdir: Path) -> dict[str, Any] | None:
    """Writes `adapter.gguf` where the base is llama.cpp's own file; returns its size and that file's name, or
    why there is none. None: the base is another.
    """
    if base.gguf is None:
        return None
    file = workdir / "adapter.gguf"
    try:
        gguf.save_adapter(file, base.model, trainer.frozen, delta, overwrite=True)
    except ValueError as error:
        return {"base": base.gguf, "bytes": None, "missing": str(error).rstrip(".")}
    return {"base": base.gguf, "bytes": on_first(lambda: file.stat().st_size), "missing": None}


def _tensor_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def compare(trainer: Trainer, delta: Any, directory: Path, splits: Splits) -> dict[str, Any]:
    """`differences` between the adapted model and the exported one, which is read back from `directory`."""
    model, params = hf.load(directory, mesh=trainer.mesh)
    model = precision.computing(model, trainer.config.precision)
    return differences(trainer, delta, model, params, splits, directory)


def differences(
    trainer: Trainer, delta: Any, model: Any, params: Any, splits: Splits, directory: Path | None = None
) -> dict[str, Any]:
    """The largest difference of a logit between the adapted model and `model` with `params`, and the largest
    logit beside it. `directory`: of the same for PyTorch, where that is installed.
    """
    batch = splits.valid.batch(np.arange(min(ROWS, len(splits.valid))))
    ids, more = batch["input_ids"], extras(batch)

    def logits(forward: Callable, params_of: Callable, *trees: Any) -> np.ndarray:
        run = lambda *trees: forward({"params": params_of(*trees)}, ids, **more)
        return np.asarray(jax.jit(run, out_shardings=NamedSharding(trainer.mesh, P()))(*trees), np.float32)

    adapted = logits(trainer.step.forward, lora_jax.combine, trainer.frozen, delta)
    plain = logits(model.apply, lambda params: params, params)
    head = getattr(model, "head", None) or ""
    return {
        "max_difference": float(np.abs(adapted - plain).max()),
        "max_logit": float(np.abs(adapted).max()),
        "pytorch": None
        if directory is None
        else on_first(lambda: _in_pytorch(directory, batch, adapted, head)),
    }


def _in_pytorch(
    directory: Path, batch: dict[str, np.ndarray], adapted: np.ndarray, head: str
) -> dict[str, Any] | None:
    """The same comparison with `transformers`' model of the export; None where PyTorch is not installed."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch
    import transformers

    kind = getattr(transformers, _CLASSES.get(head, "AutoModelForCausalLM"))
    model, loading = kind.from_pretrained(directory, output_loading_info=True)
    inputs = {"input_ids": batch["input_ids"], **extras(batch)}
    with torch.no_grad():
        found = model(**{name: torch.tensor(array) for name, array in inputs.items()})
    spans = head == "question_answering"
    stacked = torch.stack([found.start_logits, found.end_logits], -1) if spans else found.logits
    logits = stacked.float().numpy()
    keys = sorted(
        str(key) for name in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in loading[name]
    )
    return {"max_difference": float(np.abs(adapted - logits).max()), "keys": keys}


def predict(
    decoder: Predictor,
    before: Any,
    merged: Any,
    directory: Path,
    begin: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Answers the test inputs, which for most tasks is to decode; returns the samples, the scores and the
    values named for the report.

    `predictions.txt` has a line an input, as `contexts.txt` has, and `references.txt` people's wordings, both
    in the scorer's form. With `decode.before` the untouched base answers all inputs too, in
    `predictions_before.txt`; otherwise only those that the report shows. `begin` is told what comes next, and
    how much of it.
    """
    prompts, section, task = decoder.prompts, decoder.section, decoder.task
    if not prompts:
        return {"samples": [], "scores": {}, "values": {}}

    def decoded(params: Any, count: int, what: str) -> list[str]:
        if not count:
            return []
        begin(f"{what}: {count} of {len(prompts)} test inputs, {decoder.section.batch} at a time")
        with Count(what, count, silent=not processes.first()) as progress:
            return decoder.texts(params, count, tell=progress.update)

    texts = {"after": decoded(merged, len(prompts), "decoding with the merged model")}
    shown = len(prompts) if section.before else min(section.shown, len(prompts))
    texts["before"] = decoded(before, shown, "decoding with the base as it was")
    whole = [name for name in ("after", "before") if len(texts[name]) == len(prompts)]

    def write() -> None:
        for name in whole:
            _write_lines(directory / PREDICTIONS[name], map(task.as_scored, texts[name]))

        _write_lines(directory / "contexts.txt", [" ".join(prompt.text.split()) for prompt in prompts])

    on_first(write)
    samples = [
        {"input": prompt.text, "before": old, "after": new, "references": list(prompt.references[:2])}
        for prompt, old, new in zip(prompts[: section.shown], texts["before"], texts["after"], strict=False)
    ]
    named = _named(prompts, {name: texts[name] for name in whole})
    if task.evaluate is not None:
        begin("scoring the answers")
        weights = {"after": merged, "before": before}
        scores = {name: dict(task.evaluate(decoder, weights[name])) for name in whole}
        return {"samples": samples, "scores": scores, "values": named}
    if task.score is None or not all(prompt.references for prompt in prompts):
        return {"samples": samples, "scores": {}, "values": named}

    def score() -> dict[str, dict[str, float | None]]:
        (directory / "references.txt").write_text(
            "\n".join(
                "".join(task.as_scored(line) + "\n" for line in prompt.references) for prompt in prompts
            ),
            "utf-8",
        )
        # The warning about METEOR is printed once.
        return {
            name: scored(task, prompts, texts[name], tell=warn if name == "after" else lambda _: None)
            for name in whole
        }

    begin("scoring the texts")
    return {"samples": samples, "scores": on_first(score), "values": named}


def scored(
    task: Task, prompts: Sequence[Prompt], texts: Sequence[str], *, tell: Callable[[str], None] = warn
) -> dict[str, float | None]:
    """The task's scores of all texts, and where some prompts belong to a part of the test set, those of each
    part too, such as "BLEU seen".
    """
    assert task.score is not None  # as the caller has seen
    pairs = [
        (prompt.part, [task.as_scored(reference) for reference in prompt.references], task.as_scored(text))
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    found: dict[str, float | None] = {}
    parts = sorted({part for part, _, _ in pairs if part is not None})
    for part in (None, *(parts if len(parts) > 1 else ())):
        chosen = [pair[1:] for pair in pairs if part in (None, pair[0])]
        scores = task.score(*zip(*chosen, strict=True), tell=tell if part is None else lambda _: None)
        found |= {name if part is None else f"{name} {part}": value for name, value in scores.items()}
    return found


def _named(prompts: Sequence[Prompt], texts: dict[str, list[str]]) -> dict[str, Any]:
    """The values that the texts of each kind name, and those of people, who leave some out; nothing where
    prompts are no records.
    """
    found = {name: values.score([prompt.text for prompt in prompts], texts[name]) for name in texts}
    theirs = [(prompt.text, text) for prompt in prompts for text in prompt.references]
    if theirs:
        found["people"] = values.score(*zip(*theirs, strict=True))
    return {name: scores for name, scores in found.items() if scores is not None}


def _write_files(directory: Path, contents: dict[str, str]) -> None:
    for name, content in contents.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(content, "utf-8")


def _write_lines(file: Path, lines: Iterable[str]) -> None:
    file.write_text("".join(line + "\n" for line in lines), "utf-8")


def _size(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
