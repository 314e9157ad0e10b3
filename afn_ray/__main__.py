"""``python -m afn_ray`` runs ``afn``."""

from afn_ray.cli.commands import command

command()
