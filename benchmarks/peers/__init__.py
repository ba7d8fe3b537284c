"""Training steps of this library beside those of its peers: the same model, weights, batch, adapters and
optimiser, each way in a process of its own.

`rows` says what is compared, `models` writes the weights that every way reads, `jax_ways` and `torch_ways`
take the steps, `worker` is the process of one way, and `__main__` asks the workers of a row in turn and
records what they say.
"""
