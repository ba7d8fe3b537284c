"""Sweeps: many adapters of one frozen base, trained at once by one program."""
