"""Public interface for packages with signals of their own.

Their entry-point group has the same name, ``afn_ray.signals``.
"""

from afn_ray.model.signals import Attention, Signal, Site, Strength, find_signals, known, norm

__all__ = ["Attention", "Signal", "Site", "Strength", "find_signals", "known", "norm"]
