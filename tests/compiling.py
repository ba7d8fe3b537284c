"""How XLA compiles for the tests: with little care.

The programs of the tests are small, and compiling them is most of what the tests take. What is computed stays
the same, up to the order of sums.
"""

from importlib.metadata import version


def xla_flags(devices: int) -> str:
    """The `XLA_FLAGS` of a test process with so many virtual CPU devices."""
    flags = [
        f"--xla_force_host_platform_device_count={devices}",
        # The test processes already fill the cores; each splitting its small products over all of them loses.
        "--xla_cpu_multi_thread_eigen=false",
        "--xla_backend_optimization_level=0",
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_llvm_disable_expensive_passes=true",
    ]
    # Newer versions of jaxlib do not know this flag, and end the process for it.
    if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
        flags.append("--xla_cpu_use_fusion_emitters=false")
    return " ".join(flags)
