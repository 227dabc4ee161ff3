"""Training: logical batches, the trainer, and the folder that a run leaves."""
