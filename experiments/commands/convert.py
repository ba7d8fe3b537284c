"""`convert`: brings an adapter or a model from one format into another."""

import argparse
from pathlib import Path

from experiments.commands import options
from experiments.commands.options import Commands


def add_to(commands: Commands) -> None:
    convert = commands.add_parser(
        "convert",
        help="bring an adapter or a model from one format into another",
        epilog=(
            "example: python -m experiments convert demo_run/adapter adapter.pt --to loralib --base "
            "bases/smollm2-135m/SmolLM2-135M-Instruct.Q4_1.gguf"
        ),
    )
    convert.add_argument(
        "source",
        metavar="SRC",
        help="an adapter directory of PEFT's, a file of loralib's (.pt, .bin), or a Hugging Face model",
    )
    convert.add_argument("target", metavar="DST", help=f"where the result goes: {options.TARGET}")
    convert.add_argument(
        "--to",
        required=True,
        choices=options.FORMATS,
        help=options.WRITES,
    )
    convert.add_argument(
        "--base",
        metavar="MODEL",
        help="the model that the adapter was trained on, a Hugging Face directory or a GGUF file; default: "
        "the directory that PEFT's config names",
    )
    convert.add_argument(
        "--alpha",
        type=options.alpha,
        metavar="A",
        help="of a file of loralib's, which does not hold it: the lora_alpha it was trained with",
    )
    convert.add_argument(
        "--blocks",
        type=options.blocks,
        metavar="1,0,1",
        help="of a file of loralib's: its enable_lora, if not query and value (1,0,1) or all",
    )
    convert.add_argument("--overwrite", action="store_true", help="replace an earlier result at DST")
    convert.add_argument(
        "--no-verify", action="store_true", help="pass over checksums and values that are no numbers"
    )
    convert.add_argument(
        "--any-base",
        action="store_true",
        help="accept another base than the one the adapter was saved beside",
    )
    convert.add_argument(
        "--rename",
        choices=("strict", "auto"),
        default="strict",
        help="auto: also read names that other tools wrapped, if each pairs with one of PEFT's",
    )
    convert.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> None:
    from experiments.convert import convert, Job

    base = None if args.base is None else Path(args.base)
    options = {
        "overwrite": args.overwrite,
        "verify": not args.no_verify,
        "any_base": args.any_base,
        "rename": args.rename,
    }
    print(
        "\n".join(
            convert(
                Job(Path(args.source), Path(args.target), args.to, base, args.alpha, args.blocks, **options)
            )
        )
    )
