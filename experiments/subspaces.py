"""Section 7 of LoRA's paper, of two trained adapters: the directions that they share, and how much each
amplifies directions of W. What is computed is `lora_jax.subspaces`; here adapters are read, and the numbers
drawn.

An adapter is that of a finished run or of a sweep, or any directory of PEFT's. Adapters of other methods
become LoRA first, exactly; DoRA's cannot. Left out: heads and other weights that trained whole.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from experiments import convert
from experiments.reports.figures import new_grid
from experiments.reports.words import as_table
from lora_jax import Adapter, LoRA
from lora_jax.interop import hf, peft
from lora_jax.subspaces import amplification, AmplifiedLeaf, similarity


# A layer's number, in the path of one of its weights.
_LAYER = re.compile(r"(?<![^/])\d+(?![^/])")
# How far two bases may differ, relative to W: a merged one has the rounding of its dtype.
_SAME = 0.02


class Asked(NamedTuple):
    """The arguments of the command line. `layer`: None is the one in the middle; `of`: as in `similarity`."""

    workdirs: tuple[Path, Path]
    base: Path | None = None
    leaf: str | None = None
    layer: int | None = None
    of: str = "A"
    seed: int = 0


class Trained(NamedTuple):
    """Plain LoRA adapters, and the weights beside which they were trained; `merged`: with the adapters in
    them.
    """

    weights: Any
    delta: Any
    merged: bool

    def only(self, paths: set[str]) -> tuple[Any, Any]:
        """The base and the adapters at these paths, with None at every other leaf."""
        weights, delta = (_only(tree, paths) for tree in (self.weights, self.delta))
        return lora_jax.unmerge(weights, delta) if self.merged else weights, delta


class Kind(NamedTuple):
    """The weights of one name, such as `h/*/attn/c_attn/kernel[0]`: their paths by layer; `chosen`: which is
    shown.
    """

    name: str
    paths: dict[int, str]
    chosen: int


def read(workdir: Path, base: Path | None = None) -> Trained:
    """The adapter in `workdir`, on `base`, or on what is beside it: a run's merged model less the adapter, or
    the base that PEFT's config names.

    Raises `ValueError` for a directory without an adapter, and one that has no form as LoRA.
    """
    source = _adapter_in(workdir)
    merged = workdir / "merged"
    of_run = base is None and (merged / "config.json").is_file()
    if of_run:
        model, weights = hf.load(merged, place=convert.mapped)
        # The merged model stands in for its base until the adapter is taken out.
        frozen, delta = peft.load(source, model, weights, check_base=False)
    else:
        frozen, delta = convert.read_adapter(source, base)
        weights = frozen
    adapters = [leaf for leaf in jax.tree.leaves(delta, is_leaf=_is_adapter) if isinstance(leaf, Adapter)]
    if any(type(leaf.spec.method) is not LoRA for leaf in adapters):
        frozen, delta = lora_jax.arithmetic.as_lora(frozen, delta)
        weights = weights if of_run else frozen
    only = lambda leaf: leaf if isinstance(leaf, Adapter) else None
    return Trained(weights, jax.tree.map(only, delta, is_leaf=_is_adapter), of_run)


def _is_adapter(leaf: Any) -> bool:
    """Whether a walk over a delta should stop."""
    return leaf is None or isinstance(leaf, Adapter)


def _adapter_in(workdir: Path) -> Path:
    for directory in (workdir, workdir / "adapter"):
        if (directory / "adapter_config.json").is_file():
            return directory
    several = sorted(path.name for path in (workdir / "adapters").glob("*") if (path / "adapter").is_dir())
    if several:
        raise ValueError(
            f"`WORKDIR` {workdir} is a sweep of {len(several)} adapters: pass one of them, such as "
            f"{workdir / 'adapters' / several[0]}."
        )
    raise ValueError(
        f"`WORKDIR` {workdir} has no adapter/ with an adapter_config.json: it is no finished run, or its "
        "method has no form in PEFT."
    )


def compare(asked: Asked, figure: Path | None = None) -> list[str]:
    """The tables, as lines of Markdown; `figure` is drawn too.

    Raises:
      ValueError: a directory without an adapter; adapters of two bases; no weight that both adapt, and
        `--leaf` names, or no such layer.
    """
    one, two = (read(workdir, asked.base) for workdir in asked.workdirs)
    phi = similarity(one.delta, two.delta, of=asked.of)
    kinds = _kinds(phi, asked)
    paths = {path for kind in kinds for path in kind.paths.values()}
    pairs = [trained.only(paths) for trained in (one, two)]
    _check_same_base(*(weights for weights, _ in pairs), asked)
    drawn = (_random(delta, asked.seed + place) for place, (_, delta) in enumerate(pairs))
    chance = similarity(*drawn, of=asked.of)
    amplified = [_amplification(trained, kinds, jax.random.key(asked.seed)) for trained in (one, two)]
    grids = [_grids(kind, phi, chance) for kind in kinds]
    names = _names(asked.workdirs)
    if figure is not None:
        _draw(kinds, grids, names, asked.of, figure)
    return [
        f"Directions that {names[0]} and {names[1]} share: phi(i, j) of {_WORDS[asked.of]}, the mean over "
        "layers, and in brackets that of random matrices.",
        "",
        as_table([_shared(kind, grid) for kind, grid in zip(kinds, grids, strict=True)]),
        "",
        "What each adapter amplifies, in Frobenius norms: ‖UᵀWV‖ along the directions of ΔW, along W's own "
        "leading ones, and along random ones.",
        "",
        as_table(
            [
                _amplified(kind, name, found)
                for kind in kinds
                for name, found in zip(names, amplified, strict=True)
            ]
        ),
    ]


_WORDS = {
    "A": "A, on the side of the inputs",
    "B": "B, on the side of the outputs",
    "in": "ΔW, on the side of the inputs",
    "out": "ΔW, on the side of the outputs",
}


def _kinds(phi: Mapping[str, Any], asked: Asked) -> list[Kind]:
    """The weights that both adapt, and `leaf` names, by their names without the layer's number."""
    groups: dict[str, dict[int, str]] = {}
    for path in phi:
        if asked.leaf is None or _matches(asked.leaf, path):
            found = _LAYER.search(path)
            name = path if found is None else f"{path[: found.start()]}*{path[found.end() :]}"
            groups.setdefault(name, {})[0 if found is None else int(found[0])] = path
    if not groups:
        raise ValueError(
            f"`--leaf` is {asked.leaf!r}, which matches none of the weights that both adapt: "
            f"{', '.join(sorted({_LAYER.sub('*', path) for path in phi}))}. It is a regular expression for "
            "the whole path or for its last whole components."
        )
    kinds = []
    for name, paths in groups.items():
        layers = sorted(paths)
        chosen = layers[len(layers) // 2] if asked.layer is None else asked.layer
        if chosen not in paths:
            raise ValueError(
                f"`--layer` is {chosen}, and {name} has the layers {', '.join(map(str, layers))}: pass one "
                "of these."
            )
        kinds.append(Kind(name, {layer: paths[layer] for layer in layers}, chosen))
    return kinds


def _matches(pattern: str, path: str) -> bool:
    """As a target, and of a block by its weight's path too."""
    try:
        whole = re.compile(f"(?:.*/)?(?:{pattern})")
    except re.error as error:
        raise ValueError(f"`--leaf` {pattern!r} is not a regular expression: {error}.") from error
    return any(whole.fullmatch(name) for name in (path, path.partition("[")[0]))


def _only(tree: Any, paths: set[str]) -> Any:
    """The tree with None in place of every other leaf."""
    kept = {path.partition("[")[0] for path in paths}

    def of(path: Any, leaf: Any) -> Any:
        return leaf if jax.tree_util.keystr(path, simple=True, separator="/") in kept else None

    return jax.tree_util.tree_map_with_path(of, tree, is_leaf=_is_adapter)


def _check_same_base(one: Any, two: Any, asked: Asked) -> None:
    wide = lambda leaf: np.asarray(leaf, np.float32)
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    if all(np.linalg.norm(wide(a) - wide(b)) <= _SAME * np.linalg.norm(wide(a)) for a, b in pairs):
        return
    raise ValueError(
        f"`WORKDIR` {asked.workdirs[0]} and {asked.workdirs[1]} were trained on other weights of the same "
        "shapes: compare adapters of one base."
    )


def _random(delta: Any, seed: int) -> Any:
    """Gaussian numbers in place of A and B."""
    leaves, treedef = jax.tree.flatten(delta)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [jax.random.normal(key, leaf.shape, jnp.float32) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, drawn)


def _grids(kind: Kind, phi: Mapping[str, Any], chance: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """phi of the chosen layer, its mean over layers, and that of random matrices."""
    mean = lambda found: np.mean([np.asarray(found[path]) for path in kind.paths.values()], axis=0)
    alone = len(kind.paths) == 1
    chosen = {} if alone else {f"layer {kind.chosen}": np.asarray(phi[kind.paths[kind.chosen]])}
    return {
        **chosen,
        "adapters" if alone else f"mean of {len(kind.paths)} layers": mean(phi),
        "random matrices": mean(chance),
    }


def _shared(kind: Kind, grids: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Of the first direction of either, of as many as the smaller has, and of all."""
    *_, found, chance = grids.values()
    rows, columns = found.shape
    smaller = min(rows, columns)
    cells = {"weights": kind.name, "layers": str(len(kind.paths)), "ranks": f"{rows}, {columns}"}
    for words, (i, j) in {
        "phi(1, 1)": (1, 1),
        "phi(r, r)": (smaller, smaller),
        "phi of all": (rows, columns),
    }.items():
        cells[words] = f"{found[i - 1, j - 1]:.3f} ({chance[i - 1, j - 1]:.3f})"
    return cells


def _amplification(trained: Trained, kinds: Sequence[Kind], key: jax.Array) -> dict[str, AmplifiedLeaf]:
    """By path. W itself is decomposed where it is shown only, as that takes most of the time."""
    every = {path for kind in kinds for path in kind.paths.values()}
    shown = {kind.paths[kind.chosen] for kind in kinds}
    found = amplification(*trained.only(every - shown), leading=False, key=key) if every - shown else []
    return {leaf.path: leaf for leaf in (*found, *amplification(*trained.only(shown), key=key))}


def _amplified(kind: Kind, name: str, rows: Mapping[str, AmplifiedLeaf]) -> dict[str, str]:
    leaf = rows[kind.paths[kind.chosen]]
    factors = [rows[path].factor for path in kind.paths.values()]
    return {
        "weight": kind.paths[kind.chosen],
        "adapter": name,
        "rank": str(leaf.rank),
        "‖ΔW‖": f"{leaf.update:.2f}",
        "‖W‖": f"{leaf.weight:.2f}",
        "‖UᵀWV‖ of ΔW": f"{leaf.along_update:.2f}",
        "of W": f"{leaf.along_weight:.2f}",
        "random": f"{leaf.along_random:.2f}",
        "‖ΔW‖ / ‖UᵀWV‖": f"{leaf.factor:.2f}",
        "mean of layers": f"{np.mean(factors):.2f}",
    }


def _names(workdirs: Sequence[Path]) -> list[str]:
    """The last words of two paths that tell them apart."""
    parts = [workdir.resolve().parts for workdir in workdirs]
    count = next((n for n in range(1, min(map(len, parts))) if parts[0][-n:] != parts[1][-n:]), 1)
    return ["/".join(own[-count:]) for own in parts]


def _draw(
    kinds: Sequence[Kind],
    grids: Sequence[Mapping[str, np.ndarray]],
    names: Sequence[str],
    of: str,
    path: Path,
) -> None:
    """A row of heat-maps for each kind of weight."""
    columns = max(map(len, grids))
    figure, panels = new_grid(len(kinds), columns)
    for row, kind, found in zip(panels, kinds, grids, strict=True):
        for axes, (title, phi) in zip(row, found.items(), strict=False):
            rows, width = phi.shape
            extent = (0.5, width + 0.5, rows + 0.5, 0.5)
            image = axes.imshow(phi, vmin=0, vmax=1, cmap="viridis", aspect="auto", extent=extent)
            axes.set_title(title, fontsize="small")
            axes.set_xticks(sorted({1, -(-width // 2), width}))
            axes.set_yticks(sorted({1, -(-rows // 2), rows}))
        for unused in row[len(found) :]:
            unused.set_visible(False)
        row[0].set_ylabel(f"{_short(kind.name)}, i", fontsize="small")
    for axes in panels[-1]:
        axes.set_xlabel("j", fontsize="small")
    figure.colorbar(image, ax=panels, label="phi(i, j)", shrink=0.8)
    figure.suptitle(
        f"directions of {_WORDS[of].partition(',')[0]}: i of {names[0]}, j of {names[1]}", fontsize="medium"
    )
    figure.savefig(path, dpi=120)


def _short(name: str) -> str:
    """The words of a path that tell a weight from others of its layer."""
    own = name.rpartition("*/")[2]
    return own.removesuffix("/kernel").replace("/kernel[", "[")
