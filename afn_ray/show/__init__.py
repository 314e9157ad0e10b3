"""Results for people: finished runs in; terminal tables, charts, pages and a SQL prompt out. Writes nothing to a store."""
