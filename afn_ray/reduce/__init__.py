"""Shard summaries in; thresholds, vocabulary, neurons, screening and comparisons out.

This package does not know models.
"""
