"""`load` reads those of PEFT's adapters that can be represented here; any other is an error."""

import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import numpy as np

from ..._lorafy import Lorafied
from ..._paths import named_leaves
from ..._tree.nodes import is_node
from ...methods import AdaLoRA, DoRA, LoRA, PiSSA, VeRA
from ...processes import all_or_none, spanning
from .. import _fingerprint
from .._adapters import Part, plain_number, with_blocks
from .._families import Family, family_of_model
from .._files import read_json
from .._heads import head_in
from .._imports import adapted, base_value
from .._modules import Module, tied_head, uncalled_modules
from .._safetensors import facts_of
from .._strict import check_beside, check_finite, check_tensors
from . import _rename, _stored
from ._config import AdapterConfig, parse
from ._layout import PREFIX, PROJECTIONS, TASKS
from ._plan import Plan, plan_of
from ._starts import begins_at_base, check_start, with_start
from ._targets import pattern_value


def load(
    dir: str | Path,
    model: nn.Module,
    params: Any,
    *,
    verify: bool = True,
    check_base: bool = True,
    rename: Literal["strict", "auto"] = "strict",
) -> Lorafied:
    """The adapter in a directory of PEFT's, on `params`: what `lorafy` would have returned, trained.

    ```python
    model, params = hf.load("gpt2")
    frozen, delta = peft.load("adapter", model, params)
    logits = lora_jax.adapt(model.apply)({"params": lora_jax.combine(frozen, delta)}, input_ids)
    ```

    LoRA (rsLoRA, DoRA, PiSSA included), VeRA and AdaLoRA are read, on linear layers, convolutions and
    embeddings. Heads, biases and other weights that the file holds whole become leaves that train (`Full`).
    A PiSSA adapter that PEFT has not converted begins at the singular vectors of the base, which are computed
    again; with DoRA it becomes the DoRA of twice the rank that computes the same. Tokens that train by
    themselves make their embedding train whole. An adapter of GPT-2's fused `c_attn` whose B is zero outside
    of blocks becomes a LoRA of those `blocks`. Arrays keep their dtype. The rank may be above min(in, out).

    Where arrays of `params` span several processes, all of them call this, and an error is raised in all. A
    and B come on each process's default device: `jax.device_put(delta, shardings(mesh, delta_specs(delta,
    specs), delta))` of `lora_jax.sharding` places them as the weights are.

    Args:
      dir: has `adapter_config.json` and `adapter_model.safetensors`, or `.bin`, of which no code is run;
        either may be in shards with an index.
      model, params: as `hf.load` returned them, with the head that the adapter was trained with:
        `head_of(dir)`.
      verify: whether to compare the files with the checksums that they carry, if any, and to look for values
        that are not finite.
      check_base: whether to compare `params` with the base beside which the adapter was saved, if the file
        has its fingerprint.
      rename: "strict" reads PEFT's names only. "auto" also reads names that other tools wrapped
        (`_orig_mod.`, `_fsdp_wrapped_module.`, `module.`, an adapter's name, `base_model.model.` twice or not
        at all, Kohya's, MLX's) if each pairs with exactly one of PEFT's, and warns of what it read as what.

    Raises:
      ValueError: a tensor that is missing, unexpected, of another shape or dtype, or not finite; a field of
        the config that cannot be represented; a damaged file; another base; an adapter of only one of two
        modules that share their weight (then `OneSided`).
    """
    directory = Path(dir)
    if rename not in ("strict", "auto"):
        raise ValueError(f"`rename` is {rename!r}; it must be 'strict' or 'auto'.")
    with all_or_none(spanning(params)):
        kind, _, family = family_of_model(model)
        config = parse(directory / "adapter_config.json", read_json(directory / "adapter_config.json"))
        file, stored = _stored.tensors(directory)
        # Files of other tools, and shards, carry none.
        whole_file = file.suffix == ".safetensors" and file.is_file()
        facts = facts_of(file, verify=verify) if whole_file else None
        if verify:
            check_beside(file, facts)
        _check_task(directory, config, model)

        def fitted(stored: Mapping[str, Any], renamed: bool) -> tuple[Plan, dict[str, Any]]:
            plan = plan_of(directory, config, kind, model, family, stored)
            if renamed:
                alphas = {module.name: _alpha(config, module) for module in plan.targets}
                stored = _rename.paired(directory, stored, plan.expected, alphas)
            stored = _stored.under_expected_names(plan, directory, stored, family)
            stored = _stored.without_copies_of_base(plan, directory, model, family, params, stored)
            check_tensors(
                f"{directory} does not hold the adapter that its config describes for this model",
                plan.expected,
                stored,
            )
            return plan, stored

        if rename == "auto":
            plan, stored = fitted(_rename.unwrapped_tensors(directory, stored), True)
            _tell_renamed(directory, stored)
        else:
            try:
                plan, stored = fitted(stored, False)
            except ValueError as error:
                if not _fits_renamed(fitted, directory, stored):
                    raise
                raise ValueError(
                    f'{error} Each name pairs with one that PEFT writes: pass `rename="auto"`.'
                ) from error
        read = lambda name: check_finite(file, name, stored[name].read()) if verify else stored[name].read()
        arrays = {name: read(name) for name in plan.expected}

        whole = {tensor: arrays[name] for name, tensor in plan.whole.items() if name not in plan.idle}
        parts = with_blocks([_part(config, module, arrays, plan) for module in plan.targets], family)
        if config.init_lora_weights == "pissa" and config.peft_type == "LORA":
            check_start(directory, parts, model, family, params)
            parts = [with_start(part, config, params) for part in parts] if config.use_dora else parts
        _check_called(directory, parts, model, family)
        if plan.tokens is not None and config.tokens is not None:
            leaves = dict(named_leaves(params, is_leaf=is_node))
            rows = _with_rows(directory, model, family, leaves, config.tokens[1], arrays[plan.tokens])
            whole |= {family.embedding: rows}
            if tied_head(model, family) is not None:
                whole |= {family.decoder: rows}
                if family.aliases:
                    raise ValueError(
                        f"`trainable_token_indices` is set in {directory}, and the head that is tied to the "
                        "embedding has a bias, which PEFT leaves out of the head of such adapters: train the "
                        "whole embedding and the head, with `modules_to_save`."
                    )
        shared = _shared(config, arrays, plan)
        result = adapted(model, family, params, parts, whole, shared, directory)
        if check_base and facts:
            _fingerprint.check_base(directory, facts, model, family, result.frozen)
        return result


def _fits_renamed(fitted: Callable, directory: Path, stored: Mapping[str, Any]) -> bool:
    """Whether `rename="auto"` would read these tensors."""
    try:
        fitted(_rename.unwrapped_tensors(directory, stored), True)
    except ValueError:
        return False
    return True


def _tell_renamed(directory: Path, stored: Mapping[str, Any]) -> None:
    changed = [(tensor.name, name) for name, tensor in stored.items() if tensor.name != name]
    if changed:
        theirs, own = changed[0]
        more = f", and {len(changed) - 1} more" if len(changed) > 1 else ""
        warnings.warn(
            f"{directory} has names that are not PEFT's: {theirs!r} is read as {own!r}{more}.", stacklevel=3
        )


def head_of(dir: str | Path) -> dict[str, Any]:
    """The head that an adapter was trained with, as arguments of `hf.load` for its base.

    ```python
    # head="sequence_classification", num_labels=3
    model, params = hf.load("roberta-base", **peft.head_of("adapter"))
    ```

    The config's task decides, or else the head that the file holds. The result is empty where neither names a
    head; the base has it then. `peft.load` replaces the head that `hf.load` draws by the adapter's.
    """
    directory = Path(dir)
    config = parse(directory / "adapter_config.json", read_json(directory / "adapter_config.json"))
    names = {
        _rename.unwrapped(name).removeprefix(PREFIX): tensor
        for name, tensor in _stored.tensors(directory)[1].items()
    }
    # A decoder has no other head than that of classes.
    if any(re.match(r"((transformer\.)?h|(model\.)?layers)\.\d+\.", name) for name in names):
        own = head_in(names)
        return own or ({"head": "sequence_classification"} if config.task_type == "SEQ_CLS" else {})
    head = next(
        (head for head, task in TASKS.items() if task is not None and task == config.task_type and head), None
    )
    return head_in(names) if head is None else {"head": head, **_labels(names)}


def _labels(stored: Mapping[str, Any]) -> dict[str, int]:
    ends = ("classifier.weight", "classifier.out_proj.weight")
    return next(
        ({"num_labels": stored[end].shape[0]} for end in ends if end in stored and stored[end].shape), {}
    )


def _check_task(directory: Path, config: AdapterConfig, model: nn.Module) -> None:
    own = TASKS[getattr(model, "head", None)]
    if config.task_type in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") and config.task_type != own:
        head = next(head for head, task in TASKS.items() if task == config.task_type)
        raise ValueError(
            f"`task_type` of {directory} is {config.task_type}, and `model` has another head: load the base "
            f"with `hf.load(base, **peft.head_of(dir))` (head={head!r})."
        )


def _alpha(config: AdapterConfig, module: Module) -> float:
    return plain_number(pattern_value(config.alpha_pattern, module.name, config.lora_alpha))


def _part(config: AdapterConfig, module: Module, arrays: dict[str, np.ndarray], plan: Plan) -> Part:
    rank = plan.ranks[module.name]
    own = {ours: arrays[name].reshape(plan.shapes[name]) for ours, name in plan.names[module.name].items()}
    alpha = _alpha(config, module)
    if config.peft_type == "VERA":
        return Part(module, VeRA(rank, config.d_initial, config.projection_prng_key, config.dropout), own)
    if config.peft_type == "ADALORA":
        mask = config.rank_pattern.get(f"{module.name}.lora_E")
        # This is PEFT's rule, and for this method alone.
        alpha = alpha if alpha > 0 else rank
        return Part(
            module,
            AdaLoRA(rank, alpha, config.dropout),
            own if mask is None else _at_full_rank(own, np.array(mask, bool), rank),
        )
    options: dict[str, Any] = {
        "rank": rank,
        "alpha": alpha,
        "dropout": config.dropout,
        "rs": config.use_rslora,
    }
    if config.use_dora:
        return Part(module, DoRA(**options), own)
    return Part(module, PiSSA(**options) if begins_at_base(config, module) else LoRA(**options), own)


def _with_rows(
    directory: Path,
    model: nn.Module,
    family: Family,
    leaves: Mapping[str, Any],
    tokens: tuple[int, ...],
    rows: np.ndarray,
) -> np.ndarray:
    """The base's embedding with these rows in place of its own."""
    embedding = base_value(model, family, family.embedding, leaves)
    if embedding is None:
        raise ValueError(
            f"`trainable_token_indices` is set in {directory}, and the embedding of `params` is quantised or "
            "a shape: load the adapter on the base's own values."
        )
    changed = np.array(embedding)
    changed[list(tokens)] = rows.astype(changed.dtype)
    return changed


def _check_called(directory: Path, parts: list[Part], model: nn.Module, family: Family) -> None:
    """Raises `ValueError` for an adapter that PEFT has and never runs. At its start it adds nothing here
    either.
    """
    uncalled = uncalled_modules(model, family)
    for part in parts:
        if part.module.matrix.name.rpartition(".")[0] in uncalled and (
            type(part.method) is not LoRA or (part.arrays["b"] @ part.arrays["a"]).any()
        ):
            raise ValueError(
                f"`target_modules` of {directory} takes in {part.module.name!r}, whose weight PyTorch's "
                "model reads without calling the module: PEFT's adapter has no effect there, and would have "
                "one here. Remove the target and its tensors to compute what PEFT computes."
            )


def _at_full_rank(arrays: dict[str, np.ndarray], kept: np.ndarray, rank: int) -> dict[str, np.ndarray]:
    """AdaLoRA's arrays at their full rank. Ranks that were given up, which the file lacks, are zero; the
    budget may bring them back.
    """
    if len(kept) != rank:
        raise ValueError(
            f"`rank_pattern` has a mask of {len(kept)} entries, and `init_r` is {rank}; save the adapter "
            "again."
        )
    full = {}
    for name, array in arrays.items():
        axis = 1 if name == "b" else 0
        shape = list(array.shape)
        shape[axis] = rank
        full[name] = np.zeros(shape, array.dtype)
        np.moveaxis(full[name], axis, 0)[kept] = np.moveaxis(array, axis, 0)
    return full


def _shared(config: AdapterConfig, arrays: dict[str, np.ndarray], plan: Plan) -> dict[str, np.ndarray]:
    """VeRA's projections, if the file has them. Otherwise they are drawn again, from its seed."""
    return {ours: arrays[name].T for ours, name in PROJECTIONS.items() if name in plan.expected}
