"""Teachers: which checkpoints they are, the models that run, and a cache."""
