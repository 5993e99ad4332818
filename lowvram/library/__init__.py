"""The model files on this machine: where they lie, what they are, which of them make a model."""
