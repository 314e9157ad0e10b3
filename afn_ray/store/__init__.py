"""The only door to fsspec, and the files of a store: shards, runs, checks, garbage collection.

* Files anywhere: ``uris``, ``fs_calls``, ``retry``, ``disk``, ``storage``, ``probes``; for a corpus
  ``corpus_files`` and ``readers``.
* What the files of a store contain: ``layout``, ``checksums``, ``blocks``, ``parquet``.
* Shards: ``records`` writes their tables, ``shard_files`` commits and reads them, ``commits``.
* Runs: ``plans``, ``run_claims``, ``manifest``, ``label_thresholds``, ``calibrations``.
* What is deleted: ``epochs``, ``retention``, ``leftovers``, ``garbage``, ``gc_report``,
``orphans``.
"""
