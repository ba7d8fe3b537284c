"""Ports for processes that find each other on this machine, for the benchmarks and the tests that start
several.
"""

import random
import socket


def is_free(port: int) -> bool:
    """Whether no process listens at the port."""
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) != 0


def free_port() -> int:
    """Below the ports that the system gives to connections, which could take it before it is used."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        if is_free(port):
            return port
