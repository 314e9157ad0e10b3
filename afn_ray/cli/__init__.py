"""The `afn` command: arguments in, one call, an exit code out. Contains no product logic."""
