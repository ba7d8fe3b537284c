"""README.md and the pages under docs/ tell the truth: their Python runs as it stands and prints what they
show, what their prose names exists, and their links are right.

Their figures are in test_page_figures.py; that the commands, make targets and extras exist is in
test_packaging.py.
"""

import dataclasses
import doctest
import functools
import importlib
import importlib.util
import inspect
import json
import posixpath
import re
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pages import PAGES, REPOSITORY

import lora_jax
from experiments.config import Config
from lora_jax import methods


_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_PROSE = {page: _FENCE.sub("", text) for page, text in PAGES.items()}
_IN_BACKTICKS = sorted({found for prose in _PROSE.values() for found in re.findall(r"`([^`\n]+)`", prose)})
_GUIDE = [page for page in PAGES if page != "docs/design.md"]
_WITH_PYTHON = [page for page, text in PAGES.items() if "```python" in text]
# What pages call by one word: rooms of the library, as `optim.labels` or `hf.load`.
_ROOMS = {
    **{
        name: f"lora_jax.{name}"
        for name in ("arithmetic", "baselines", "checkpoint", "drop", "methods", "models", "optim")
    },
    **{name: f"lora_jax.{name}" for name in ("quant", "sharding")},
    **{name: f"lora_jax.interop.{name}" for name in ("gguf", "hf", "loralib", "peft")},
}


def _run(page: str, capsys, first: int | None = None) -> tuple[dict, str]:
    """The namespace that the page's Python blocks, or the `first` of them, leave behind, and what they print.

    A `text` block shows what the Python block before it prints, with `...` for what differs from run to run.
    """
    namespace: dict = {"__name__": "__main__"}
    printed, latest = "", ""
    for fence in list(_FENCE.finditer(PAGES[page])):
        language, body = fence.groups()
        line = PAGES[page].count("\n", 0, fence.start(2))
        if language == "python":
            if first is not None and first <= 0:
                break
            first = None if first is None else first - 1
            # With the page's own line numbers.
            exec(compile("\n" * line + body, str(REPOSITORY / page), "exec"), namespace)
            latest = capsys.readouterr().out
            printed += latest
        elif language == "text":
            flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            matches = doctest.OutputChecker().check_output(body, latest, flags)
            assert matches, f"{page}:{line} shows\n{body}and its block prints\n{latest}"
    return namespace, printed


def _size(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.fixture
def beside_a_model(tmp_path):
    """Puts the `gpt2` and the `roberta-base` that a page loads, tiny ones, into its working directory."""
    from lora_jax.interop import hf
    from lora_jax.models import GPT2, GPT2Config, Roberta, RobertaConfig

    gpt2 = GPT2(GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=2, n_head=2))
    hf.save(tmp_path / "gpt2", gpt2, gpt2.init(jax.random.key(0), jnp.zeros((1, 1), int))["params"])
    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    roberta = Roberta(RobertaConfig.named("roberta-base", **sizes))
    hf.save(
        tmp_path / "roberta-base", roberta, roberta.init(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    )


@pytest.fixture
def beside_a_gguf_file(tmp_path):
    """Puts the GGUF file that a page loads, a tiny one with a token for each character, into its
    directory.
    """
    pytest.importorskip("transformers")
    from gguf_files import CHARACTERS, write

    file = tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"
    write(file, kinds=("Q8_0", *["Q4_1"] * 14), extra=CHARACTERS)


# -- the blocks ----------------------------------------------------------------------------------------------


def test_the_first_example_stands_alone_and_trains(relaxed_promotion, capsys):
    namespace, _ = _run("README.md", capsys, first=1)
    assert namespace["loss"] < 0.5 * np.log(10), "the labels are a tenth each: chance is log 10"
    moments = _size(namespace["opt_state"]) - 1  # a counter
    assert moments == 2 * lora_jax.count(namespace["delta"])
    before, after = (
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), namespace[name]) for name in ("params", "merged")
    )
    assert before == after


def _checks_readme(namespace: dict, printed: str) -> None:
    assert "low-rank" in printed and "formed " not in printed.replace("FLOPs formed ", "")
    assert "ΔW lost" in printed


def _checks_frameworks(namespace: dict, printed: str) -> None:
    for library, linears in [("", 2), ("_nnx", 1), ("_eqx", 3)]:
        assert len(jax.tree.leaves(namespace[f"delta{library}"])) == 2 * linears, library


def _checks_checkpoints(namespace: dict, printed: str) -> None:
    assert namespace["best"].step == 3
    assert jax.tree.all(jax.tree.map(jnp.array_equal, namespace["restored"], namespace["delta"]))


def _checks_pytorch(namespace: dict, printed: str) -> None:
    for directory in ("gpt2-merged", "gpt2-mapped", "roberta-merged"):
        assert Path(directory, "model.safetensors").is_file()
    assert Path("adapter", "adapter_config.json").is_file() and Path("adapter.pt").is_file()
    assert namespace["alpha"] == 16


def _checks_gguf(namespace: dict, printed: str) -> None:
    assert Path("adapter.gguf").is_file() and namespace["logits"].shape == (1, 24, 96)
    assert "Blocks(kind='Q4_1') 81920 bytes for 131072 numbers" in printed


def _checks_sharding(namespace: dict, printed: str) -> None:
    devices = set(jax.devices())
    assert len(devices) == 8
    weight, adapter = namespace["frozen"]["hidden"]["kernel"], namespace["delta"]["hidden"]["kernel"]
    assert weight.addressable_shards[0].data.shape == (8, 64)
    assert adapter.arrays["a"].addressable_shards[0].data.shape == (8, 4)
    assert adapter.arrays["b"].is_fully_replicated


_CHECKS = {
    "README.md": _checks_readme,
    "docs/frameworks.md": _checks_frameworks,
    "docs/checkpoints.md": _checks_checkpoints,
    "docs/gguf.md": _checks_gguf,
    "docs/pytorch.md": _checks_pytorch,
    "docs/sharding.md": _checks_sharding,
}


@pytest.mark.slow
@pytest.mark.parametrize("page", _WITH_PYTHON)
def test_every_block_runs(page, request, tmp_path, monkeypatch, relaxed_promotion, capsys):
    """In the namespace of its page alone, so that a reader needs no other."""
    if page == "docs/frameworks.md":
        pytest.importorskip("equinox")
    monkeypatch.chdir(tmp_path)
    if page in ("docs/coming_from.md", "docs/pytorch.md"):
        request.getfixturevalue("beside_a_model")
    if page == "docs/gguf.md":
        request.getfixturevalue("beside_a_gguf_file")
    namespace, printed = _run(page, capsys)
    _CHECKS.get(page, lambda namespace, printed: None)(namespace, printed)


def test_pages_with_blocks_are_found():
    assert set(_CHECKS) <= set(_WITH_PYTHON)
    assert {language for text in PAGES.values() for language, _ in _FENCE.findall(text)} <= {
        "python",
        "text",
        "bash",
        "bibtex",
        "json",
        "",
    }


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "```json" in text])
def test_json_blocks_are_parts_of_a_config(page):
    for language, body in _FENCE.findall(PAGES[page]):
        if language == "json":
            keys = json.loads(body if body.lstrip().startswith("{") else "{" + body + "}")
            assert keys.keys() <= {"like", *(field.name for field in dataclasses.fields(Config))}, body


# -- links ---------------------------------------------------------------------------------------------------


def _anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.*?) *$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _linking() -> list[Path]:
    return [
        *REPOSITORY.glob("*.md"),
        *(REPOSITORY / "docs").rglob("*.md"),
        *(REPOSITORY / "experiments").rglob("README.md"),
        *(REPOSITORY / "notebooks").glob("*.ipynb"),
    ]


@pytest.mark.parametrize("file", _linking(), ids=lambda file: file.relative_to(REPOSITORY).as_posix())
def test_relative_links_resolve(file):
    text = _FENCE.sub("", file.read_text("utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        there = file.parent / name if name else file
        assert there.exists(), f"{file.name} links to {target}"
        if anchor:
            assert anchor in _anchors(there.read_text("utf-8")), f"{file.name} links to {target}"


def test_readme_links_to_every_page():
    """Those of tables have their links on the page of the experiments."""
    linked = {
        posixpath.normpath(posixpath.join(posixpath.dirname(page), target.partition("#")[0]))
        for page in ("README.md", "docs/experiments.md")
        for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page])
        if page == "README.md" or target.startswith("tables/")
    }
    assert set(PAGES) - {"README.md"} <= linked


# -- names in the prose --------------------------------------------------------------------------------------


def _resolves(dotted: str) -> bool:
    """Whether it names an attribute, however many of its words are modules."""
    words = dotted.split(".")
    for count in range(len(words), 0, -1):
        try:
            owner = importlib.import_module(".".join(words[:count]))
        except ModuleNotFoundError:
            continue
        try:
            functools.reduce(getattr, words[count:], owner)
        except AttributeError:
            return False
        return True
    return False


def test_names_of_the_library_exist():
    dotted = {name for text in _IN_BACKTICKS for name in re.findall(r"\blora_jax(?:\.\w+)+", text)}
    for text in _IN_BACKTICKS:
        for room, rest in re.findall(r"^([a-z]+)((?:\.[A-Za-z_]\w*)+)(?=\(|$)", text):
            if room in _ROOMS:
                dotted.add(_ROOMS[room] + rest)
    assert {"lora_jax.optim.labels", "lora_jax.interop.hf.load", "lora_jax.models"} <= dotted
    for name in sorted(dotted):
        assert _resolves(name), name


def test_calls_in_the_prose_are_calls_of_the_library():
    """On the pages for users: the design also speaks of what is private."""
    quoted = [text for page in _GUIDE for text in re.findall(r"`([^`\n]+)`", _PROSE[page])]
    called = {name for text in quoted for name in re.findall(r"^(?:lora_jax\.)?([A-Za-z_]+)\(", text)}
    assert {"adapt", "unmerge"} <= called
    elsewhere = {"from_pretrained", "fn", "forward", "print", "Checkpoints"}  # of others, and of a room
    for name in called - elsewhere:
        assert any(callable(getattr(room, name, None)) for room in (lora_jax, lora_jax.baselines)), name


def test_every_public_name_is_mentioned():
    everything = "\n".join(PAGES.values())
    public = {
        name for name, value in vars(lora_jax).items() if not name.startswith("_") and callable(value)
    } - {"Lorafied", "MaterializeError"}
    assert {"lorafy", "adapt", "merge"} <= public
    public |= {f"optim.{name}" for name in ("labels", "loraplus", "lorafa", "adalora", "only_trainable")}
    for name in sorted(public):
        assert re.search(rf"\b{re.escape(name)}\b", everything), name


def test_the_table_of_methods_has_every_method():
    exist = {name for name, value in vars(methods).items() if inspect.isclass(value)}
    rows = re.findall(r"^\| `(\w+)[(`]", PAGES["docs/methods.md"], re.MULTILINE)
    assert set(rows) == exist | {"quantize"}


def test_tests_that_pages_name_exist():
    everything = "\n".join(PAGES.values())
    named = {text for text in _IN_BACKTICKS if re.fullmatch(r"test_\w+", text)}
    defined = {
        name
        for file in (REPOSITORY / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text("utf-8"), re.MULTILINE)
    }
    assert named and named <= defined, named - defined
    files = set(re.findall(r"\btests/[\w/]+\.py", everything))
    assert files
    for name in sorted(files):
        assert (REPOSITORY / name).is_file(), name


def test_benchmarks_that_pages_name_exist():
    named = set(re.findall(r"python -m (benchmarks\.\w+)", "\n".join(PAGES.values())))
    assert named
    for name in sorted(named):
        assert importlib.util.find_spec(name) is not None, name


def test_configs_that_ship_are_named():
    """By name or by a pattern, each of which names something."""
    section = PAGES["docs/experiments.md"].partition("\n## Configs\n")[2].partition("\n## ")[0]
    names = re.findall(r"`([\w*]+\.json)`", section.partition("```")[0])
    directory = REPOSITORY / "experiments" / "configs"
    found = {name: {file.name for file in directory.glob(name)} for name in names}
    assert all(found.values()), [name for name in names if not found[name]]
    assert {file.name for file in directory.glob("*.json")} <= set().union(*found.values())


def test_keys_of_configs_exist():
    """`train.result` and the like, in the prose and after `--set`."""
    from experiments.config import Config

    names = {field.name for field in dataclasses.fields(Config)}
    keys = {text for text in _IN_BACKTICKS if re.fullmatch(r"[a-z]\w*(\.\w+)+", text)}
    keys |= set(re.findall(r"--set ([\w.]+)=", "\n".join(PAGES.values())))
    keys = {key for key in keys if key.partition(".")[0] in names}
    assert {"train.not_finite", "precision.parameters", "mesh.fsdp"} <= keys
    for key in sorted(keys):
        sections = [Config]
        for word in key.split("."):
            hints = [typing.get_type_hints(section).get(word) for section in sections]
            found = [hint for hint in hints if hint is not None]
            assert found, key
            # One of several, such as those of `data`, has the next word.
            parts = [part for hint in found for part in (hint, *typing.get_args(hint))]
            sections = [part for part in parts if dataclasses.is_dataclass(part)]
