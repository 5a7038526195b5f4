"""What training computes with: compiled loops, optimizers, batches made ready."""
