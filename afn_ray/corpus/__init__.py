"""Files in, documents out, with losses counted in bytes. Knows nothing of tokens."""
