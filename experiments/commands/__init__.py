"""The commands of `python -m experiments`, a file each: its options, and what it does with them.

A command imports what it runs when it runs, because JAX takes a second to import and `--help` needs none of
it.
"""
