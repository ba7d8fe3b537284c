"""What is told of finished runs: scores, cost beside full fine-tuning, where results came from, pictures."""
