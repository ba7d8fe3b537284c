"""README.md and the pages under docs/, by their paths."""

from pathlib import Path


REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = {
    file.relative_to(REPOSITORY).as_posix(): file.read_text(encoding="utf-8")
    for file in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md")))
    if "docs/api/" not in file.as_posix()  # names, whose docstrings are run by test_docstrings.py
}
