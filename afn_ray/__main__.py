"""``python -m afn_ray`` is ``afn``."""

from afn_ray.cli.commands import command

command()
