"""The only door to DuckDB: SQL and a run in, rows out. A query runs in a process of its own and
cannot write.
"""
