"""`python -m experiments plan`: what a sharded training step will need, found by compiling it from shapes
alone on virtual devices.

Nothing is allocated and nothing is run, so that a model of any size is planned on any machine. The parts:
`devices` (virtual ones), `models` (names and directories to architectures), `step` (the step, its shapes and
where they lie), `size`, `flops` and `collectives` (what is counted, each by itself), `accelerators` (whether
it fits), `claims` (LoRA's paper on GPT-3), `figures` (all of it as one dict) and `report` (the dict as
tables). Left out: time. No clock of this machine says how long a step takes on another.
"""
