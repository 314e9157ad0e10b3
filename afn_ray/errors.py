"""The errors that afn-ray raises, sorted by what the caller does next.

::

    AfnError                    the root; ``exit_code`` is the exit status of the command
    |-- ConfigError         2   stop: the request is wrong; change it and call again
    |   |-- CorpusError     2   no such corpus, no such column, an unreadable path
    |   |-- ModelError      2   no such model, layer or device; a failed self-check
    |   |-- StoreError      2   not writable, another measure, damaged, no such run
    |   `-- QueryError      2   SQL that is wrong, forbidden, too slow or too large
    |-- ShardError          1   retry, then skip the shard: its attempt failed; others go on
    |   |-- CorpusChanged   1   skip the shard: its file differs from the planned one
    |   |-- CannotCompose   1   measure the shard as a whole: its stored columns do not fit together
    |   |-- OutOfMemory     1   retry the shard with fewer tokens in a batch
    |   |-- HelperDied      1   retry the shard alone: a helper process of its worker died
    |   `-- DeviceFault     1   retry the shard alone, in a new process: its worker's GPU failed
    |-- Damaged             1   repair the store: it differs from the commit; see ``afn verify``
    |-- IncompleteRun       1   the run ended with missing shards; the message lists them
    `-- Interrupted        75   stop, resumable: full disk, signal, no capacity, dead GPU; rerun
        `-- Unavailable    75   retry elsewhere or later: the store or the corpus does not answer

Every constructor takes the message alone, so that errors survive pickling between processes.
"""


class AfnError(Exception):
    """Root of the errors that afn-ray raises on purpose."""

    exit_code = 1


class ConfigError(AfnError):
    """The request is wrong; nothing was done."""

    exit_code = 2


class CorpusError(ConfigError):
    """The corpus cannot be listed, or lacks what was asked for."""


class ModelError(ConfigError):
    """The model cannot be loaded, or fails the self-check at load."""


class StoreError(ConfigError):
    """The store cannot be used for this run."""


class QueryError(ConfigError):
    """The SQL is wrong, forbidden, or over its limits."""


class ShardError(AfnError):
    """One attempt at one shard failed; other shards are not affected."""


class CorpusChanged(ShardError):
    """A file of the corpus is missing or differs from the plan; a retry finds the same."""


class CannotCompose(ShardError):
    """The columns that the store has of the shard do not fit together, or are damaged or gone."""


class OutOfMemory(ShardError):
    """The device or the process had too little memory for a batch of the shard."""


class HelperDied(ShardError):
    """A tokenizer process of a worker died; the shard that caused it is unknown."""


class DeviceFault(ShardError):
    """The device of a worker failed and may be unusable; the shard that caused it is unknown."""


class Damaged(AfnError):
    """A store does not hold what was committed to it."""


class IncompleteRun(AfnError):
    """The run ended with shards missing."""


class Interrupted(AfnError):
    """The run stopped early; the same command resumes it."""

    exit_code = 75


class Unavailable(Interrupted):
    """A filesystem did not answer after all retries; it may answer later or elsewhere."""
