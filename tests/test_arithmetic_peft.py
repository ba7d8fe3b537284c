"""The rules that leave entries out, against PEFT's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_deltas import assert_close, dense, random_delta, random_like, shaped

import lora_jax
from lora_jax import arithmetic, LoRA


@pytest.fixture(scope="module")
def theirs(torch):
    """`theirs(deltas, weights, way, **options)`: ΔW of PEFT's combination of the same adapters. Of "w"
    and "v", in float64.
    """
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install 'lora_jax[torch]'")

    def combined(deltas, weights, way, **options):
        base = torch.nn.ModuleDict(
            {"w": torch.nn.Linear(6, 8, bias=False), "v": torch.nn.Linear(6, 8, bias=False)}
        ).double()
        found = None
        for number, delta in enumerate(deltas):
            names = [name for name in ("w", "v") if delta[name] is not None]
            method = delta["w"].spec.method
            config = peft.LoraConfig(r=method.rank, lora_alpha=method.alpha, target_modules=names)
            found = peft.PeftModel(base, config, "0") if found is None else found
            if number:
                found.add_adapter(str(number), config)
            for name in names:
                layer = found.base_model.model[name]
                for part, theirs in (("a", layer.lora_A), ("b", layer.lora_B)):
                    theirs[str(number)].weight.data = torch.tensor(
                        np.asarray(delta[name].arrays[part]).T.copy()
                    )
        found.add_weighted_adapter(
            [str(number) for number in range(len(deltas))], weights, "new", combination_type=way, **options
        )
        return {
            name: found.base_model.model[name].double().get_delta_weight("new").detach().numpy().T
            for name in ("w", "v")
        }

    return combined


def pair(ranks=(3, 3, 3)):
    """Adapters of "w" and "v", of which the last lacks "v"."""
    shapes = shaped({name: (6, 8) for name in "wv"})
    methods = [LoRA(rank=rank, alpha=alpha) for rank, alpha in zip(ranks, (4, 2.5, 1), strict=True)]
    return [
        random_like(lora_jax.lorafy(shapes, t, method=m).delta, s)
        for s, (m, t) in enumerate(zip(methods, ["w|v", "w|v", "w"], strict=True))
    ]


def added(delta):
    return {name: matrix[0] for name, matrix in dense(delta).items()}


WEIGHTS = [0.5, -0.25, 2.0]
WAYS = {
    "cat": ((3, 2, 1), {}, lambda deltas: arithmetic.weighted(deltas, WEIGHTS)),
    "svd": (
        (3, 2, 1),
        {"svd_rank": 2},
        lambda deltas: arithmetic.compress(arithmetic.weighted(deltas, WEIGHTS), 2),
    ),
    "ties": ((3, 3, 3), {"density": 0.3}, lambda deltas: arithmetic.ties(deltas, WEIGHTS, density=0.3)),
    "ties, frequency": (
        (3, 3, 3),
        {"density": 0.6, "majority_sign_method": "frequency"},
        lambda deltas: arithmetic.ties(deltas, WEIGHTS, density=0.6, majority="frequency"),
    ),
    "ties_svd": (
        (3, 2, 1),
        {"density": 0.3, "svd_rank": 4},
        lambda deltas: arithmetic.ties(deltas, WEIGHTS, density=0.3, rank=4),
    ),
    "magnitude_prune": (
        (3, 3, 3),
        {"density": 0.3},
        lambda deltas: arithmetic.ties(deltas, WEIGHTS, density=0.3, majority=None),
    ),
    "magnitude_prune_svd": (
        (3, 2, 1),
        {"density": 0.3, "svd_rank": 4},
        lambda deltas: arithmetic.ties(deltas, WEIGHTS, density=0.3, majority=None, rank=4),
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_as_peft(way, theirs, x64):
    ranks, options, ours = WAYS[way]
    deltas = pair(ranks)
    # It holds the weights in float32.
    assert_close(
        added(ours(deltas)), theirs(deltas, WEIGHTS, way.split(",")[0], **options), rtol=1e-6, atol=1e-6
    )


DARE = [
    ("dare_linear", {}),
    ("dare_ties", {"majority": "total"}),
    ("dare_linear_svd", {"rank": 4}),
    ("dare_ties_svd", {"majority": "frequency", "rank": 4}),
]


@pytest.mark.parametrize("way, options", DARE)
def test_dare_as_peft(way, options, theirs, torch, monkeypatch, x64):
    """With the entries that we drop dropped there: of weights that are 1 for one adapter and 0 for the
    others, these are zeros.
    """
    deltas, key = pair(), jax.random.key(5)
    settings = {"density": 0.5, "key": key}
    masks = {name: [] for name in "wv"}
    for number, delta in enumerate(deltas):
        alone = dict(settings, rank=6) if "rank" in options else settings
        # Of all ones, so that only what is dropped is zero.
        ones = [jax.tree.map(lambda array: jnp.asarray(np.ones(array.shape)), delta) for delta in deltas]
        of_one = arithmetic.dare(ones, [float(number == index) for index in range(3)], **alone)
        for name in "wv":
            if delta[name] is not None:
                arrays = of_one[name].arrays
                kept = (
                    [added(of_one)[name]]
                    if "rank" in options
                    else [np.asarray(arrays[part]) for part in "ab"]
                )
                masks[name].append([np.abs(array) > 1e-9 for array in kept])
    assert np.any(masks["w"][0][0] != masks["w"][1][0]) and np.any(masks["w"][0][0] != masks["v"][0][0])
    queue = [
        of_adapter[part].T
        for name in ("w", "v")
        for part in range(len(masks["w"][0]))
        for of_adapter in masks[name]
    ]
    assert 0.3 < np.mean(np.concatenate([mask.ravel() for mask in queue])) < 0.7
    monkeypatch.setattr(torch, "bernoulli", lambda input: torch.tensor(queue.pop(0).copy()).to(input.dtype))
    names = {"majority": "majority_sign_method", "rank": "svd_rank"}
    wanted = theirs(
        deltas, WEIGHTS, way, density=0.5, **{names[name]: value for name, value in options.items()}
    )
    assert not queue
    assert_close(added(arithmetic.dare(deltas, WEIGHTS, **settings, **options)), wanted, rtol=1e-6, atol=1e-6)


def test_dare_is_right_on_average(x64):
    deltas = [random_delta(seed=seed, targets="heads") for seed in (0, 1)]
    summed = lambda key: arithmetic.dare(deltas, [1, -2], density=0.5, key=key, rank=6)["heads"].arrays
    drawn = jax.jit(lambda keys: jax.lax.map(summed, keys))(jax.random.split(jax.random.key(0), 2000))
    drawn = np.asarray(drawn["a"]) @ np.asarray(drawn["b"]).reshape(2000, 2, 6, 8)
    # Five standard errors of the mean.
    assert np.all(
        np.abs(drawn.mean(0) - dense(arithmetic.weighted(deltas, [1, -2]))["heads"])
        < 5 * drawn.std(0) / np.sqrt(2000)
    )
    kept = (
        np.asarray(arithmetic.dare(deltas, [1, 0], density=0.5, key=jax.random.key(0))["heads"].arrays["a"])
        != 0
    )
    assert np.any(kept[0] != kept[1])  # layers are drawn apart


@pytest.mark.parametrize("rank", [None, 2])
def test_every_layer_is_a_matrix_of_its_own(rank, x64):
    """A stack is merged as its layers are, also where several axes make one of a matrix."""
    deltas = [random_delta(seed=seed, targets="heads") for seed in (0, 1)]
    together = dense(arithmetic.ties(deltas, [1.0, 0.5], density=0.4, rank=rank))["heads"]
    start = lora_jax.lorafy(shaped({"heads": (6, 8)}), "heads", method=LoRA(rank=3, alpha=4)).delta
    for layer in range(2):
        arrays = [
            {"a": delta["heads"].arrays["a"][layer], "b": delta["heads"].arrays["b"][layer].reshape(3, 8)}
            for delta in deltas
        ]
        alone = [{"heads": dataclasses.replace(start["heads"], arrays=own)} for own in arrays]
        merged = dense(arithmetic.ties(alone, [1.0, 0.5], density=0.4, rank=rank))["heads"]
        np.testing.assert_allclose(together[layer], merged[0], rtol=1e-9, atol=1e-9)
