"""The table of peers as a picture: the time of each way over that of lora_jax, one group for each row."""

from pathlib import Path
from typing import Any

from .rows import WAYS


def draw(lines: list[dict[str, Any]], file: Path) -> None:
    """A way that has no such row is left out of the group."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = list(dict.fromkeys(line["row"] for line in lines))
    height = 0.8 / len(WAYS)
    figure, axes = plt.subplots(figsize=(9, 1 + 1.3 * len(rows)), layout="constrained")
    for number, way in enumerate(WAYS):
        own = [line for line in lines if line["way"] == way and line.get("over lora_jax") is not None]
        axes.barh(
            [rows.index(line["row"]) + (number - (len(WAYS) - 1) / 2) * height for line in own],
            [line["over lora_jax"] for line in own],
            height,
            xerr=[line["spread"] for line in own],
            label=way,
        )
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set_xlabel("time of a step over lora_jax's")
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(file, dpi=120)
    plt.close(figure)
