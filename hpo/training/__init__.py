"""Training: the loop, the stack's contract, optimizers, batches and metrics."""
