"""The `afn` command: arguments in, one call, an exit code out. Holds no rule of the product."""

from afn_ray.cli.commands import command, main

__all__ = ["command", "main"]
