"""`base`: where the weights come from."""

from dataclasses import dataclass

from experiments import catalogue


@dataclass(frozen=True)
class Architecture:
    """A GPT-2 to start from random weights; the vocabulary's size is the tokenizer's."""

    n_embd: int
    n_layer: int
    n_head: int
    n_positions: int


@dataclass(frozen=True)
class Base:
    """Where the weights come from: exactly one of `name`, `path`, `run` and `architecture`.

    `name`: a base that `python -m experiments fetch` has put into the directory of the bases. `path`: a
    Hugging Face directory or a GGUF file, beside this config's file if it begins with a dot, or the name of a
    directory on the hub. `run`: another config, whose merged result is the base; it is run first when it is
    not finished, in `workdir` (relative to this run's own). `architecture`: random weights, drawn from the
    seed, with the `tokenizer` directory's vocabulary, or that of a byte-level BPE of `vocabulary` tokens
    trained on the training text.

    `adapter`: of another run's work directory or in PEFT's format, where A and B start; a head of classes
    does not. It is found as `path` is.

    `scan`: the layers are compiled once and run in a loop. A program then compiles in a time that does not
    grow with depth, and computes the same.
    """

    name: str | None = None
    path: str | None = None
    run: str | None = None
    workdir: str = "base"
    architecture: Architecture | None = None
    tokenizer: str | None = None
    vocabulary: int | None = None
    adapter: str | None = None
    scan: bool = False

    def __post_init__(self):
        sources = ("name", "path", "run", "architecture")
        given = [source for source in sources if getattr(self, source) is not None]
        if len(given) != 1:
            raise ValueError(
                "`base` takes exactly one of `name`, `path`, `run` and `architecture`, got "
                f"{', '.join(given) or 'none of them'}."
            )
        if self.name is not None:
            catalogue.entry(self.name, "base.name")
        if ((self.tokenizer is None) == (self.vocabulary is None)) != (self.architecture is None):
            raise ValueError(
                "one of `base.tokenizer` and `base.vocabulary` goes with `base.architecture`: every other "
                "base brings its own tokenizer."
            )
