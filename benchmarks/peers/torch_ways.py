"""The steps of the ways in PyTorch: PEFT's, eager and compiled, and full fine-tuning."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .models import batch, MODULES
from .rows import ALPHA, Cannot, RANK, RATE, Row


def prepared(
    way: str, row: Row, directory: Path, device: str = "cpu"
) -> tuple[Callable[[], float], dict[str, Any]]:
    """A function that takes one step and returns its loss, and what it needs. `device`: where JAX computes,
    cpu, gpu or tpu.
    """
    import torch
    import transformers

    place = _place(device)
    kind = "SequenceClassification" if row.model == "roberta-base" else "CausalLM"
    model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(directory)
    if row.checkpoint:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if way.startswith("PEFT"):
        model = _with_peft(model, row)
    model.to(place).train()
    ids, labels = (
        torch.as_tensor(array, dtype=torch.long, device=place)
        for array in batch(row.model, row.batch, row.tokens)
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=1e-4)  # optax's
    called = torch.compile(model) if way.endswith("torch.compile") else model

    def one() -> float:
        loss = called(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if place == "cuda":  # the update is not waited for otherwise
            torch.cuda.synchronize()
        return loss.item()

    started = time.perf_counter()
    first = one()  # compiles, and makes the moments
    states = [value for state in optimizer.state.values() for value in state.values()]
    figures = {
        "compile s": time.perf_counter() - started if called is not model else None,
        "optimizer MB": sum(value.numel() * value.element_size() for value in states) / 1e6,
        "first loss": first,
    }
    return one, figures


def peak_bytes() -> int | None:
    """The most memory of the device; None on a CPU, which has none of its own."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None


def _place(device: str) -> str:
    """PyTorch's name of the device that JAX has, with products of the same precision there."""
    import torch

    if device == "cpu":
        return "cpu"
    if device != "gpu" or not torch.cuda.is_available():
        raise Cannot(f"this PyTorch has no {device.upper()}")
    torch.set_float32_matmul_precision("high")  # TF32, as is JAX's default
    return "cuda"


def _with_peft(model: Any, row: Row) -> Any:
    import peft

    if row.method == "QLoRA":
        raise Cannot("PEFT needs bitsandbytes' 4 bits: not on a CPU, and not set up here elsewhere")
    if (row.model, row.adapted) not in MODULES:
        raise Cannot("PEFT adapts a fused projection as a whole")
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=MODULES[row.model, row.adapted],
        fan_in_fan_out=row.model == "gpt2",
        use_dora=row.method == "DoRA",
    )
    return peft.get_peft_model(model, config)
