"""`subspaces`: Section 7 of LoRA's paper, of two trained adapters."""

import argparse
from pathlib import Path

from experiments.commands.options import Commands


def add_to(commands: Commands) -> None:
    subspaces = commands.add_parser(
        "subspaces",
        help="compare the directions of two trained adapters, and what they amplify",
        epilog="example: python -m experiments subspaces runs/e2e_smollm2_lora_r8 runs/e2e_smollm2_lora_r64 "
        "--leaf '(q_proj|v_proj)/kernel' --figure subspaces.png",
    )
    subspaces.add_argument(
        "workdirs",
        nargs=2,
        metavar="WORKDIR",
        help="of a finished run, a sweep's adapters/NAME, or an adapter directory of PEFT's",
    )
    subspaces.add_argument("--figure", metavar="FILE", help="draw the heat-maps, such as subspaces.png")
    subspaces.add_argument(
        "--leaf", metavar="PATTERN", help="of which weights, as in `targets`; default: all that both adapt"
    )
    subspaces.add_argument(
        "--layer", type=int, metavar="N", help="which layer is shown beside the mean; default: the middle one"
    )
    subspaces.add_argument(
        "--of",
        choices=("A", "B", "in", "out"),
        default="A",
        help="whose directions: singular vectors of A or B, or of ΔW on the side of its inputs or outputs",
    )
    subspaces.add_argument(
        "--base",
        metavar="MODEL",
        help="the model that both were trained on, a Hugging Face directory or a GGUF file; default: a run's "
        "own merged/ less its adapter, or the directory that PEFT's config names",
    )
    subspaces.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> None:
    from experiments.subspaces import Asked, compare

    one, two = map(Path, args.workdirs)
    base, figure = (None if given is None else Path(given) for given in (args.base, args.figure))
    print("\n".join(compare(Asked((one, two), base, args.leaf, args.layer, args.of), figure)))
