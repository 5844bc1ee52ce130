"""Training of the networks: the training loop, and the recipes of the embedded model, whose images are rendered."""
