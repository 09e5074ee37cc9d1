"""Post-training, one file for each stage: a choice of batches and objective for the one loop."""
