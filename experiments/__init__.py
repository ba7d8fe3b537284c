"""The experiments of this repository: one config file is one row of a table; `python -m experiments run`
reproduces it.
"""
