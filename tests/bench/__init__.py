"""Simulations and generators that users never run: ``python jobs/benchmark.py WHAT`` in a checkout.

The folder above is on ``sys.path`` of whoever imports this: pytest and ``jobs/benchmark.py`` see to
it. What users measure on their own machine is ``afn_ray.bench``.
"""
