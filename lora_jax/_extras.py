"""Rooms that need more than the core say which extra brings it, where a bare import would name one module."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def brought_by(extra: str, room: str) -> Iterator[None]:
    """Around the imports of a room: a package that is missing is named with the `pip install` that helps.

    ```python
    with brought_by("models", "lora_jax.models"):
        import flax
    # ModuleNotFoundError: `lora_jax.models` needs 'flax', which is not installed: pip install …
    ```
    """
    try:
        yield
    except ModuleNotFoundError as error:
        # A module of ours that is missing is a bug; a room within this one has said it already.
        if error.name is None or error.name.partition(".")[0] == "lora_jax" or "pip install" in str(error):
            raise
        raise ModuleNotFoundError(
            f"`{room}` needs {error.name!r}, which is not installed: pip install 'lora_jax[{extra}]', or in "
            f"a clone pip install '.[{extra}]'",
            name=error.name,
        ) from None
