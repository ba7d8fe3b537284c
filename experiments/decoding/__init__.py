"""Texts from a trained model: prompts in, greedy, beam search or drawing, predictions out."""
