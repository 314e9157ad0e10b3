"""Documents in, packed batches of tokens out. Knows nothing of models."""
