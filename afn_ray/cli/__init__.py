"""The `afn` command: arguments in, one call, an exit code out. Holds no rule of the product."""
