"""Files in loralib's format that do not fit, or are damaged, are refused by what is wrong with them."""

import os
import pickle
import zipfile

import jax
import loralib_files
import numpy as np
import pytest
from loralib_files import A, adapters, assert_close, B, C_ATTN, Ours, output

from lora_jax import LoRA
from lora_jax.interop import hf, loralib


bases = loralib_files.bases
ours = loralib_files.ours


def without(*names):
    return lambda tensors: {name: array for name, array in tensors.items() if name not in names}


def renamed(old, new):
    return lambda tensors: {new if name == old else name: array for name, array in tensors.items()}


def also(name, array):
    return lambda tensors: {**tensors, name: array}


def changed(name, change):
    return lambda tensors: {**tensors, name: change(tensors[name])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(B), f"does not hold adapters of this model: '{B}' is missing[.]$"),
        (without(A), f"does not hold adapters of this model: '{A}' is missing[.]$"),
        (renamed(A, f"{C_ATTN}.lora_a"), rf"'{A}' is missing \(is it '{C_ATTN}.lora_a'\?\)"),
        (
            renamed(A, "transformer.h.0.attn.c_atn.lora_A"),
            rf"'{A}' is missing \(is it 'transformer.h.0.attn.c_atn.lora_A'\?\)",
        ),
        (
            renamed(A, f"module.{C_ATTN}.lora_A.weight"),
            rf"'{A}' is missing \(is it 'module.{C_ATTN}.lora_A.weight'\?\)",
        ),
        (
            renamed(A, "transformer.h.2.attn.c_attn.lora_A"),
            "'transformer.h.2.attn.c_attn.lora_A' is unexpected",
        ),
        (renamed(A, "transformer.h.0.ln_1.lora_A"), "'transformer.h.0.ln_1.lora_A' is unexpected"),
        (also("extra", np.ones(1, np.float32)), "'extra' is unexpected"),
        (also("step", np.ones(1, np.int64)), "'step' is unexpected"),
        (
            also("transformer.h.0.attn.c_attn.scale", np.ones(1, np.float32)),
            "'transformer.h.0.attn.c_attn.scale' is unexpected",
        ),
        (
            also(f"module.{A}", np.ones((4, 12), np.float32)),
            f"holds one tensor under two names, '{A}' and 'module.{A}'",
        ),
        (
            also(A.removeprefix("transformer."), np.ones((4, 12), np.float32)),
            f"holds one tensor under two names, '{A}' and 'h.0.attn.c_attn.lora_A'",
        ),
        (changed(A, np.transpose), rf"'{A}' has shape \(12, 4\) and must have"),
        (changed(B, np.transpose), rf"'{B}' has shape \(2, 24\) and must have"),
        (changed(A, lambda array: array[:3]), rf"'{A}' has shape \(3, 12\) and must have \(2, 12\)"),
        (changed(A, lambda array: array[:, :11]), rf"'{A}' has shape \(4, 11\) and must have \(4, 12\)"),
        (changed(B, lambda array: array[:12]), rf"'{B}' has shape \(12, 2\) and must have \(24, 2\)"),
        (changed(B, lambda array: array[:, :0]), rf"'{B}' has shape \(24, 0\) and must have"),
        (changed(A, lambda array: array[:0]), rf"'{A}' has shape \(0, 12\) and must have \(2, 12\)"),
        (changed(A, lambda array: array[None]), rf"'{A}' has shape \(1, 4, 12\) and must have"),
        (changed(A, lambda array: array[0, 0]), rf"'{A}' has shape \(\) and must have"),
        (
            changed(A, lambda array: np.concatenate([array, array])),
            rf"'{A}' has shape \(8, 12\) and must have \(6, 12\)",
        ),
        (
            changed(f"{C_ATTN}.bias", lambda array: array[:35]),
            rf"'{C_ATTN}.bias' has shape \(35,\) and must have \(36,\)",
        ),
        (changed(A, lambda array: array.astype(np.int32)), f"'{A}' has dtype int32 and must have one of"),
        (changed(A, lambda array: array > 0), f"'{A}' has dtype bool and must have one of"),
        (
            changed(A, lambda array: array.astype(np.float64)),
            "'h/0/attn/c_attn/kernel' is float64 in the file and would be narrowed",
        ),
        (
            changed(A, lambda array: np.full_like(array, np.nan)),
            f"48 values in '{A}' that are infinite or no numbers",
        ),
        (
            changed(f"{C_ATTN}.bias", lambda array: np.full_like(array, np.inf)),
            f"36 values in '{C_ATTN}.bias' that are infinite or no numbers",
        ),
        (
            without(A, B, A.replace("h.0", "h.1"), B.replace("h.0", "h.1")),
            rf"holds no `lora_A` of a layer of this model; it has \['{C_ATTN}.bias'",
        ),
        (lambda tensors: {}, r"holds no `lora_A` of a layer of this model; it has \[\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(ours, change, message):
    with pytest.raises(ValueError, match=message):
        ours.load(change(ours.tensors))


def test_values_that_are_not_finite_pass_where_told(ours):
    tensors = changed(A, lambda array: np.full_like(array, np.nan))(ours.tensors)
    assert np.isnan(
        adapters(ours.load(tensors, verify=False).delta)["h/0/attn/c_attn/kernel"].arrays["a"]
    ).all()


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (
            (True, True, False, False),
            rf"adapts 2 of the 3 blocks of '{C_ATTN}', and `blocks` is \(True, True, False, False\), which "
            r"does not say which",
        ),
        ((True, True, True), "pass 3 truth values, 2 of them True"),
        ((True, False, False), "pass 3 truth values, 2 of them True"),
        ((True, True), "pass 3 truth values, 2 of them True"),
        ("qv", "pass 3 truth values, 2 of them True"),
    ],
)
def test_blocks_that_the_file_contradicts_are_refused(ours, blocks, message):
    with pytest.raises(ValueError, match=message):
        ours.load(blocks=blocks)


def test_one_block_of_three_must_be_named(bases, tmp_path):
    key = Ours(bases("gpt2"), tmp_path, LoRA(rank=2, blocks=(False, True, False)))
    with pytest.raises(
        ValueError,
        match=(
            "adapts 1 of the 3 blocks of .*`blocks` is None, which does not say which: pass 3 truth values, "
            "1 of them True"
        ),
    ):
        key.load()
    with pytest.raises(ValueError, match="pass 3 truth values, 1 of them True"):
        key.load(blocks=(True, False, True))
    assert_close(
        output(key.model, *key.load(blocks=(False, True, False))), output(key.model, key.frozen, key.delta)
    )
    # Another block is another model, which the file cannot know.
    assert {
        leaf.spec.method.blocks for leaf in adapters(key.load(blocks=[True, False, False]).delta).values()
    } == {(True, False, False)}


def test_blocks_where_there_are_none_are_refused(bases, tmp_path):
    plain = Ours(bases("gpt2"), tmp_path, LoRA(rank=2))
    with pytest.raises(
        ValueError,
        match=(
            r"`blocks` is \(True, False, True\), and .*ours.pt has the adapters of whole layers "
            r"only: leave it out"
        ),
    ):
        plain.load(blocks=(True, False, True))


@pytest.mark.parametrize("alpha", ["32", None, True, float("nan"), float("inf"), (32,), np.ones(2)], ids=str)
def test_an_alpha_that_is_no_number_is_refused(ours, alpha):
    with pytest.raises(ValueError, match="`alpha` is .*; it must be (a number|finite)"):
        ours.load(alpha=alpha)


def test_an_alpha_that_our_file_contradicts_is_refused(ours):
    with pytest.raises(
        ValueError,
        match=r"`alpha` is 32, and .*ours.pt was saved with 16: pass that; .*`arithmetic.scaled`",
    ):
        ours.load(alpha=32)
    ours.load(alpha=16.0000001)
    # loralib's do not say.
    assert {
        leaf.spec.method.alpha for leaf in adapters(ours.load(ours.tensors, alpha=32).delta).values()
    } == {32}


def test_a_dropout_out_of_range_is_refused(ours):
    with pytest.raises(ValueError, match="`dropout` is 1.5"):
        ours.load(dropout=1.5)


def test_a_part_of_the_layers_does_not_make_a_stack(bases, tmp_path):
    stacked = Ours(bases("gpt2"), tmp_path, LoRA(rank=2), scan=True)
    with pytest.raises(
        ValueError, match=r"has adapters in 1 of 2 layers .*load the base with `hf.load\(dir, scan=False\)`"
    ):
        stacked.load(without(A, B)(stacked.tensors))
    unstacked, params = hf.load(bases("gpt2"))
    assert set(adapters(loralib.load(stacked.other, unstacked, params, alpha=16).delta)) == {
        "h/1/attn/c_attn/kernel"
    }


class Calls:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def test_code_in_a_file_is_refused_and_does_not_run(ours, tmp_path):
    mark = tmp_path / "ran"
    contents = pickle.dumps({"model_state_dict": Calls(os.mkdir, str(mark))}, 2)
    with zipfile.ZipFile(tmp_path / "hostile.pt", "w") as archive:
        archive.writestr("archive/data.pkl", contents)
    for reader in (
        lambda file: loralib.load(file, ours.model, ours.params, alpha=16, verify=False, check_base=False),
        loralib.head_of,
    ):
        with pytest.raises(
            ValueError, match="hostile.pt asks for 'posix.mkdir', and code that files ask for is never run"
        ):
            reader(tmp_path / "hostile.pt")
    assert not mark.exists()
    pickle.loads(contents)  # it would have
    assert mark.exists()


def test_what_is_no_state_dict_is_refused(torch, ours, tmp_path):
    for contents, message in [
        ([torch.ones(2)], "holds a list, not a state dict"),
        ({A: 3.0}, f"has a float under '{A}'"),
    ]:
        torch.save(contents, tmp_path / "theirs.pt")
        with pytest.raises(ValueError, match=message):
            loralib.load(tmp_path / "theirs.pt", ours.model, ours.params, alpha=16)


def test_another_base_is_found_unless_told(ours):
    other = jax.tree.map(lambda leaf: leaf, ours.params)
    other["h"]["1"]["mlp"]["c_fc"]["kernel"] = other["h"]["1"]["mlp"]["c_fc"]["kernel"].at[3, 4].add(1e-6)
    with pytest.raises(
        ValueError,
        match=(
            "beside another base: 'transformer.h.1.mlp.c_fc.weight' of `params` have other "
            "values.*`check_base=False`"
        ),
    ):
        loralib.load(ours.file, ours.model, other, alpha=16)
    loralib.load(ours.file, ours.model, other, alpha=16, check_base=False)
    # What the file replaces may be anything.
    other = jax.tree.map(lambda leaf: leaf, ours.params)
    other["h"]["1"]["attn"]["c_attn"]["bias"] += 1
    loralib.load(ours.file, ours.model, other, alpha=16)


def test_parameters_of_another_model_are_refused(ours, bases):
    with pytest.raises(ValueError, match="`params` are not those of `model`"):
        loralib.load(ours.file, ours.model.clone(scan=True), ours.params, alpha=16)
    model, params = hf.load(bases("roberta", "features"))
    with pytest.raises(ValueError, match="holds no `lora_A` of a layer of this model"):
        loralib.load(ours.file, model, params, alpha=16)


def broken(ours, contents):
    ours.other.write_bytes(contents)
    with pytest.raises(ValueError, match="other.pt"):
        loralib.load(ours.other, ours.model, ours.params, alpha=16)


def test_a_flipped_bit_anywhere_is_found(ours):
    contents = ours.file.read_bytes()
    for position in np.random.default_rng(0).choice(8 * len(contents), 200, replace=False):
        damaged = bytearray(contents)
        damaged[position // 8] ^= 1 << (position % 8)
        broken(ours, bytes(damaged))
    ours.load()


def test_a_torn_file_is_found(ours):
    contents = ours.file.read_bytes()
    for length in (0, 1, 3, 30, 100, len(contents) // 2, len(contents) - 64, len(contents) - 1):
        broken(ours, contents[:length])
    broken(ours, contents + b"\0")
    broken(ours, contents[:1000] + bytes(1000) + contents[2000:])
    ours.load()
