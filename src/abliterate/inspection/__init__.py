"""Reading what was done to a checkpoint: a pair of checkpoints held against each other, from files alone."""
