"""Training: the step, what it is made of, and the loop around it."""
