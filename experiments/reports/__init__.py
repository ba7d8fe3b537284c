"""Reports of finished runs: scores, cost beside full fine-tuning, provenance, pictures."""
