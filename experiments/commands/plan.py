"""`plan`: says what a sharded training step needs, from shapes alone."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from experiments.commands import options
from experiments.commands.options import Commands


def add_to(commands: Commands) -> None:
    plan = commands.add_parser(
        "plan",
        help="say what a sharded training step needs, by compiling it from shapes alone on virtual devices",
        epilog="example: python -m experiments plan gpt3-175b --mesh fsdp=64 --rank 4 --accelerator a100-80g",
    )
    plan.add_argument(
        "model",
        metavar="MODEL",
        help=(
            "a published name (gpt3-175b, llama-3-8b, qwen2.5-7b, deberta-v2-xxlarge, ...), or a directory "
            "with config.json; a name that is unknown gets the list"
        ),
    )
    plan.add_argument(
        "--mesh",
        default="data=1",
        help="devices along each axis: data=8,fsdp=8,tensor=2; default: one device",
    )
    plan.add_argument(
        "--method",
        default="LoRA",
        help="LoRA (the default), DoRA, VeRA, ..., or Full, which trains everything",
    )
    plan.add_argument("--rank", type=int, help="of the adapters; default: the method's")
    plan.add_argument(
        "--alpha",
        type=options.alpha,
        metavar="A",
        help="the numerator of their scale, which costs nothing; default: the method's",
    )
    plan.add_argument(
        "--targets", nargs="+", metavar="PATTERN", help="which weights are adapted; default: query and value"
    )
    plan.add_argument(
        "--blocks",
        type=options.blocks,
        metavar="1,0,1",
        help="which parts of a fused weight; default: query and value of GPT-2's c_attn",
    )
    plan.add_argument(
        "--batch", type=int, default=64, help="examples a step, on all devices together; default: 64"
    )
    plan.add_argument(
        "--seq", type=int, help="tokens an example; default: as many as the model has positions"
    )
    plan.add_argument(
        "--counted",
        type=int,
        metavar="N",
        help="tokens of an example that have a loss, which prompts and padding have not; default: all",
    )
    plan.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("bfloat16", "float16", "float32"),
        help="of weights and computation; adapters are float32",
    )
    plan.add_argument("--optimizer", default="adamw", choices=("adamw", "adamw_authors"))
    plan.add_argument(
        "--accumulate",
        type=int,
        default=1,
        metavar="N",
        help="parts of a batch, one after the other; default: 1",
    )
    plan.add_argument(
        "--remat",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compute each layer again in the backward pass",
    )
    plan.add_argument("--quantize", choices=("nf4", "int8"), help="store the base so")
    plan.add_argument(
        "--accelerator",
        metavar="NAME",
        help="whether it fits this one (a100-80g, h100, tpu-v5e, ...); default: all that are known",
    )
    plan.add_argument("--compare-full", action="store_true", help="compile full fine-tuning's step too")
    plan.add_argument("--json", metavar="FILE", help="write the numbers there")
    plan.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> None:
    from experiments.plan import devices

    mesh = devices.mesh_of(args.mesh)
    if args.json and not Path(args.json).resolve().parent.is_dir():
        raise ValueError(f"`--json` is `{args.json}`, and there is no directory `{Path(args.json).parent}`.")
    devices.start(mesh.data * mesh.fsdp * mesh.tensor)
    from experiments.plan.figures import plan, Request
    from experiments.plan.report import show

    asked = {field.name: getattr(args, field.name) for field in dataclasses.fields(Request)}
    request = Request(
        **{**asked, "mesh": mesh, "targets": None if args.targets is None else tuple(args.targets)}
    )
    found = plan(request, lambda text: print(text, file=sys.stderr, flush=True))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    show(found)
