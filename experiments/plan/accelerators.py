"""The memory of accelerators, and whether a step fits into it.

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
