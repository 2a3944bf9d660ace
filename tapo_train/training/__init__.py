"""The training loop: rounds of questions, steps, checkpoints, warnings that end a run."""
