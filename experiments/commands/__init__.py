"""The commands of `python -m experiments`, a file each: its options and its handler.

A handler imports what it needs when it runs, because JAX takes a second to import and `--help` does not need
it.
"""
