"""ids → weights: batches, objectives, optimizers, one loop, checkpoints; pretrain and sft are thin choices of them."""
