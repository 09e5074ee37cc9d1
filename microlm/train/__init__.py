"""ids → weights: batches, objectives, optimizers, checkpoints, one loop; pretrain and sft choose."""
