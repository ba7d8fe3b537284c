"""`python -m experiments`: see `python -m experiments --help`."""

from experiments.command_line import main


if __name__ == "__main__":
    raise SystemExit(main())
