"""One run from start to finish: a config in, a complete run out.

The room plans the corpus, assigns shards to workers, commits their results and has them reduced. It
knows nothing of how results are shown.
"""
