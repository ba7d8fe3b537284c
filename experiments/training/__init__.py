"""Training: the step, its parts, and the loop around it."""
