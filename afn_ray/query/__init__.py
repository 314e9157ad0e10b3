"""The only door to DuckDB: SQL and a run in, rows out.

Queries run in a separate process that cannot write.
"""
