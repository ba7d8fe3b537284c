"""A tiny model and its training step under a policy of mixed precision."""

import jax
import jax.numpy as jnp
from jaxprs import equations
from training import examples, MODEL, weights

import lora_jax
from experiments.config import (
    Architecture,
    Base,
    Budget,
    Config,
    Mesh,
    Optimizer,
    Precision,
    Source,
    TextData,
    Train,
)
from experiments.training import order, precision, sharded, trainer as train


NARROW, WIDE = jnp.dtype("bfloat16"), jnp.dtype("float32")


ALL = Precision(parameters="bfloat16", compute="bfloat16", adapters="float32")


LORA = {"name": "LoRA", "rank": 2, "alpha": 4, "blocks": [True, False, True]}


RULES = {"AdaLoRA": {"adalora": Budget(target_rank=1, final_steps=1)}, "LoRAFA": {"lorafa": True}}


def config(policy, method=LORA, targets=("attn/c_attn/kernel",), mesh=Mesh(), **settings):
    section = Train(**{"steps": 40, "batch": 8, "lr": 1e-2, **settings})
    base = Base(architecture=Architecture(8, 1, 2, 16), tokenizer="none")
    rule = Optimizer(**RULES.get(method["name"], {}))
    return Config(
        "tiny",
        Source(None),
        base,
        TextData("text", "none", "none", 12),
        method,
        targets,
        section,
        rule,
        mesh,
        policy,
    )


def of(name):
    """A method's section, and targets for it."""
    return {"name": name} if name == "Full" else {"name": name, "rank": 2}, (
        "mlp/.*",
    ) if name == "Full" else ("attn/c_attn/kernel", "mlp/c_fc/kernel")


def started(settings):
    """A trainer and its first state, as `run` makes them, from the base of `weights`."""
    policy, mesh = settings.precision, sharded.make_mesh(settings.mesh)
    model = precision.computing(MODEL.clone(param_dtype=policy.parameters or "float32"), policy)
    params = jax.tree.map(lambda leaf: leaf.astype(policy.parameters or leaf.dtype), weights())
    params, specs = sharded.on_mesh(mesh, params, model.partition_rules)
    frozen, delta = lora_jax.lorafy(
        params, list(settings.targets), method=precision.method(settings), key=jax.random.key(1)
    )
    trainer = train.Trainer.create(settings, mesh, model.apply, frozen, delta, specs)
    return trainer, trainer.start(delta, specs, jax.random.key(2))


def arguments(trainer, state, number=0):
    settings = trainer.config.train
    batch = trainer.device_batch(
        examples(), order.indices(0, number, len(examples()), settings.batch), settings.accumulate
    )
    return state.delta, state.opt_state, trainer.frozen, batch, jax.random.fold_in(state.key, number)


def steps(trainer, state, count):
    """The losses of `count` steps from `state`, whose arrays they take, and the state after them."""
    step, found = trainer.compiled_step(state), []
    for number in range(count):
        delta, opt_state, numbers = step(*arguments(trainer, state, number))
        state = state._replace(delta=delta, opt_state=opt_state, step=number + 1)
        found.append(float(numbers["loss"]))
    return found, state


def dtypes(tree):
    return {leaf.dtype for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)}


def traced(settings):
    trainer, state = started(settings)
    step = trainer.compiled_step(state)
    return list(equations(jax.make_jaxpr(step)(*arguments(trainer, state)))), trainer, state
