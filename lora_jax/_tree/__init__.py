"""What stands at a leaf of our trees: nodes, methods, and `frozen` and `delta` side by side."""
