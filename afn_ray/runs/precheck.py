"""Find errors in a request within a second, before torch, transformers or Ray is loaded."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from afn_ray.config import BUILT_IN_SIGNALS, SIGNAL_GROUP, RunConfig, resolve_layers, signal_names
from afn_ray.corpus import listing
from afn_ray.errors import ConfigError, ModelError
from afn_ray.option_rules import AUTO_LANGUAGE
from afn_ray.reduce import near_duplicates
from afn_ray.runs import address
from afn_ray.store import disk, manifest, probes, uris
from afn_ray.text import nearest
from afn_ray.tokens import languages

MOST_CONFIG_BYTES = 16 << 20
"""Largest config.json that is read here, in bytes."""
DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Keys of config.json that hold the number of blocks, by model family."""
GPU_DRIVERS = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""Files of GPU drivers: NVIDIA's, Windows' under WSL, and AMD's.

Without any of them torch finds no GPU.
"""


def check_run(config: RunConfig, *, reduce_only: bool = False) -> None:
    """Raise ``ConfigError`` for what a run of ``config`` would refuse later.

    Only this machine is checked, not a hub, a bucket or a cluster. ``reduce_only``: the run needs
    no device.
    """
    if config.near_duplicates is not None:
        near_duplicates.check_package()
    if config.language == AUTO_LANGUAGE:
        languages.identity()
    is_here = config.executor == "inline"
    if not is_here and (where := address.of_cluster(config.address)) is not None:
        address.check(where)
    else:
        is_here = True
    check_signals(config.signals)
    check_device(config.device if is_here and not reduce_only else "auto")
    depth = check_model(config.model, config.revision, trust_remote_code=config.trust_remote_code)
    if depth is not None:
        resolve_layers(config.layers, depth)
    if not uris.is_process_memory(config.store) and uris.is_local(config.store):
        probes.try_writable(uris.absolute(config.store))
    places = [place for place in config.corpus if uris.is_local(place)]
    if places:
        options = config.read_options
        files, _ = listing.list_files([uris.absolute(place) for place in places], options)
        listing.check_columns(files, options)
    if config.thresholds is not None and uris.is_local(config.thresholds):
        manifest.find_run(config.thresholds)


def check_frozen(config: RunConfig) -> None:
    """Raise ``ConfigError`` where ``config`` names thresholds that ``afn audit --frozen`` sets."""
    if config.thresholds is not None:
        raise ConfigError(
            f"thresholds is {config.thresholds!r} already; leave it out of the config, or --frozen"
        )


def check_question(
    run_uri: str,
    model: str | None,
    *,
    signals: str | None = None,
    layers: str | None = None,
    layer: int | None = None,
) -> None:
    """Raise ``ConfigError`` for a wrong question to a run and its model.

    ``afn explain`` and ``afn claims --masking`` ask such questions.
    """
    run = manifest.find_run(run_uri)
    if layer is not None and layer not in run.info["layers"]:
        raise ConfigError(
            f"layer {layer} was not recorded; the run has {', '.join(map(str, run.info['layers']))}"
        )
    if signals is not None:
        check_signals(signals)
    if layers is not None:
        resolve_layers(layers, run.info["model"]["depth"])
    if model is not None:
        check_model(model, None)


def check_signals(spec: str) -> None:
    """Raise ``ConfigError`` for a signal that neither afn-ray nor an installed package has."""
    names = signal_names(spec)
    if all(name in BUILT_IN_SIGNALS for name in names):
        return  # reading what is installed takes milliseconds
    known = [*BUILT_IN_SIGNALS, *sorted(point.name for point in entry_points(group=SIGNAL_GROUP))]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"there is no signal {name!r}{nearest([name], known)}; there are {', '.join(known)}"
            )


def check_device(device: str) -> None:
    """Raise ``ModelError`` for a GPU without a driver on this machine."""
    if device == "cuda" and not any(Path(driver).exists() for driver in GPU_DRIVERS):
        raise ModelError(
            "device is cuda, but there is no driver of a GPU here; use --device cpu, or leave it "
            "out"
        )


def check_model(name: str, revision: str | None, *, trust_remote_code: bool = False) -> int | None:
    """Number of blocks of the model in the folder ``name``; None: not known here.

    It is known only from a config.json, and not where the model brings its own code. Raises
    ``ModelError`` for a path without a model.
    """
    path = Path(name).expanduser()
    try:
        is_there = path.exists()
        is_folder = path.is_dir()
    except OSError as error:
        raise ModelError(f"no model at {name[:60]}...: {error.strerror}") from error
    if revision is not None and is_there:
        raise ModelError(
            f"{name} is on this disk, and revision {revision!r} is for hub models; leave it out"
        )
    try:
        for file in path.iterdir() if is_folder else [path]:
            disk.check_ends(file)
    except OSError as error:
        raise ModelError(f"no model at {name}: {error.filename}: {error.strerror}") from error
    if not is_folder:
        is_path = is_there or name.startswith(("/", ".", "~")) or name.count("/") > 1
        if is_path and not (path.suffix == ".gguf" and is_there):
            raise ModelError(
                f"no model at {name}: expected a folder with config.json, or a .gguf file"
            )
        return None
    if not (path / "config.json").is_file():
        inside = sorted(p.parent.name for p in path.glob("*/config.json"))
        hint = f"; its folder {inside[0]} has one: give {path / inside[0]}" if inside else ""
        raise ModelError(f"no model at {name}: {path} has no config.json{hint}")
    if not any(p.suffix in (".safetensors", ".bin") for p in path.iterdir()):
        raise ModelError(f"no weights at {name}: {path} has no .safetensors file")
    return None if trust_remote_code else _depth(name, path / "config.json")


def _depth(name: str, file: Path) -> int | None:
    """Number of blocks by the config.json ``file``; None: not known here."""
    if file.stat().st_size > MOST_CONFIG_BYTES:
        return None  # the check at load has a limit of its own
    try:
        config: Any = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"model {name} cannot be loaded: its config.json is not JSON: {error}"
        ) from error
    except OSError as error:
        raise ModelError(
            f"model {name} cannot be loaded: {os.strerror(error.errno or 0)}: {file}"
        ) from error
    text = config.get("text_config", config) if isinstance(config, dict) else None
    if not isinstance(text, dict) or "auto_map" in config:
        return None
    values = [text.get(key) for key in DEPTH_KEYS]
    found = [value for value in values if isinstance(value, int)]
    return found[0] if len(found) == 1 else None


def normalised(config: RunConfig) -> RunConfig:
    """``config`` with absolute paths and URIs, which workers on other machines see too."""
    return replace(
        config,
        store=uris.absolute(config.store).rstrip("/"),
        corpus=tuple(map(uris.absolute, config.corpus)),
        model=uris.absolute(config.model) if Path(config.model).exists() else config.model,
        scratch=None if config.scratch is None else uris.absolute(config.scratch),
        thresholds=None if config.thresholds is None else uris.absolute(config.thresholds),
    )
