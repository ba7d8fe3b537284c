"""Everything that a plan says, as one dict of numbers, which `report` prints and `--json` writes."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax

import lora_jax
from experiments import config as configs
from experiments.config import AXES, Mesh
from experiments.plan import accelerators, claims, devices, flops, models, size
from experiments.plan.collectives import Collectives
from experiments.plan.models import Subject
from experiments.plan.step import Step, targets_of, training_step, Workload
from experiments.strict_json import nearest
from experiments.training.sharded import make_mesh
from lora_jax import Full


# The machine code does not matter here, and takes most of the time of compiling it.
QUICK = {"xla_backend_optimization_level": 0}
PAPER = "gpt3-175b"


@dataclass(frozen=True)
class Request:
    """What the command line asks for. None: the model's or the method's own."""

    model: str
    mesh: Mesh
    method: str = "LoRA"
    rank: int | None = None
    alpha: float | None = None
    targets: tuple[str, ...] | None = None
    blocks: tuple[bool, ...] | None = None
    batch: int = 64
    seq: int | None = None
    counted: int | None = None
    dtype: str = "bfloat16"
    optimizer: Literal["adamw", "adamw_authors"] = "adamw"
    accumulate: int = 1
    remat: bool = True
    quantize: str | None = None
    accelerator: str | None = None
    compare_full: bool = False

    def check(self) -> None:
        """Raises `ValueError` for what can be told without the model."""
        for name in ("batch", "seq", "counted", "accumulate", "rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`--{name}` must be at least 1, got {value}.")
        parts = self.mesh.data * self.mesh.fsdp * self.accumulate
        if self.batch % parts:
            raise ValueError(
                f"`--batch` is {self.batch}, and must be a multiple of data * fsdp * accumulate ({parts}), "
                "over which its examples are spread."
            )
        if self.accelerator is not None:
            accelerators.memory(self.accelerator)


def plan(request: Request, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """The plan. `say` is called with the progress.

    Raises:
      ValueError: the request is wrong.
    """
    request.check()
    count = request.mesh.data * request.mesh.fsdp * request.mesh.tensor
    devices.start(count)
    subject = models.named(request.model, request.dtype, checkpoint=request.remat)
    tokens = subject.longest if request.seq is None else request.seq
    if subject.bounded and tokens > subject.longest:
        raise ValueError(f"`--seq` is {tokens}, and {request.model} has positions for {subject.longest}.")
    if request.counted is not None and subject.classifies:
        raise ValueError(
            f"`--counted` is {request.counted}, and {request.model} is planned with one label an example: "
            "leave it out."
        )
    if request.counted is not None and request.counted > tokens:
        raise ValueError(
            f"`--counted` is {request.counted}, more than the {tokens} tokens of an example (`--seq`)."
        )
    method = _method(request, subject)
    work = Workload(
        request.batch,
        tokens,
        method,
        request.targets,
        request.optimizer,
        request.accumulate,
        request.quantize,
        request.counted,
    )
    mesh = make_mesh(request.mesh)
    step = training_step(subject, mesh, work)
    say(f"{request.model} on {count} virtual device{'s' * (count > 1)}: compiling the step")
    found: dict[str, Any] = {
        "model": {
            "name": request.model,
            "parameters": lora_jax.count(step.params),
            "bytes": size.whole(step.params),
            "dtype": request.dtype,
        },
        "mesh": {name: mesh.shape[name] for name in AXES},
        "workload": {
            "batch": work.batch,
            "tokens": tokens,
            "counted": work.counted,
            "accumulate": work.accumulate,
            "remat": request.remat,
            "quantize": work.quantize,
        },
        "method": repr(method),
        "targets": list(targets_of(subject, work))
        if isinstance(targets_of(subject, work), dict)
        else [targets_of(subject, work)],
        "optimizer": work.optimizer,
        "step": _figures(subject, step, work, request),
        "jax": jax.__version__,
    }
    if request.compare_full and not isinstance(method, Full):
        say("compiling the step of full fine-tuning")
        full = Workload(
            work.batch, tokens, Full(), None, work.optimizer, work.accumulate, counted=work.counted
        )
        found["full"] = _figures(subject, training_step(subject, mesh, full), full, request)
    if request.model == PAPER and not isinstance(method, Full):
        found["claims"] = claims.of(subject, step, tokens)
    names = accelerators.GIGABYTES if request.accelerator is None else [request.accelerator]
    for figures in filter(None, (found["step"], found.get("full"))):
        figures["fits"] = [
            accelerators.verdict(name, figures["bytes"]["static"], figures["bytes"]["temporaries"])
            for name in names
        ]
    return found


def _method(request: Request, subject: Subject) -> Any:
    section = {"name": request.method, "rank": request.rank, "alpha": request.alpha, "blocks": request.blocks}
    if request.method == "LoRA" and request.targets is None and request.blocks is None:
        section["blocks"] = subject.blocks
    if request.method not in configs.methods():
        raise ValueError(
            f"`--method` is {request.method!r}, and must be one of "
            f"{', '.join(configs.methods())}{nearest(request.method, configs.methods()) or '.'}"
        )
    fields = configs.methods()[request.method].__dataclass_fields__
    for name, value in section.items():
        if name not in ("name", *fields) and value is not None:
            raise ValueError(f"`--{name}` is not an option of {request.method}: leave it out.")
    return configs.method_value(
        {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in section.items()
            if value is not None
        }
    )


def _of_adapters(delta: Any) -> int:
    nodes = jax.tree.leaves(delta, is_leaf=lambda node: isinstance(node, lora_jax.Adapter))
    return sum(lora_jax.count(node) for node in nodes if isinstance(node, lora_jax.Adapter))


def _figures(subject: Subject, step: Step, work: Workload, request: Request) -> dict[str, Any]:
    started = time.perf_counter()
    lowered = step.lower()
    compiling = time.perf_counter()
    compiled = lowered.compile(compiler_options=QUICK)
    compiled_at = time.perf_counter()
    sent = Collectives.of(compiled.as_text())
    held = {name: size.per_device(getattr(step, name)) for name in ("frozen", "delta", "opt_state", "batch")}
    gradients = held["delta"]
    examples = work.batch // work.accumulate // (request.mesh.data * request.mesh.fsdp)
    itemsize = jax.numpy.dtype(request.dtype).itemsize
    shape = {"layers": subject.layers, "examples": examples, "tokens": work.tokens, "width": subject.width}
    kept = size.kept_activations(**shape, itemsize=itemsize) if request.remat else None
    found = {request.dtype: compiled.memory_analysis().temp_size_in_bytes}
    if itemsize < 4:
        # The CPU's compiler has no 16-bit products, and in some versions (jax 0.10's) keeps all layers'
        # weights in 32 bits beside the stored ones. The same step in 32 bits has no such copies and nothing
        # smaller, so that it bounds what is asked for.
        wide = training_step(
            models.named(request.model, "float32", checkpoint=request.remat), step.mesh, work
        )
        found["float32"] = wide.lower().compile(compiler_options=QUICK).memory_analysis().temp_size_in_bytes
    temporaries = min(found.values())
    total = flops.of(step.function, *step.arguments)
    return {
        "trained": {
            "numbers": lora_jax.count(step.delta),
            "of_adapters": _of_adapters(step.delta),
            "bytes": size.whole(step.delta),
            "with_optimiser_bytes": size.whole((step.delta, step.opt_state)),
        },
        "bytes": {
            **held,
            "static": sum(held.values()),
            "temporaries": temporaries,
            "temporaries_compiled_in": found,
            "gradients": gradients,
            "kept_activations": kept,
            "other_temporaries": max(0, temporaries - gradients - (kept or 0)),
            "total": sum(held.values()) + temporaries,
        },
        "flops": {
            "all_devices": total,
            "per_device": total / step.mesh.size,
            "per_token": total / (work.batch * work.tokens),
        },
        "collectives": {"count": sent.count, "bytes": sent.bytes, "loops_counted_once": sent.once},
        "seconds": {"lower": compiling - started, "compile": compiled_at - compiling},
    }
