"""``python -m afn_ray`` is ``afn``."""

from afn_ray.cli import command

command()
