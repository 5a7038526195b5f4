"""Device and precision, optimizers and sparse updates, prefetching, distributed training."""
