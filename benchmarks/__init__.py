"""What `lora_jax` costs, measured. Each module says what it measures, on what, and its command; results
are in `results/`.
"""
