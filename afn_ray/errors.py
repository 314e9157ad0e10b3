"""The errors a caller can act on, sorted by what the caller does next, and how to print them
safely.

::

    AfnError                    the root; ``exit_code`` is what the command line returns
    |-- ConfigError         2   stop: the request is wrong; change it and call again
    |   |-- CorpusError     2   no such corpus, no such column, a path that cannot be read
    |   |-- ModelError      2   no such model, layer or device; a model that fails its self-check
    |   |-- StoreError      2   not writable, another measure, damaged, no such run
    |   `-- QueryError      2   SQL that is wrong, forbidden, too slow or too large
    |-- ShardError          1   try the shard again, then skip it: its attempt failed; the others go
    on
    |   |-- CorpusChanged   1   skip the shard: its file is not the one that was planned
    |   |-- OutOfMemory     1   try the shard again with fewer tokens at a time
    |   `-- HelperDied      1   try the shard again, alone: a process that its worker needs has died
    |-- Damaged             1   mend the store: what it holds is not what was committed; ``afn
    verify`` lists it
    |-- IncompleteRun       1   the run ended with shards missing; it lists them
    `-- Interrupted        75   stop, resumable: full disk, signal, no capacity; call again
        `-- Unavailable    75   try elsewhere or later: the store or the corpus does not answer

Every constructor takes the message alone, so that errors survive pickling between processes.
"""


class AfnError(Exception):
    """Root of the errors that afn-ray raises on purpose."""

    exit_code = 1


class ConfigError(AfnError):
    """The request is wrong; nothing was done."""

    exit_code = 2


class CorpusError(ConfigError):
    """The corpus cannot be listed or does not have what was asked for."""


class ModelError(ConfigError):
    """The model cannot be loaded, or fails the self-check at load."""


class StoreError(ConfigError):
    """The store cannot be used for this run."""


class QueryError(ConfigError):
    """The SQL is wrong, forbidden, or over its limits."""


class ShardError(AfnError):
    """One attempt at one shard failed; other shards are not concerned."""


class CorpusChanged(ShardError):
    """A file of the corpus is gone, or no longer what the plan saw; another try reads the same."""


class OutOfMemory(ShardError):
    """The device or the process had too little memory for a batch of the shard."""


class HelperDied(ShardError):
    """A process that tokenizes for a worker died; which shard's doing that was is not known."""


class Damaged(AfnError):
    """A store does not hold what was committed to it."""


class IncompleteRun(AfnError):
    """The run ended with shards missing."""


class Interrupted(AfnError):
    """The run stopped before its end and can be resumed by the same command."""

    exit_code = 75


class Unavailable(Interrupted):
    """A filesystem did not answer, however often it was asked; here and now, not for ever."""
