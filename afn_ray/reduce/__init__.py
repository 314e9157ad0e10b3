"""Summaries of shards in; thresholds, vocabulary, neurons, screening and comparisons out. Knows
nothing of models.
"""
