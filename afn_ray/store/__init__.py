"""The only door to fsspec, and what a store holds: shards, runs, and what collects or checks
them.
"""
