"""Training: typed configs, the accelerate loop, and one task a kind of model."""
