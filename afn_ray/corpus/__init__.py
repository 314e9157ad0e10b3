"""Files in, documents out, with what was lost counted in bytes. Knows nothing of tokens."""
