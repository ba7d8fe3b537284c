"""`plan` through the command line: what it prints, its verdicts, bad input, and GPT-3."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from plans import directories as directories, plans_promote as plans_promote

from experiments.command_line import main
from experiments.plan import accelerators, models, report


REPOSITORY = Path(__file__).resolve().parent.parent


def test_verdicts():
    gigabyte = 10**9
    assert accelerators.verdict("a100-80g", 30 * gigabyte, 30 * gigabyte)["fits"] == "yes"
    assert accelerators.verdict("a100-80g", 30 * gigabyte, 48 * gigabyte)["fits"] == "close"
    assert accelerators.verdict("a100-80g", 30 * gigabyte, 80 * gigabyte) | {"share": 0} == {
        "accelerator": "a100-80g", "memory": 80 * gigabyte, "share": 0, "fits": "no", "why": "by the estimate of temporaries"  # noqa: E501
    }  # fmt: skip
    assert accelerators.verdict("a100-80g", 81 * gigabyte, 0)["why"] == "what is stored alone is more"


@pytest.mark.parametrize(
    "count, text",
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (349_208_518_656, "349.21 GB"), (1.2e12, "1.20 TB")],
)
def test_amounts(count, text):
    assert report.amount(count) == text


def test_command(directories, tmp_path, capsys):
    words = [
        "plan",
        str(directories / "gpt2"),
        "--mesh",
        "data=2,fsdp=4",
        "--rank",
        "2",
        "--batch",
        "8",
        "--seq",
        "16",
        "--counted",
        "6",
        "--dtype",
        "float32",
        "--compare-full",
    ]
    assert main([*words, "--accelerator", "h100", "--json", str(tmp_path / "plan.json")]) == 0
    captured = capsys.readouterr()
    assert "8 virtual devices" in captured.err
    for title in (
        "Bytes a device",
        "FLOPs of a step",
        "Collectives a device",
        "Does it fit?",
        "full fine-tuning",
        "8 examples of 16 tokens, 6 of them counted, in 1 part",
        "h100, 80.00 GB | yes",
    ):
        assert title in captured.out
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
    assert found["step"]["trained"] == {
        "numbers": 1024,
        "of_adapters": 1024,
        "bytes": 4096,
        "with_optimiser_bytes": 3 * 4096 + 8,
    }
    assert found["step"]["bytes"]["kept_activations"] == 2 * 1 * 16 * 64 * 4
    assert found["full"]["bytes"]["opt_state"] > 2 * found["step"]["bytes"]["frozen"] - 100
    assert (
        found["step"]["bytes"]["total"] < found["full"]["bytes"]["total"]
        and found["step"]["flops"]["all_devices"] < found["full"]["flops"]["all_devices"]
    )


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    assert "example: python -m experiments plan gpt3-175b" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["gpt4"],
            "`MODEL` is 'gpt4', neither a published size nor a directory with a config.json; did you mean "
            "`gpt2`",
        ),
        (
            ["gpt2", "--mesh", "data=8,expert=2"],
            "`--mesh` is 'data=8,expert=2': 'expert=2' is not one of data=N, fsdp=N and tensor=N",
        ),
        (
            ["gpt2", "--mesh", "data=2,data=2"],
            "'data=2' is not one of data=N, fsdp=N and tensor=N, each at most once",
        ),
        (["gpt2", "--mesh", "data=0"], "`mesh.data` must be at least 1, got 0"),
        (["gpt2", "--mesh", "data=64"], "`--mesh` has 64 devices, and JAX, which was running before, sees 8"),
        (["gpt2", "--mesh", "data=65536"], "`--mesh` has 65536 devices, and at most 4096 can be planned"),
        (
            ["gpt2", "--mesh", "data=3"],
            "`--batch` is 64, and must be a multiple of data * fsdp * accumulate (3)",
        ),
        (["gpt2", "--batch", "0"], "`--batch` must be at least 1, got 0"),
        (["gpt2", "--seq", "2048"], "`--seq` is 2048, and gpt2 has positions for 1024"),
        (["gpt2", "--counted", "2000"], "`--counted` is 2000, more than the 1024 tokens of an example"),
        (["gpt2", "--counted", "0"], "`--counted` must be at least 1, got 0"),
        (["roberta-base", "--counted", "8"], "`--counted` is 8, and roberta-base is planned with one label"),
        (["gpt2", "--method", "Lora"], "`--method` is 'Lora', and must be one of AdaLoRA, DeltaLoRA"),
        (["gpt2", "--method", "DoRA", "--blocks", "1,0,1"], "`--blocks` is not an option of DoRA"),
        (["gpt2", "--rank", "10000"], "`rank` is 10000, above min(in, out) = 768"),
        (["gpt2", "--targets", "c_atn/kernel"], "`targets` pattern 'c_atn/kernel' matches no leaf"),
        (["gpt2", "--accelerator", "h1oo"], "`--accelerator` is 'h1oo', and must be one of v100-32g"),
        (["gpt2", "--mesh", "tensor=7"], "the mesh {'data': 1, 'fsdp': 1, 'tensor': 7} does not divide"),
        (
            ["smollm2-135m", "--mesh", "tensor=5"],
            "does not divide 'embed_tokens/embedding': axis 1 of its shape (49152, 576) would be split into "
            "5 parts",
        ),
        (["llama-3-8"], "(published: gpt3-125m, "),
        (["llama3-8b"], "did you mean `llama-3-8b`"),
        (
            ["gpt2", "--json", "/no/such/place/plan.json"],
            "`--json` is `/no/such/place/plan.json`, and there is no directory",
        ),
    ],
)
def test_bad_input_is_one_line(words, message, capsys):
    assert main(["plan", *words]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert message in captured.err


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is not valid JSON"),
        ('{"model_type": "mixtral"}', "is 'mixtral', and must be one of gpt2, llama, mistral, qwen2, qwen3"),
        ("[]", "is None"),
    ],
)
def test_a_config_that_is_none(content, message, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        models.named(str(tmp_path), "float32", checkpoint=True)


def test_virtual_devices_come_before_jax():
    """Whatever the environment says of devices, and nothing else in XLA_FLAGS is lost."""
    code = (
        "import os; from experiments.plan import devices; devices.start(12); import jax; "
        "print(jax.device_count(), os.environ['XLA_FLAGS'])"
    )
    flags = "--xla_force_host_platform_device_count=8 --xla_cpu_multi_thread_eigen=false"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env={**os.environ, "JAX_PLATFORMS": "", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split() == [
        "12",
        "--xla_cpu_multi_thread_eigen=false",
        "--xla_force_host_platform_device_count=12",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("mesh, parts, most", [("fsdp=64,tensor=8", 512, 18e9), ("data=8,fsdp=8", 8, 72e9)])
def test_gpt3_in_less_than_a_minute(mesh, parts, most, tmp_path):
    started = time.perf_counter()
    words = [
        "plan",
        "gpt3-175b",
        "--mesh",
        mesh,
        "--rank",
        "4",
        "--accelerator",
        "a100-80g",
        "--json",
        str(tmp_path / "plan.json"),
    ]
    run = subprocess.run(
        [sys.executable, "-m", "experiments", *words],
        cwd=REPOSITORY,
        env=os.environ,
        capture_output=True,
        text=True,
        check=True,
    )
    assert time.perf_counter() - started < 60
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["step"]["bytes"]["frozen"] == pytest.approx(349_208_518_656 / parts, rel=0.05)
    # jax 0.10 keeps 32-bit copies of a whole device's bfloat16 weights, 87 GB of them on the last mesh.
    assert found["step"]["bytes"]["temporaries"] == min(
        found["step"]["bytes"]["temporaries_compiled_in"].values()
    )
    assert found["step"]["bytes"]["total"] < most and found["step"]["fits"][0]["fits"] == "yes"
    stated = found["claims"]
    assert (
        stated["full"]["all"] - stated["full"]["gradients"] < stated["paper"]["full"] < stated["full"]["all"]
    )
    assert stated["lora"]["all"] == pytest.approx(stated["paper"]["lora"], rel=0.01)
    assert stated["checkpoint"]["full"] == pytest.approx(stated["paper"]["full_checkpoint"], rel=0.01)
    assert (
        stated["checkpoint"]["lora_16_bits"]
        == 2 * 18_874_368
        == pytest.approx(stated["paper"]["lora_checkpoint"], rel=0.1)
    )
    assert (
        stated["merged_is_the_base"]
        and stated["forward_flops"]["merged"]
        == stated["forward_flops"]["base"]
        < stated["forward_flops"]["adapted"]
    )
    assert "GPT-3 175B in LoRA's paper, and here" in run.stdout and len(run.stderr.splitlines()) == 1
