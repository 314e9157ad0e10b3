"""Benchmarks of generated data and simulations: ``python jobs/benchmark.py WHAT`` in a checkout.

Import this package with the folder ``tests`` on ``sys.path``, as pytest and ``jobs/benchmark.py``
do. The benchmarks for users are in ``afn_ray.bench``.
"""
