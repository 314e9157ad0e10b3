"""Results for people. In: runs. Out: tables, charts, pages, a SQL prompt. Writes to no store."""
