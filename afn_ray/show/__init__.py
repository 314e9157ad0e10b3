"""Results for people: runs in; tables, charts, pages and a SQL prompt out. Writes nothing to a
store.
"""
