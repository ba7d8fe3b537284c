"""A plain Hugging Face export needs no method, no interpreter of jaxprs, and no code of adapters' files."""

import ast
from pathlib import Path


_REPOSITORY = Path(__file__).resolve().parent.parent
_FILES = {
    ".".join(file.relative_to(_REPOSITORY).with_suffix("").parts): file
    for file in (_REPOSITORY / "lora_jax").rglob("*.py")
}
_ADAPTERS_ROOM = {
    "lora_jax._interpret",
    "lora_jax.arithmetic",
    "lora_jax.interop._adapters",
    "lora_jax.interop._exports",
    "lora_jax.interop._imports",
    "lora_jax.interop.peft",
    "lora_jax.interop.loralib",
    "lora_jax.methods",
}


def _reached(module: str) -> set[str]:
    """The modules of lora_jax that this one imports, directly or through others. The `__init__` of a package
    counts only where it is named, since its purpose is to gather what others need.
    """
    reached: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in reached:
            continue
        reached.add(name)
        for node in ast.walk(ast.parse(_FILES[name].read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            package = name.split(".")[: -node.level]
            source = ".".join([*package, *([node.module] if node.module else [])])
            for alias in node.names:
                found = {source, f"{source}.{alias.name}", f"{source}.__init__"} & _FILES.keys()
                if f"{source}.{alias.name}" in found:
                    found = {f"{source}.{alias.name}"}
                waiting += found
    return reached


def _in_adapters_room(module: str) -> set[str]:
    return {
        name
        for name in _reached(module)
        if any(name == room or name.startswith(room + ".") for room in _ADAPTERS_ROOM)
    }


def test_a_plain_export_does_not_enter_the_adapters_room():
    assert _in_adapters_room("lora_jax.interop.hf._save") == set()


def test_the_check_above_can_fail():
    found = _in_adapters_room("lora_jax.interop.peft._save")
    assert {"lora_jax.interop._exports", "lora_jax.methods.lora", "lora_jax.interop.peft._layout"} <= found
