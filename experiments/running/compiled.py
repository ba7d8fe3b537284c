"""Compiled programs, kept on disk for the next start: JAX's persistent cache, which a run turns on.

A resumed run, and another one with the same model and batch, compile next to nothing. JAX's key of a program
holds its text, its devices, XLA's flags and the versions, so that what is found is what would be compiled.
The user's own settings for this cache have the last word. Left out: a limit to its size, which
JAX_COMPILATION_CACHE_MAX_SIZE sets. It may be deleted at any time.
"""

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import jax

from experiments.running import processes


# Programs that compile faster are not kept. A start of `demo.json` compiles 90 in 33 s on two cores, of which
# 15 take 31 s; JAX's own one second would keep 6.
SHORTEST = 0.1


def directory(environment: Mapping[str, str] = os.environ) -> Path:
    """Where programs are kept if the user names no place.

    >>> directory({"XDG_CACHE_HOME": "/var/cache/me"}).as_posix()
    '/var/cache/me/lora_jax/jax'
    """
    named = Path(environment.get("XDG_CACHE_HOME", ""))
    # XDG: a path that is not absolute counts as none.
    return (named if named.is_absolute() else Path.home() / ".cache") / "lora_jax" / "jax"


def keep(environment: Mapping[str, str] = os.environ) -> None:
    """Has JAX keep what it compiles from now on, and take what it finds. Where nothing can be written, a line
    on standard error says so, and all is compiled anew.

    JAX's own settings stand: JAX_COMPILATION_CACHE_DIR, the empty one too, and
    JAX_ENABLE_COMPILATION_CACHE=false.
    """
    if jax.config.jax_compilation_cache_dir is not None or not jax.config.jax_enable_compilation_cache:
        return
    try:
        found = directory(environment)
        found.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=found).close()
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody's home directory
        if processes.first():
            print(
                f"warning: compiled programs are not kept ({error}): set JAX_COMPILATION_CACHE_DIR to a "
                "directory that can be written to",
                file=sys.stderr,
            )
        return
    jax.config.update("jax_compilation_cache_dir", str(found))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in environment:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST)
