"""The table of peers as a picture: the time of each way over that of lora_jax, a panel for each model and a
line for each row.
"""

from pathlib import Path
from typing import Any

from .rows import MODELS, WAYS


def draw(lines: list[dict[str, Any]], file: Path) -> None:
    """A dot for each way with its spread. A way that has no such row has no dot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(line["row"] for line in lines))
    rows = {model: [name for name in names if name.startswith(f"{model}, ")] for model in MODELS}
    rows = {model: own for model, own in rows.items() if own}
    most = max(map(len, rows.values()))
    end = 1.05 * max(line["over lora_jax"] + line["spread"] for line in lines if "note" not in line)
    figure, panels = plt.subplots(
        1, len(rows), figsize=(5 * len(rows), 1.6 + 0.62 * most), sharex=True, squeeze=False
    )
    for axes, (model, own) in zip(panels[0], rows.items()):
        for number, way in enumerate(WAYS):
            found = [
                line for line in lines if line["row"] in own and line["way"] == way and "note" not in line
            ]
            offset = (number - (len(WAYS) - 1) / 2) * 0.09  # so that no dot hides another
            axes.errorbar(
                [line["over lora_jax"] for line in found],
                [own.index(line["row"]) + offset for line in found],
                xerr=[line["spread"] for line in found],
                fmt="o",
                markersize=5,
                linewidth=1,
                label=way,
            )
        axes.axvline(1, color="black", linewidth=0.8, zorder=0)
        axes.set_yticks(
            range(len(own)), [name.removeprefix(f"{model}, ").replace(", ", ",\n", 1) for name in own]
        )
        axes.set(
            title=model, xlabel="time of a step over lora_jax's", ylim=(len(own) - 0.5, -0.5), xlim=(0, end)
        )
        for between in range(1, len(own)):
            axes.axhline(between - 0.5, color="0.85", linewidth=0.8, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *panels[0][0].get_legend_handles_labels(), loc="lower center", ncols=len(WAYS), frameon=False
    )
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(file, dpi=120)
    plt.close(figure)
