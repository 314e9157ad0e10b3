"""Tables of a run for other engines. In: a run and a target. Out: files that every engine reads.

It knows nothing of models and corpora, and writes to no store.
"""
