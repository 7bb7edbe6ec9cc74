"""Configuration, losses, optimisation, checkpoints and the training loop."""
