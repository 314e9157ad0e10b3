"""Outdated commits of shards that stay in a store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from afn_ray.errors import StoreError
from afn_ray.store import layout, manifest, shard_files, storage
from afn_ray.store.layout import ShardKey


@dataclass(frozen=True, slots=True)
class Leftover:
    """An outdated commit of a shard, and its files.

    Its generation is too old for any run to refer to it, although a kept run lists the shard.
    """

    place: ShardKey
    files: tuple[storage.StoredFile, ...]


def find_leftovers(
    store: str,
    there: layout.StoreFiles,
    planned: Mapping[str, set[ShardKey]],
    generations: Mapping[ShardKey, int],
) -> Iterator[Leftover]:
    """Outdated commits of shards that stay, unless a kept run names them.

    A kept run names an outdated commit only if it read the commit just before a gc condemned it.
    ``planned`` are the shards of each kept run; ``generations`` are the valid generations of all
    shards that stay.
    """
    outdated = _outdated_generations(there, generations)
    if not outdated:
        return
    named: set[str] = set()
    for name, places in planned.items():
        shared = places & outdated.keys()
        if not shared:
            continue
        run = manifest.open_folder(store, name)
        if run.info:
            named.update(manifest.read_table(run, "shards")["tokens_file"].to_pylist())
        else:  # an incomplete run may be about to name them
            for place in shared:
                del outdated[place]
    for place, numbers in outdated.items():
        folder = shard_files.shard_uri(store, *place).removeprefix(f"{store}/")
        by_name = {file.name: file for file in there.shards[place]}
        for number in numbers:
            try:
                commit = shard_files.read_commit(store, *place, number)
            except StoreError:  # 'afn verify' reports it
                continue
            if commit is None or f"{folder}/{commit.files['tokens']['name']}" in named:
                continue
            names = [layout.commit_name(number), *commit.file_names]
            files = tuple(by_name[name] for name in names if name in by_name)
            yield Leftover(place, files)


def _outdated_generations(
    there: layout.StoreFiles, generations: Mapping[ShardKey, int]
) -> dict[ShardKey, list[int]]:
    """The generations of each shard's commits that are older than its valid generation."""
    outdated: dict[ShardKey, list[int]] = {}
    for place in there.shards.keys() & generations.keys():
        for file in there.shards[place]:
            generation = layout.generation_of(file.name)
            if generation is not None and generation < generations[place]:
                outdated.setdefault(place, []).append(generation)
    return outdated
