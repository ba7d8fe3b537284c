"""GPT-2 and LoRA together: the adapted model, unrolled, scanned and rematerialised, and the merged one in
PyTorch.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formation import formed

import lora_jax
from lora_jax import LoRA
from lora_jax.interop import hf
from lora_jax.models import GPT2, GPT2Config, stack_layers


# No activation has as many elements as a weight.
CONFIG = GPT2Config(vocab_size=53, n_positions=16, n_embd=12, n_layer=2, n_head=2)
IDS = jnp.arange(14).reshape(2, 7) * 3 % 53
EVERYTHING = (
    "wte/embedding",
    "wpe/embedding",
    "attn/c_attn/kernel",
    "attn/c_proj/kernel",
    "mlp/c_fc/kernel",
    "mlp/c_proj/kernel",
)


def _randomised(tree, seed=0):
    leaves, treedef = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(
        treedef, [jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves]
    )


def _initial(model):
    """As `init` draws it, without compiling that."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), IDS)["params"]
    draw = np.random.default_rng(0).normal

    def leaf(path, shape):
        constant = {"scale": 1.0, "bias": 0.0}.get(path[-1].key)
        value = 0.02 * draw(size=shape.shape) if constant is None else np.full(shape.shape, constant)
        return jnp.asarray(value, shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def _adapted(model, params, targets, method):
    axes = {".*kernel": "layer in out"} if model.scan else None
    frozen, delta = lora_jax.lorafy(params, targets, method=method, axes=axes)
    return frozen, _randomised(delta)


@pytest.mark.parametrize("checkpoint", [False, True], ids=["", "checkpoint"])
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
@pytest.mark.parametrize("which", ["q,v", "everything"])
def test_adapted_is_merged_and_nothing_is_formed(which, scan, checkpoint, x64):
    model = GPT2(CONFIG, scan=scan, checkpoint=checkpoint, param_dtype=jnp.float64)
    params = _initial(model)
    targets, blocks = (EVERYTHING[2:3], (True, False, True)) if which == "q,v" else (EVERYTHING, None)
    frozen, delta = _adapted(model, params, targets, LoRA(rank=2, alpha=3, blocks=blocks))
    forward = lora_jax.adapt(model.apply)

    def loss(apply, params):
        return jnp.mean(apply({"params": params}, IDS) ** 2)

    def both(delta):
        ours = jax.value_and_grad(lambda d: loss(forward, lora_jax.combine(frozen, d)))(delta)
        return ours, jax.value_and_grad(lambda d: loss(model.apply, lora_jax.merge(frozen, d)))(delta)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), *jax.jit(both)(delta))
    leaves, treedef = jax.tree.flatten(frozen)
    paths = [path for path, _ in lora_jax._paths.named_leaves(frozen)]
    gradient = jax.make_jaxpr(
        lambda leaves, d: jax.grad(
            lambda d: loss(forward, lora_jax.combine(jax.tree.unflatten(treedef, leaves), d))
        )(d)
    )
    jaxpr = gradient(leaves, delta)
    for index, path in enumerate(paths):
        if any(path.endswith(target) for target in targets):
            layers = CONFIG.n_layer if scan and path.startswith("h/") else 1
            for size in {leaves[index].size, leaves[index].size // layers}:
                assert not formed(jaxpr, [index], size), path


def test_the_layouts_agree(x64):
    unrolled, scanned = (GPT2(CONFIG, scan=scan, param_dtype=jnp.float64) for scan in (False, True))
    params = _initial(unrolled)
    frozen, delta = _adapted(unrolled, params, EVERYTHING[2:3], LoRA(rank=2))
    merged = lora_jax.merge(frozen, delta)
    stacked_frozen, stacked_delta = _adapted(scanned, stack_layers(params), EVERYTHING[2:3], LoRA(rank=2))
    arrays = {
        name: jnp.stack(
            [delta["h"][str(i)]["attn"]["c_attn"]["kernel"].arrays[name] for i in range(CONFIG.n_layer)]
        )
        for name in ("a", "b")
    }
    stacked_delta["h"]["attn"]["c_attn"]["kernel"].arrays.update(arrays)
    out = jax.jit(lora_jax.adapt(scanned.apply))(
        {"params": lora_jax.combine(stacked_frozen, stacked_delta)}, IDS
    )
    np.testing.assert_allclose(out, jax.jit(unrolled.apply)({"params": merged}, IDS), rtol=1e-12, atol=1e-12)


def test_bfloat16_base_with_float32_adapters():
    model = GPT2(CONFIG, param_dtype=jnp.bfloat16)
    frozen, delta = _adapted(model, _initial(model), EVERYTHING[2:], LoRA(rank=2, alpha=2))
    # Adapters of about 0.4 of the weights' size. Ones that outweigh them make the model itself
    # ill-conditioned.
    delta = jax.tree.map(lambda array: 0.25 * array, delta)
    assert {leaf.dtype for leaf in jax.tree.leaves(delta)} == {jnp.dtype(jnp.float32)}
    exact_frozen = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), frozen)
    exact = jax.jit(GPT2(CONFIG).apply)({"params": lora_jax.merge(exact_frozen, delta)}, IDS)

    def error(logits):
        return float(jnp.abs(logits - exact).max() / jnp.abs(exact).max())

    adapted = jax.jit(lora_jax.adapt(model.apply))({"params": lora_jax.combine(frozen, delta)}, IDS)
    merged = jax.jit(model.apply)({"params": lora_jax.merge(frozen, delta)}, IDS)
    assert error(adapted) < 2**-6 and error(merged) < 2**-6
    assert float(jnp.abs(adapted - merged).max() / jnp.abs(exact).max()) < 2**-6


@pytest.mark.parametrize(
    "method", [LoRA(rank=3, alpha=16), LoRA(rank=3, alpha=16, rs=True)], ids=["alpha / rank", "rsLoRA"]
)
def test_the_scale_is_not_rounded_to_bfloat16(method):
    """Rounding errors of single elements average out over many; that of a scale, up to 2^-9, would not."""
    draw = np.random.default_rng(1).normal
    frozen, delta = lora_jax.lorafy({"w": jnp.zeros((64, 512), jnp.bfloat16)}, "w", method=method)
    delta = jax.tree.map(
        lambda array: jnp.asarray(draw(size=array.shape), jnp.bfloat16).astype(array.dtype), delta
    )
    x = jnp.asarray(draw(size=(512, 64)), jnp.bfloat16)
    ours = lora_jax.adapt(lambda params, x: x @ params["w"])(lora_jax.combine(frozen, delta), x).astype(
        jnp.float32
    )
    a, b = (delta["w"].arrays[name] for name in "ab")
    exact = method.scale * (x.astype(jnp.float32) @ a) @ b
    assert abs(float(jnp.vdot(ours, exact) / jnp.vdot(exact, exact)) - 1) < 3e-4


def test_decoding_with_a_cache():
    """Prefill, then token by token, with adapters: the same logits as the full forward pass of the merged
    model.
    """
    model = GPT2(CONFIG)
    frozen, delta = _adapted(model, _initial(model), EVERYTHING[2:], LoRA(rank=2))
    step = jax.jit(lora_jax.adapt(model.apply))
    variables = {"params": lora_jax.combine(frozen, delta)}
    logits, cache = step(variables, IDS[:, :4], cache=model.init_cache(2, 8))
    found = [logits[:, -1]]
    for column in range(4, 7):
        logits, cache = step(variables, IDS[:, column : column + 1], cache=cache)
        found.append(logits[:, 0])
    exact = jax.jit(model.apply)({"params": lora_jax.merge(frozen, delta)}, IDS)[:, 3:]
    np.testing.assert_allclose(jnp.stack(found, 1), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
def test_the_merged_export_is_pytorchs(scan, tmp_path, torch):
    import transformers

    model = GPT2(CONFIG, scan=scan)
    frozen, delta = _adapted(model, _initial(model), EVERYTHING[2:], LoRA(rank=2))
    hf.save(tmp_path / "merged", model, lora_jax.merge(frozen, delta))
    loaded, report = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    with torch.no_grad():
        theirs = loaded(torch.tensor(np.asarray(IDS))).logits.numpy()
    ours = jax.jit(lora_jax.adapt(model.apply))({"params": lora_jax.combine(frozen, delta)}, IDS)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
