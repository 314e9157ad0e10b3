"""What a package that brings its own signals imports; the entry-point group has the same name."""

from afn_ray.model.signals import Attention, Signal, Site, Strength, find_signals, known, norm

__all__ = ["Attention", "Signal", "Site", "Strength", "find_signals", "known", "norm"]
