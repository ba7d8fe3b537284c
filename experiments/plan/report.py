"""A plan as tables: drawn on a terminal, Markdown elsewhere."""

import sys
from dataclasses import dataclass
from typing import Any, TextIO


_HELD = {"frozen": "weights", "delta": "what trains", "opt_state": "optimiser state", "batch": "batch"}
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""

    def markdown(self) -> str:
        lines = [f"## {self.title}", "", f"| {' | '.join(self.columns)} |", "|---" * len(self.columns) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in self.rows]
        return "\n".join([*lines, "", *([self.note, ""] if self.note else [])])


def amount(count: float) -> str:
    """Bytes in powers of 1,000, as accelerators are sold.

    >>> amount(37_748_736)
    '37.75 MB'
    """
    power = 0
    while power < len(_UNITS) - 1 and count >= 1000 ** (power + 1):
        power += 1
    return f"{count:.0f} B" if power == 0 else f"{count / 1000**power:,.2f} {_UNITS[power]}"


def tables(found: dict[str, Any]) -> list[Table]:
    shown = {"this step": found["step"], **({"full fine-tuning": found["full"]} if "full" in found else {})}
    result = [_setting(found), _bytes(shown), _work(shown), _collectives(shown)]
    return [*result, *([_claims(found["claims"])] if "claims" in found else []), _fits(shown)]


def _setting(found: dict[str, Any]) -> Table:
    model, work, trained = found["model"], found["workload"], found["step"]["trained"]
    rows = {
        "model": f"{model['name']}, {model['parameters']:,} parameters, "
        f"{amount(model['bytes'])} in {model['dtype']}",
        "method": f"{found['method']} on {', '.join(found['targets'])}"
        + ("" if work["quantize"] is None else f", base stored in {work['quantize']}"),
        "trains": f"{trained['numbers']:,} numbers ({trained['numbers'] / model['parameters']:.4%}), "
        f"{trained['of_adapters']:,} of them adapters'",
        "checkpoint": f"{amount(trained['bytes'])}; with {found['optimizer']}'s state "
        f"{amount(trained['with_optimiser_bytes'])}",
        "step": f"{work['batch']} examples of {work['tokens']:,} tokens, "
        f"{'' if work['counted'] is None else str(work['counted']) + ' of them counted, '}"
        f"in {work['accumulate']} part{'s' * (work['accumulate'] > 1)}"
        f"{', layers recomputed' if work['remat'] else ''}",
        "mesh": ", ".join(f"{name} {count}" for name, count in found["mesh"].items()),
        "compiled": f"in {sum(found['step']['seconds'][name] for name in ('lower', 'compile')):.1f} s, "
        f"jax {found['jax']}",
    }
    return Table(f"Plan: {model['name']}", ("", ""), list(rows.items()))


def _bytes(shown: dict[str, dict]) -> Table:
    of = lambda name: tuple(
        "-" if figures["bytes"][name] is None else amount(figures["bytes"][name])
        for figures in shown.values()
    )
    rows = [(words, "exact", *of(name)) for name, words in _HELD.items()]
    rows += [("stored, together", "exact", *of("static"))]
    rows += [
        ("gradients of what trains", "exact", *of("gradients")),
        ("activations kept for the backward pass", "by formula", *of("kept_activations")),
    ]
    rows += [("other temporaries", "estimate", *of("other_temporaries")), ("all", "estimate", *of("total"))]
    note = (
        "Exact: from shapes and shardings. Estimate: the CPU compiler's, of the step as asked for and in "
        "32 bits, whichever is less, since it has no products in 16; without fused attention, and not "
        "calibrated on accelerators. By formula: the input of each layer, once."
    )
    return Table("Bytes a device", ("", "", *shown), rows, note)


def _work(shown: dict[str, dict]) -> Table:
    rows = [
        (words, *(f"{figures['flops'][name]:.4g}" for figures in shown.values()))
        for name, words in {
            "all_devices": "all devices",
            "per_device": "a device",
            "per_token": "a token",
        }.items()
    ]
    note = (
        "Matrix products and convolutions of the step as it is traced, two for a multiply-add, loops times "
        "their length; a device's is its share."
    )
    return Table("FLOPs of a step", ("", *shown), rows, note)


def _collectives(shown: dict[str, dict]) -> Table:
    kinds = sorted({kind for figures in shown.values() for kind in figures["collectives"]["count"]})

    def cell(sent: dict[str, Any], kind: str) -> str:
        return (
            f"{sent['count'][kind]:,} of {amount(sent['bytes'][kind])} together"
            if kind in sent["count"]
            else "-"
        )

    rows = [
        (kind, *(cell(figures["collectives"], kind) for figures in shown.values())) for kind in kinds
    ] or [("none", *("-" for _ in shown))]
    once = any(figures["collectives"]["loops_counted_once"] for figures in shown.values())
    note = "Bytes of the whole arrays, as the CPU's compiler has them: it widens to 32 bits."
    return Table(
        "Collectives a device and a step",
        ("", *shown),
        rows,
        note + (" Loops whose length it does not say are counted once." if once else ""),
    )


def _fits(shown: dict[str, dict]) -> Table:
    rows = []
    for verdicts in zip(*(figures["fits"] for figures in shown.values()), strict=True):
        first = verdicts[0]
        rows.append(
            (
                f"{first['accelerator']}, {amount(first['memory'])}",
                *(f"{verdict['fits']}: {verdict['why']}" for verdict in verdicts),
            )
        )
    return Table(
        "Does it fit?",
        ("", *shown),
        rows,
        "What is stored and the temporaries, against the vendor's gigabytes.",
    )


def _claims(found: dict[str, Any]) -> Table:
    paper, full, lora, checkpoint, forward = (
        found[name] for name in ("paper", "full", "lora", "checkpoint", "forward_flops")
    )
    more = forward["adapted"] / forward["base"] - 1
    smaller = lambda name: f"{checkpoint['full'] / checkpoint[name]:,.0f}"
    rows = [
        (
            "memory to train all of it with Adam",
            amount(paper["full"]),
            f"{amount(full['all'])}; without gradients {amount(full['all'] - full['gradients'])}",
        ),
        ("memory to train with LoRA", amount(paper["lora"]), amount(lora["all"])),
        ("checkpoint of a fully trained model", amount(paper["full_checkpoint"]), amount(checkpoint["full"])),
        (
            "checkpoint of LoRA",
            amount(paper["lora_checkpoint"]),
            f"{amount(checkpoint['lora_16_bits'])} in 16 bits; as trained {amount(checkpoint['lora'])}",
        ),
        (
            "how much smaller",
            "10,000 times",
            f"{smaller('lora_16_bits')} times; as trained {smaller('lora')}",
        ),
        (
            "latency that is added once merged",
            "none",
            (
                "none: the same shapes and dtypes, so the same program"
                if found["merged_is_the_base"]
                else "the shapes differ"
            )
            + "; forward pass of one example: "
            f"base {forward['base']:.4g} FLOPs, merged {forward['merged']:.4g}, "
            f"with the adapter beside {more:+.4%}",
        ),
    ]
    note = (
        "Paper: Hu et al. 2021, section 4.2, rank 4 on query and value. Here: weights, gradients and both "
        "moments, one copy, in this plan's dtypes."
    )
    return Table("GPT-3 175B in LoRA's paper, and here", ("", "paper", "here"), rows, note)


def show(found: dict[str, Any], out: TextIO | None = None) -> None:
    out = sys.stdout if out is None else out
    if not out.isatty():
        print("\n".join(table.markdown() for table in tables(found)), file=out)
        return
    from rich.console import Console
    from rich.table import Table as Drawn
    from rich.text import Text

    console = Console(file=out)
    for table in tables(found):
        words = {
            "title": table.title,
            "caption": table.note or None,
            "title_justify": "left",
            "caption_justify": "left",
        }
        drawn = Drawn(*table.columns, **words, show_header=any(table.columns))
        for row in table.rows:
            drawn.add_row(*map(Text, row))  # plain: a pattern's brackets are no markup
        console.print(drawn)
