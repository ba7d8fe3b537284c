"""A quantised weight: its formats, what stands in a tree in its place, and its view until it is used."""
