"""The memory of accelerators, whether a step fits into it, and their peak rates.

Gigabytes are the vendors' and are taken for 10^9 bytes, the careful reading. Left out: what driver and
runtime keep for themselves, of which `close` is a warning, and fragmentation.
"""

from experiments.strict_json import nearest


# GB a device: NVIDIA's data sheets of V100, A100, H100 (SXM), H200, L40S and of the GeForce RTX 4090;
# Google's "TPU architecture" pages of Cloud TPU v4 (32 GiB there), v5e, v5p and v6e, a chip each.
GIGABYTES = {
    "v100-32g": 32,
    "a100-40g": 40,
    "a100-80g": 80,
    "h100": 80,
    "h200": 141,
    "l40s": 48,
    "rtx4090": 24,
    "tpu-v4": 32,
    "tpu-v5e": 16,
    "tpu-v5p": 95,
    "tpu-v6e": 32,
}

# Peak TFLOP/s of matrix products, dense: of float32 operands at JAX's default precision, and of bfloat16
# ones. From the same sheets, whose rates "with sparsity" are halved. The first is TF32 from Ampere on, the
# plain units' before, and on a TPU the one rate that Google states, of bfloat16, in which JAX multiplies
# there.
TERAFLOPS = {
    "v100-32g": (15.7, None),
    "a100-40g": (156, 312),
    "a100-80g": (156, 312),
    "h100": (494.5, 989.5),
    "h200": (494.5, 989.5),
    "l40s": (183, 362),
    "rtx4090": (82.6, 165.2),
    "tpu-v4": (275, 275),
    "tpu-v5e": (197, 197),
    "tpu-v5p": (459, 459),
    "tpu-v6e": (918, 918),
}

# What `device_kind` says of each, as the beginning of a name; the first that fits. A Hopper of another form
# than SXM has other rates, and its name goes on.
KINDS = {
    "Tesla V100": "v100-32g",
    "NVIDIA A100-SXM4-80GB": "a100-80g",
    "NVIDIA A100": "a100-40g",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200 NVL": None,
    "NVIDIA H200": "h200",
    "NVIDIA L40S": "l40s",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "TPU v4": "tpu-v4",
    "TPU v5 lite": "tpu-v5e",
    "TPU v5e": "tpu-v5e",
    "TPU v5": "tpu-v5p",
    "TPU v6": "tpu-v6e",
}

# The share of the memory up to which a step is said to fit, and from which on it is said not to.
FITS, DOES_NOT = 0.9, 1.1


def memory(name: str) -> int:
    """Bytes of the accelerator of that name."""
    if name not in GIGABYTES:
        raise ValueError(
            f"`--accelerator` is {name!r}, and must be one of "
            f"{', '.join(GIGABYTES)}{nearest(name, GIGABYTES) or '.'}"
        )
    return GIGABYTES[name] * 10**9


def peak(kind: str, dtype: str) -> float | None:
    """FLOP/s of products of `dtype`, float32 or bfloat16, on a device whose `device_kind` is `kind`; None
    where no sheet was read.

    >>> peak("NVIDIA H200", "bfloat16")
    989500000000000.0
    """
    name = next((name for start, name in KINDS.items() if kind.startswith(start)), None)
    rate = None if name is None else TERAFLOPS[name][("float32", "bfloat16").index(dtype)]
    return None if rate is None else rate * 1e12


def verdict(name: str, static: int, temporaries: int) -> dict[str, str | float]:
    """`static` is exact and `temporaries` an estimate, so that a "no" for the first is certain and the
    others are not.
    """
    available = memory(name)
    share = (static + temporaries) / available
    if static > available:
        answer, why = "no", "what is stored alone is more"
    elif share > DOES_NOT:
        answer, why = "no", "by the estimate of temporaries"
    elif share > FITS:
        answer, why = "close", "the estimate of temporaries decides; try it"
    else:
        answer, why = "yes", f"{share:.0%} of the memory"
    return {"accelerator": name, "memory": available, "share": share, "fits": answer, "why": why}
