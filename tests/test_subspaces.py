"""`lora_jax.subspaces`: against singular value decompositions of the dense matrices by NumPy in float64, and
by the properties that the paper's definitions have.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_deltas import dense, lorafied, random_delta, random_like, SHAPES, WHERE

import lora_jax
from lora_jax import AdaLoRA, arithmetic, DoRA, Full, LoRA, subspaces
from lora_jax.subspaces import amplification, similarity


SIDES = ["A", "B", "in", "out"]


def matrices(leaf):
    """A and B of each layer, in float64."""
    layers = leaf.spec.shape[0] if leaf.spec.axes[0] == "layer" else 1
    a, b = (np.asarray(leaf.arrays[name], np.float64) for name in ("a", "b"))
    rank = a.shape[-1]
    return a.reshape(layers, -1, rank), b.reshape(layers, rank, -1)


def directions(leaf, of):
    a, b = matrices(leaf)
    if of == "A":
        return np.linalg.svd(a)[0][..., : a.shape[-1]]
    if of == "B":
        return np.linalg.svd(b)[2].swapaxes(-1, -2)[..., : a.shape[-1]]
    u, _, v = np.linalg.svd(a @ b)
    return (u if of == "in" else v.swapaxes(-1, -2))[..., : a.shape[-1]]


def literal(ours, theirs):
    """Equation 4, one i and one j at a time."""
    found = np.zeros((ours.shape[0], ours.shape[-1], theirs.shape[-1]))
    for layer, i, j in np.ndindex(*found.shape):
        product = ours[layer, :, : i + 1].T @ theirs[layer, :, : j + 1]
        found[layer, i, j] = np.linalg.norm(product, "fro") ** 2 / min(i + 1, j + 1)
    return found


# --- which directions two adapters share --------------------------------------------------------------------


@pytest.mark.parametrize("of", SIDES)
def test_similarity_is_the_papers(of, x64):
    """Of a matrix, a stack with several out axes, and a transposed one; of adapters of two ranks."""
    one, two = random_delta(LoRA(rank=2, alpha=3), 0), random_delta(LoRA(rank=5, alpha=-4, rs=True), 1)
    found = similarity(one, two, of=of)
    assert {path: phi.shape for path, phi in found.items()} == {
        "w": (2, 5),
        "heads": (2, 2, 5),
        "window": (2, 5),
    }
    for path, phi in found.items():
        wanted = literal(directions(one[path], of), directions(two[path], of))
        np.testing.assert_allclose(phi.reshape(wanted.shape), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("of", SIDES)
def test_what_phi_is(of, x64):
    """Between 0 and 1, the same from either side, and 1 of an adapter and itself, or a multiple of it."""
    one, two = random_delta(LoRA(rank=4), 0), random_delta(LoRA(rank=3), 1)
    there, back = similarity(one, two, of=of), similarity(two, one, of=of)
    for path, phi in there.items():
        assert np.all(phi >= 0) and np.all(phi <= 1 + 1e-12)
        np.testing.assert_allclose(phi, np.swapaxes(back[path], -1, -2), rtol=1e-10)
    for same in (one, arithmetic.scaled(one, -3.0)):
        for phi in similarity(one, same, of=of).values():
            np.testing.assert_allclose(phi, np.ones(phi.shape), rtol=1e-10)


@pytest.mark.parametrize("of", SIDES)
def test_how_a_and_b_share_the_product(of, x64):
    """Rotated within the rank, both span what they did. Mixed in any other way, ΔW is still the same, and A
    is not.
    """
    one, two = random_delta(LoRA(rank=3), 0), random_delta(LoRA(rank=4), 1)
    draw = np.random.default_rng(2).normal(size=(3, 3))
    rotation, _ = np.linalg.qr(draw)

    def mixed(by):
        leaf = one["w"]
        a, b = leaf.arrays["a"] @ by, jnp.linalg.inv(by) @ leaf.arrays["b"]
        return {**one, "w": dataclasses.replace(leaf, arrays={"a": a, "b": b})}

    wanted = similarity(one, two, of=of)["w"]
    np.testing.assert_allclose(similarity(mixed(rotation), two, of=of)["w"], wanted, rtol=1e-8)
    other = np.abs(similarity(mixed(draw), two, of=of)["w"] - wanted).max()
    assert other < 1e-8 if of in ("in", "out") else other > 1e-3


def test_orthogonal_and_contained_directions(x64):
    """Of two adapters that read inputs apart from each other nothing is shared; of one that reads all of the
    other's, and more, everything.
    """
    spec = random_delta(targets="w")["w"].spec
    leaf = lambda columns: {
        "w": lora_jax.Adapter(
            {
                "a": jnp.asarray(np.eye(6)[:, columns] * np.arange(len(columns), 0, -1.0)),
                "b": jnp.ones((len(columns), 8)),
            },
            dataclasses.replace(spec, method=LoRA(rank=len(columns), alpha=1)),
        )
    }
    assert not np.any(similarity(leaf([0, 1]), leaf([2, 3, 4]))["w"])
    phi = similarity(leaf([4, 0]), leaf([0, 1, 4]))["w"]
    np.testing.assert_allclose(phi, [[0, 0, 1], [1, 1 / 2, 1]], atol=1e-12)


def test_random_directions_share_what_chance_gives():
    """max(i, j) / n on average: 1/16 to 1/2 of 64 dimensions here."""
    shapes = {"w": jax.ShapeDtypeStruct((1000, 64, 64), "float32")}
    delta = lambda rank: (
        lora_jax.lorafy(shapes, "w", method=LoRA(rank=rank), axes={"w": "layer in out"}).delta
    )
    phi = similarity(random_like(delta(4), 0), random_like(delta(32), 1))["w"].mean(0)
    expected = np.maximum(np.arange(1, 5)[:, None], np.arange(1, 33)[None]) / 64
    np.testing.assert_allclose(phi, expected, rtol=0.15)


def test_only_what_both_have_is_compared(x64):
    one, two = random_delta(targets="w|heads"), random_delta(targets={"window": Full(), "w": LoRA(rank=1)})
    assert list(similarity(one, two)) == ["w"]


def test_no_weight_is_formed():
    one, two = random_delta(LoRA(rank=2), dtype="float32"), random_delta(LoRA(rank=3), 1, dtype="float32")
    sizes = ("f32[6,8]", "f32[8,6]", "f32[7,6]", "f32[6,7]", "f32[2,6,8]")
    for of in SIDES:
        program = str(jax.make_jaxpr(lambda one, two, of=of: similarity(one, two, of=of))(one, two))
        assert not any(size in program for size in sizes), of
    dense_one = lambda delta: jnp.linalg.svd(delta["w"].arrays["a"] @ delta["w"].arrays["b"])
    assert any(size in str(jax.make_jaxpr(dense_one)(one)) for size in sizes), "so the search can find one"


def test_blocks_are_adapters_of_their_own(x64):
    """Query and value of a fused weight, as the paper compares them."""
    method = LoRA(rank=2, blocks=(True, False, True, False))
    one, two = random_delta(method, 0, targets="w"), random_delta(dataclasses.replace(method, rank=1), 1, "w")
    found = similarity(one, two, of="out")
    assert {path: phi.shape for path, phi in found.items()} == {"w[0]": (2, 1), "w[2]": (2, 1)}
    for place, path in enumerate(found):
        ours, theirs = (
            np.linalg.svd(leaf.arrays["a"][place] @ leaf.arrays["b"][place])[2].T[:, : leaf.spec.method.rank]
            for leaf in (one["w"], two["w"])
        )
        np.testing.assert_allclose(found[path], literal(ours[None], theirs[None])[0], rtol=1e-9)


def test_adapters_that_layers_share():
    params = {str(layer): {"kernel": jnp.ones((8, 8))} for layer in range(4)}
    delta = random_like(lora_jax.lorafy(params, "kernel", method=LoRA(rank=2)).delta, 0)
    scores = {"0/kernel": 6.0, "1/kernel": 3.5, "2/kernel": 0.3, "3/kernel": 0.2}
    smaller = random_like(lora_jax.drop.share(delta, scores), 1)
    found = similarity(smaller, delta)
    assert list(found) == list(scores)
    np.testing.assert_allclose(similarity(smaller, smaller)["3/kernel"], 1.0, rtol=1e-5)


# --- what adapters amplify ----------------------------------------------------------------------------------


def stored(leaf):
    """W of each layer, as its axes say."""
    return {
        "w": lambda: leaf[None],
        "heads": lambda: leaf.reshape(2, 6, 8),
        "window": lambda: leaf.transpose(1, 2, 0).reshape(1, 6, 7),
    }


def expected(name, weight, leaf):
    """Section 7.3 by dense decompositions, a row for each layer."""
    rank = leaf.spec.method.rank
    rows = []
    for update, w in zip(dense({name: leaf})[name], stored(weight)[name](), strict=True):
        u, _, v = np.linalg.svd(update)
        own_u, _, own_v = np.linalg.svd(w)
        along = lambda u, v, w=w: np.linalg.norm(u[:, :rank].T @ w @ v[:rank].T)
        rows.append((np.linalg.norm(update), np.linalg.norm(w), along(u, v), along(own_u, own_v)))
    return rows


FIELDS = ("update", "weight", "along_update", "along_weight")


def test_amplification_is_the_papers(x64):
    frozen, delta = lorafied(LoRA(rank=3, alpha=4), "float64", "w|heads|window")
    found = amplification(frozen, delta)
    assert [(leaf.path, leaf.layer) for leaf in found] == [
        ("heads", (0,)),
        ("heads", (1,)),
        ("w", ()),
        ("window", ()),
    ]
    for name in SHAPES:
        rows = [leaf for leaf in found if leaf.path == name]
        wanted = expected(name, np.asarray(frozen[name]), delta[name])
        for leaf, row in zip(rows, wanted, strict=True):
            np.testing.assert_allclose([getattr(leaf, field) for field in FIELDS], row, rtol=1e-9)
            np.testing.assert_allclose(leaf.factor, row[0] / row[2], rtol=1e-9)
            assert leaf.along_update <= leaf.along_weight <= leaf.weight and leaf.rank == 3


def test_w_need_not_be_decomposed():
    """Then there is no singular value decomposition as large as W, and everything else is as it was."""
    frozen, delta = lorafied(LoRA(rank=2), targets="w")
    (whole,), (less,) = amplification(frozen, delta), amplification(frozen, delta, leading=False)
    assert dataclasses.replace(whole, along_weight=None) == less
    assert str(amplification(frozen, delta, leading=False)).split()[-3] == "-"


def test_what_is_amplified(x64):
    """ΔW = 3 times the leading part of W amplifies it by 3. What W has not got is amplified without
    bounds.
    """
    w = np.random.default_rng(0).normal(size=(6, 8))
    u, values, v = np.linalg.svd(w)
    frozen, delta = lora_jax.lorafy({"w": jnp.asarray(w)}, "w", method=LoRA(rank=2, alpha=2))
    delta["w"].arrays.update(a=jnp.asarray(u[:, :2] * values[:2]), b=jnp.asarray(3 * v[:2]))
    (leaf,) = amplification(frozen, delta)
    np.testing.assert_allclose((leaf.factor, leaf.along_update), (3, leaf.along_weight), rtol=1e-9)
    delta["w"].arrays.update(a=jnp.asarray(u[:, :2]), b=jnp.asarray(v[6:]))
    (leaf,) = amplification(frozen, delta)
    assert leaf.update == pytest.approx(2**0.5) and leaf.factor > 1e10


def test_random_directions_of_w():
    """‖UᵀWV‖² is r²/(in·out) of ‖W‖² on average; another key draws others, and so does each layer."""
    shapes = {"w": jax.ShapeDtypeStruct((200, 24, 32), "float32")}
    frozen, delta = lora_jax.lorafy(shapes, "w", method=LoRA(rank=4), axes={"w": "layer in out"})
    alike = lambda array: jnp.broadcast_to(array[:1], array.shape)
    frozen, delta = (
        jax.tree.map(alike, random_like(tree, seed)) for seed, tree in enumerate((frozen, delta))
    )
    found, again = amplification(frozen, delta), amplification(frozen, delta, key=jax.random.key(1))
    shares = [(leaf.along_random / leaf.weight) ** 2 for leaf in found]
    np.testing.assert_allclose(np.mean(shares), 16 / (24 * 32), rtol=0.1)
    assert found[0].along_random != again[0].along_random and found[0].factor == again[0].factor
    assert found[0].along_random != found[1].along_random and found[0].factor == found[1].factor


def test_blocks_are_amplified_apart(x64):
    """Each beside its own part of the fused weight."""
    frozen, delta = lorafied(LoRA(rank=2, alpha=3, blocks=(False, True)), "float64", "w")
    (leaf,) = amplification(frozen, delta)
    plain, one = lora_jax.lorafy({"q": frozen["w"][:, 4:]}, "q", method=LoRA(rank=2, alpha=3))
    one["q"].arrays.update({name: array[0] for name, array in delta["w"].arrays.items()})
    (alone,) = amplification(plain, one)
    assert leaf.path == "w[1]"
    for field in FIELDS:
        np.testing.assert_allclose(getattr(leaf, field), getattr(alone, field), rtol=1e-10)


def test_of_a_quantised_base_and_another_method(x64):
    """W is what the adapter was trained beside; the adapter what it computes."""
    frozen, delta = lorafied(AdaLoRA(rank=2), "float32", "w")
    frozen = lora_jax.quantize(frozen, "int8", targets="w")
    before, after = (lora_jax.merge(frozen, tree) for tree in (jax.tree.map(jnp.zeros_like, delta), delta))
    (leaf,) = amplification(*arithmetic.as_lora(frozen, delta))
    np.testing.assert_allclose(leaf.weight, np.linalg.norm(before["w"]), rtol=1e-5)
    np.testing.assert_allclose(leaf.update, np.linalg.norm(after["w"] - before["w"]), rtol=1e-4)


def test_the_table():
    frozen, delta = lorafied(LoRA(rank=2))
    found = amplification(frozen, delta)
    lines = str(found).splitlines()
    assert lines[0].split() == "leaf rank |ΔW| |W| |UᵀWV| of ΔW of W random factor".split()
    assert [line.split("  ")[0] for line in lines[2:]] == ["heads, layer 0", "heads, layer 1", "w"]
    assert lines[-1].endswith(f"{found[-1].factor:.4g}")


# --- errors -------------------------------------------------------------------------------------------------

AS_LORA_FIRST = r"Make plain ones first: `frozen, delta = lora_jax.arithmetic.as_lora\(frozen, delta\)`"
start = lambda **options: lora_jax.lorafy({"w": jnp.ones((6, 8))}, "w", method=LoRA(rank=2), **options)
ERRORS = {
    "side": (
        lambda d: similarity(d(), d(), of="W"),
        ValueError,
        "`of` is 'W'; pass one of 'A', 'B', 'in', 'out'",
    ),
    "nothing shared": (
        lambda d: similarity(d(targets="w"), d(targets="heads")),
        ValueError,
        "no adapter of one leaf: 'w' here, 'heads' there",
    ),
    "no adapter": (lambda d: similarity({"w": None}, d()), ValueError, "of one leaf: none here"),
    "bases": (
        lambda d: similarity(d(axes=WHERE), d(axes={**WHERE, "w": "out in"})),
        ValueError,
        r"`other` is of another base: at 'w' its weight is \(6, 8\) with axes 'out in', and that of `delta`",
    ),
    "method": (
        lambda d: similarity(d(), d(AdaLoRA(rank=1))),
        ValueError,
        f"'heads' is AdaLoRA, .*{AS_LORA_FIRST}",
    ),
    "DoRA": (
        lambda d: amplification(*lorafied(DoRA(rank=1))),
        ValueError,
        f"'heads' is DoRA, .*{AS_LORA_FIRST}",
    ),
    "untrained": (
        lambda d: similarity(d(targets="w"), start().delta, of="out"),
        ValueError,
        "`other` adds nothing at 'w', where B is zero, as before training",
    ),
    "nothing to amplify": (lambda d: amplification(*start()), ValueError, "`delta` adds nothing at 'w'"),
    "stack": (
        lambda d: similarity(lora_jax.stack([d(), d()]), d()),
        ValueError,
        "'heads' is a stack of several. Pick one with `take",
    ),
    "stack of blocks": (
        lambda d: similarity(lora_jax.stack([d(LoRA(rank=1, blocks=(True, False)), targets="w")] * 2), d()),
        ValueError,
        "'w' is a stack of several",
    ),
    "another base": (
        lambda d: amplification({"w": jnp.ones((3, 8))}, {"w": d()["w"]}),
        ValueError,
        "this is another base",
    ),
    "shapes": (
        lambda d: amplification(*jax.eval_shape(lambda: lorafied(LoRA(1)))),
        TypeError,
        r"`amplification\(frozen, delta\)` computes with arrays",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        call(lambda *args, **options: random_delta(*args, **{"dtype": "float32", **options}))


def test_untrained_adapters_have_an_a(x64):
    """Which is what the paper compares; it is the random start then."""
    phi = subspaces.similarity(start(key=jax.random.key(0)).delta, start(key=jax.random.key(1)).delta)["w"]
    assert phi.shape == (2, 2) and 0 < float(phi[1, 1]) < 1
