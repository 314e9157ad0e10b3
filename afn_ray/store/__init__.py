"""The only door to fsspec, and the files of a store: shards, runs, checks, garbage collection."""
