"""Tokens a second of greedy decoding and of beam search, beside `generate` of `transformers`.

    python -m benchmarks.decoding [--rounds 3] [--models gpt2 ...] [--batches 8 ...] [--cores 1]

On what: GPT-2 small and SmolLM2-135M in float32, with random weights that both ways read from one Hugging
Face directory; prompts of 20 to 40 tokens, padded on the left; 32 more tokens of each. "Beams" are those of
`experiments/configs/e2e_smollm2_lora_r8.json`, with its length penalty and its ban of repeats. The end token
is never likely, and `transformers` may not take it, so that both make as many tokens. `transformers` has its
cache, `torch.inference_mode` and all the cores that we have.

Each way is a process. Once both have compiled and run, every round asks each for one whole call, prompts
included, one after the other. "Times" is the median of the rounds' own: the seconds of `transformers` over
ours in the same round. "Spread" is half the distance of its quartiles. "CPU times" is the same of the
processors' seconds. With `--cores 1`, where no thread waits for another, they hold on a busy machine too.
"Equal" is the share of tokens that both ways chose, which must be 99% at least. The result has the rows of
the last run.
"""

import argparse
import dataclasses
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import config as configs
from experiments.config import Decode
from experiments.decoding import decoder
from experiments.reports.provenance import provenance
from lora_jax.interop import hf

from . import in_turn, record
from .peers import models


CONFIG = Path("experiments/configs/e2e_smollm2_lora_r8.json")
MODELS = ("gpt2", "smollm2-135m")
WAYS = ("lora_jax", "transformers")
BATCHES = (1, 8, 32)
NEW = 32


@dataclasses.dataclass(frozen=True)
class Row:
    model: str
    batch: int
    search: str  # "greedy" or "beams"

    @property
    def name(self) -> str:
        return f"{self.model}, {self.batch} prompts, {self.search}"

    @property
    def section(self) -> Decode:
        section = configs.load(CONFIG).decode if self.search == "beams" else Decode(max_tokens=NEW)
        return dataclasses.replace(section, max_tokens=NEW, batch=self.batch)


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prompts(model: str, batch: int) -> list[list[int]]:
    draw = np.random.default_rng(batch)
    vocabulary = models.described(model).config.vocab_size
    return [draw.integers(5, vocabulary - 1, size).tolist() for size in draw.integers(20, 41, batch)]


def write(model: str, directory: Path) -> None:
    """Weights under which the next token depends on all before it, and is never the last of the vocabulary,
    which ends a text. Where they are small, a tied head repeats the last token.
    """
    described, draw = models.described(model), np.random.default_rng(0)
    shapes = jax.eval_shape(described.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]

    def drawn(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path)
        if leaf.ndim < 2:
            return np.full(leaf.shape, 1.0 if "scale" in name else 0.0, np.float32)
        values = draw.standard_normal(leaf.shape, np.float32) * (0.02 if "embedding" in name else 0.08)
        if name.endswith(("['wte']['embedding']", "['embed_tokens']['embedding']")):
            values[-1] = 0
        return values

    hf.save(directory, described, jax.tree_util.tree_map_with_path(drawn, shapes))


def ours(directory: Path) -> Callable[[Row], list[list[int]]]:
    model, params = hf.load(directory)
    params = jax.device_put(params)
    end = (model.config.vocab_size - 1,)
    return lambda row: decoder.generate(model, params, prompts(row.model, row.batch), row.section, end=end)


def theirs(directory: Path) -> Callable[[Row], list[list[int]]]:
    import torch
    import transformers

    torch.set_num_threads(cores())
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()

    def generate(row: Row) -> list[list[int]]:
        asked = prompts(row.model, row.batch)
        width = max(map(len, asked))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in asked])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in asked])
        section = row.section
        model.generation_config = transformers.GenerationConfig(
            do_sample=False,
            num_beams=section.beams,
            length_penalty=section.length_penalty,
            no_repeat_ngram_size=section.no_repeat_ngram,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            eos_token_id=model.config.vocab_size - 1,
            pad_token_id=0,
        )
        with torch.inference_mode():
            return model.generate(ids, attention_mask=mask)[:, width:].tolist()

    return generate


def work(way: str, directory: Path) -> None:
    """A line of tokens and seconds for each row that is read."""
    generate = (ours if way == "lora_jax" else theirs)(directory)
    for line in sys.stdin:
        row = Row(**json.loads(line))
        started = time.perf_counter(), time.process_time()
        tokens = generate(row)
        seconds = time.perf_counter() - started[0], time.process_time() - started[1]
        print(json.dumps({"tokens": tokens, "seconds": seconds}), flush=True)


def started(way: str, directory: Path) -> Any:
    command = [sys.executable, "-m", "benchmarks.decoding", "--worker", way, str(directory)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def asked(worker: Any, row: Row) -> dict[str, Any]:
    worker.stdin.write(json.dumps(dataclasses.asdict(row)) + "\n")
    worker.stdin.flush()
    return json.loads(worker.stdout.readline())


def measure(row: Row, workers: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    """The two lines of a row."""
    tokens = {way: asked(worker, row)["tokens"] for way, worker in workers.items()}
    wrong = {way: sorted({len(text) for text in texts} - {NEW}) for way, texts in tokens.items()}
    if any(wrong.values()):
        raise RuntimeError(f"{row.name}: texts have other lengths than {NEW}: {wrong}")
    equal = float(np.mean(np.array(tokens[WAYS[0]]) == np.array(tokens[WAYS[1]])))
    if equal < 0.99:
        raise RuntimeError(f"{row.name}: {equal:.4f} of the tokens are equal, so that not the same is timed")
    call = lambda way: lambda: asked(workers[way], row)["seconds"]
    seconds = in_turn.taken({way: call(way) for way in workers}, rounds)
    lines = []
    for way in WAYS:
        wall, cpu = (statistics.median(each) for each in zip(*seconds[way], strict=True))
        made = row.batch * NEW
        lines.append({"row": row.name, "way": way, "s": round(wall, 3), "tokens/s": round(made / wall, 1)})
        lines[-1] |= {"CPU s": round(cpu, 3)}
    for kind, name in enumerate(("times", "CPU times")):
        over = in_turn.ratio(*([each[kind] for each in seconds[way]] for way in reversed(WAYS)))
        spread = "spread" if kind == 0 else "CPU spread"
        lines[0] |= {name: round(over.median, 2), spread: round(over.spread, 2)}
    lines[0] |= {"equal": round(equal, 4)}
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="calls of each way (default: 3)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--batches", nargs="+", type=int, choices=BATCHES, default=BATCHES)
    parser.add_argument("--cores", type=int, help="of each process (default: all); Linux")
    parser.add_argument("--worker", nargs=2, metavar=("WAY", "DIRECTORY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds is {options.rounds}: a spread needs 2 at least")
    if options.worker:
        work(options.worker[0], Path(options.worker[1]))
        return 0
    if options.cores is not None:
        if not hasattr(os, "sched_setaffinity"):
            parser.error("--cores: this system does not tie a process to cores; leave it out")
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, allowed[: options.cores])  # which the processes inherit
    import torch
    import transformers

    about, lines = provenance(), []
    about |= {"torch": torch.__version__, "transformers": transformers.__version__}
    about |= {"cores": cores()}
    with tempfile.TemporaryDirectory() as directory:
        for model in options.models:
            write(model, Path(directory) / model)
            workers = {way: started(way, Path(directory) / model) for way in WAYS}
            for search, batch in itertools.product(("greedy", "beams"), options.batches):
                lines += measure(Row(model, batch, search), workers, options.rounds)
                print(lines[-2], lines[-1], file=sys.stderr, flush=True)
                command = shlex.join(["python", "-m", "benchmarks.decoding", *sys.argv[1:]])
                record.save("decoding", command, about, lines)
            for worker in workers.values():
                worker.stdin.close()
                worker.wait()
    print(record.table(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
