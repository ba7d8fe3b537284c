"""What `make docs` does beside MkDocs: pages of files outside docs/, and the check of the API's pages.

A page may link to any file of the repository, as it does on GitHub. The menu in mkdocs.yml names those that
become pages: Markdown as it is, a notebook as its cells, other text as a block of code. Pictures that pages
show are copied.
"""

import ast
import json
import logging
import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File


_REPOSITORY = Path(__file__).resolve().parents[2]
_LINK = re.compile(r"(?<=\]\()([^)#\s]+)(#[^)\s]*)?(?=\))")
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
# A formula of a notebook, or code, in which a dollar is a dollar.
_FORMULA = re.compile(r"`[^`]*`|\$\$(.+?)\$\$|\$([^$\n]+)\$", re.DOTALL)
_PICTURES = (".png", ".svg")
_log = logging.getLogger("mkdocs.lora_jax")


# -- where things are ----------------------------------------------------------------------------------------


def place(file: str) -> str:
    """Where the site has a file of the repository.

    >>> [place(file) for file in ("docs/cost.md", "README.md", "benchmarks/a.md", "notebooks/b.ipynb")]
    ['cost.md', 'index.md', 'benchmarks/a.md', 'notebooks/b.ipynb.md']

    A directory is its first page.
    """
    if file in ("README.md", "docs"):
        return "index.md"
    if file == "notebooks":
        file = min(path.relative_to(_REPOSITORY).as_posix() for path in _REPOSITORY.glob("notebooks/*.ipynb"))
    file = file.removeprefix("docs/")
    return file if file.endswith((".md", *_PICTURES, ".css")) else f"{file}.md"


def relinked(text: str, file: str) -> str:
    """The text of a file of the repository, its relative links leading to where the site has things.

    >>> relinked("[cost](docs/cost.md#methods)", "README.md"), relinked("[us](../README.md)", "docs/a/b.md")
    ('[cost](cost.md#methods)', '[us](../README.md)')
    """

    def there(found: re.Match) -> str:
        name, anchor = found[1], found[2] or ""
        if "://" in name or name.startswith("mailto:"):
            return found[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(file), name))
        return posixpath.relpath(place(target), posixpath.dirname(place(file)) or ".") + anchor

    kept, parts = _FENCE.findall(text), _FENCE.split(text)
    parts = [_LINK.sub(there, part) for part in parts]
    return "".join(part + fence for part, fence in zip(parts, [*kept, ""]))


def as_markdown(file: str) -> str:
    """The page of a file of the repository."""
    text = (_REPOSITORY / file).read_text("utf-8")
    if file.endswith(".md"):
        return text
    if file.endswith(".ipynb"):
        return "\n\n".join(_cell(cell) for cell in json.loads(text)["cells"])
    return f"# {Path(file).name}\n\n```text\n{text}\n```\n"


def _cell(cell: dict[str, Any]) -> str:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return _FORMULA.sub(_formula, source)
    return "\n\n".join((f"```python\n{source}\n```", *map(_output, cell["outputs"])))


def _output(output: dict[str, Any]) -> str:
    """A picture is in the page itself, since it is no file; anything else is a block of text."""
    data = output.get("data", {})
    if picture := "".join(data.get("image/png", ())):
        return f'<img alt="what the cell shows" src="data:image/png;base64,{picture.replace(chr(10), "")}">'
    text = "".join(output.get("text") or data["text/plain"]).rstrip("\n")
    return f"```text\n{text}\n```"


def _formula(found: re.Match) -> str:
    """As MathML, which browsers set by themselves."""
    if found[0].startswith("`"):
        return found[0]
    return convert(found[1] or found[2], display="block" if found[1] else "inline")


# -- the menu ------------------------------------------------------------------------------------------------


def _entries(item: Any, outside: list[str]) -> Any:
    """An entry of the menu, for the site: patterns expanded, and files outside docs/ noted in `outside`."""
    if isinstance(item, list):
        return [_entries(part, outside) for part in item]
    if isinstance(item, dict):
        return {title: _entries(part, outside) for title, part in item.items()}
    if "*" in item:
        found = sorted(path.relative_to(_REPOSITORY).as_posix() for path in _REPOSITORY.glob(item))
        start = item.partition("*")[0]
        titles = [
            name.removeprefix(start).removesuffix(".md").removesuffix("/report").removesuffix("/sweep")
            for name in found
        ]
        return [{title: _entries(name, outside)} for title, name in zip(titles, found)]
    if (_REPOSITORY / "docs" / item).exists():
        return item
    outside.append(item)
    return place(item)


def on_config(config: Any) -> Any:
    outside: list[str] = []
    config.nav = _entries(config.nav, outside)
    config.extra["outside"] = outside
    return config


def on_files(files: Any, *, config: Any) -> Any:
    for file in config.extra["outside"]:
        files.append(File.generated(config, place(file), content=as_markdown(file)))
    for file in list(files.documentation_pages()):
        origin = _origin(file, config)
        for name, _ in _LINK.findall(as_markdown(origin)):
            target = posixpath.normpath(posixpath.join(posixpath.dirname(origin), name))
            if (
                target.endswith(_PICTURES)
                and (_REPOSITORY / target).is_file()
                and place(target) not in files.src_uris
            ):
                files.append(File.generated(config, place(target), abs_src_path=str(_REPOSITORY / target)))
    return files


def _origin(file: Any, config: Any) -> str:
    """The file of the repository that a page of the site is."""
    origins = {place(name): name for name in config.extra["outside"]}
    return origins.get(file.src_uri, f"docs/{file.src_uri}")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    return relinked(markdown, _origin(page.file, config))


# -- the API -------------------------------------------------------------------------------------------------


def package() -> griffe.Module:
    """The sources of `lora_jax`, read and not imported, so that no extra is needed."""
    return griffe.load("lora_jax", search_paths=[str(_REPOSITORY)])


def public_names(module: griffe.Module) -> dict[str, griffe.Object]:
    """What a user may import from a package and the rooms in it, by where it is defined."""
    found: dict[str, griffe.Object] = {}
    own = _own(Path(module.filepath))
    for name, member in module.members.items():
        if name.startswith("_"):
            continue
        if name not in own:
            # A package in a package is a room too, which `__init__` imports when it is first asked for.
            if isinstance(member, griffe.Module) and member.is_init_module:
                found |= public_names(member)
        elif isinstance(member, griffe.Module):
            found |= public_names(member)
        else:
            target = member.final_target if member.is_alias else member
            found[target.canonical_path] = target
    return found


def _own(file: Path) -> set[str]:
    """What a module defines, or makes its own by `import x as x`."""
    names: set[str] = set()
    statements = list(ast.parse(file.read_text("utf-8")).body)
    for statement in statements:
        if isinstance(statement, ast.With):
            statements += statement.body
        elif isinstance(statement, ast.ImportFrom):
            names |= {alias.name for alias in statement.names if alias.asname == alias.name}
        elif isinstance(statement, ast.FunctionDef | ast.ClassDef):
            names.add(statement.name)
    return names


def on_post_build(*, config: Any) -> None:
    library = package()
    on_pages = set()
    for page in (_REPOSITORY / "docs" / "api").glob("*.md"):
        for name in re.findall(r"^::: (\S+)", page.read_text("utf-8"), re.MULTILINE):
            member = library[name.removeprefix("lora_jax.")]
            on_pages.add((member.final_target if member.is_alias else member).canonical_path)
    for path, member in public_names(library).items():
        if path not in on_pages:
            _log.warning("%s is public, and on no page of docs/api/", path)
        if member.docstring is None:
            _log.warning("%s is public, and has no docstring", path)
        elif not member.is_attribute and not re.search(r">>> |```", member.docstring.value):
            _log.warning("%s is public, and its docstring has no example", path)
