"""What is compared: the rows of the table, and the ways of taking a step."""

import dataclasses


# The first one is what the others are set beside.
WAYS = (
    "lora_jax",
    "handwritten JAX",
    "qwix",
    "merge in the loss, JAX",
    "full fine-tuning, JAX",
    "PEFT",
    "PEFT, torch.compile",
    "full fine-tuning, PyTorch",
)

MODELS = ("gpt2", "smollm2-135m", "roberta-base")
RANK, ALPHA, RATE = 4, 32, 2e-4


@dataclasses.dataclass(frozen=True)
class Row:
    """One step: AdamW in float32 on random tokens, without dropout."""

    model: str = "gpt2"
    batch: int = 8
    tokens: int = 64  # E2E's examples are as short
    adapted: str = "all-linear"  # or "q, v"
    method: str = "LoRA"  # or DoRA, or QLoRA: LoRA on a base in NF4
    checkpoint: bool = False

    @property
    def name(self) -> str:
        words = [self.model, f"{self.batch} x {self.tokens}", self.adapted, self.method]
        return ", ".join([*words, "checkpoint"] if self.checkpoint else words)


ROWS = (
    *(Row(model) for model in MODELS),
    *(Row(model, adapted="q, v") for model in MODELS),
    *(Row(model, batch=batch) for model in MODELS for batch in (1, 32)),
    *(Row(model, checkpoint=True) for model in MODELS),
    *(Row(model, method=method) for model in MODELS for method in ("DoRA", "QLoRA")),
    Row(batch=4, tokens=128),
)


def is_torch(way: str) -> bool:
    return way == "PEFT" or "torch" in way.lower()


class Cannot(Exception):
    """A way that has no such row, and why."""
