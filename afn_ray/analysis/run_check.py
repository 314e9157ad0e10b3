"""Check one run: its plan, its files, and its tables against its shards."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pyarrow as pa

from afn_ray import kept, token_rows
from afn_ray.analysis import recount, rows, salience_check, vector_check
from afn_ray.analysis.findings import Finding, read_listed, without_uri
from afn_ray.analysis.shard_check import CheckedShard
from afn_ray.analysis.stored_types import (
    has_decomposed_forms,
    texts_of,
    with_classes,
    without_added,
    without_forms,
)
from afn_ray.analysis.table_difference import difference
from afn_ray.corpus_values import FileSlice, Shard
from afn_ray.errors import StoreError
from afn_ray.fingerprints import fingerprint
from afn_ray.measure import Measure, StoredMeasure, without_id
from afn_ray.query import database
from afn_ray.reduce import (
    duplicates,
    group_drift,
    kept_columns,
    lexicon,
    losses,
    near_duplicates,
    screen,
    tree,
)
from afn_ray.reduce.shards import CommittedShards
from afn_ray.reduce.tables import shards_table
from afn_ray.store import (
    blocks,
    checksums,
    layout,
    manifest,
    orphans,
    shard_files,
    storage,
    uris,
    verdicts,
)
from afn_ray.store.commits import Commit, describe_makers, provenance_of
from afn_ray.store.layout import ShardKey
from afn_ray.store.orphans import Age, Orphan
from afn_ray.store.plans import read_shards


class RunCheck:
    """One run: its plan, and the check of its tables against its shards."""

    def __init__(self, store: str, name: str) -> None:
        self.folder = manifest.RunFolder(uris.join(store, "runs", name), store, name, {})
        self.findings: list[Finding] = []
        self.shards: list[Shard] = []
        self.measure: Measure | None = None  # None: its plan cannot be read, or is no measure
        self.measure_id = ""
        self._stored_measure: StoredMeasure = {}
        self._config: dict[str, Any] = {}
        self.num_files = self.num_bytes = 0
        self.proved = False
        self.makers: dict[str, int] = {}  # number of shards by what measured them
        uri = self.folder.uri
        self._redo = f"delete {uri}/run.json and give its 'afn run' command again: it reduces anew"
        self._begin_again = f"delete {uri} and give 'afn run' again"
        self._run_json = uris.join(uri, "run.json")
        self._plan = uris.join(uri, "plan.parquet")
        self.complete = storage.exists(self._run_json)
        if not storage.exists(self._plan):
            if self.complete:
                self._find("missing", self._plan, "there is no such file", self._begin_again)
            return  # without either file, the run crashed before it began
        if self.complete:
            try:
                self.folder = manifest.find_run(uri)
            except StoreError as error:
                self._find("damaged", self._run_json, without_uri(error, self._run_json))
        self._check_mark()
        if self._check_files():
            self._read_plan()

    def _check_mark(self) -> None:
        """Check the mark that the run was audited, and the verdict on it."""
        try:
            manifest.is_audited(self.folder)
        except StoreError as error:
            mark = uris.join(self.folder.uri, "audited.json")
            advice = "delete it: the next audit judges the run's step again"
            self._find("damaged", mark, without_uri(error, mark), advice)
        try:
            verdicts.read_verdict(self.folder)
        except StoreError as error:
            uri = uris.join(self.folder.uri, verdicts.VERDICT)
            advice = "delete it: the history computes its figures again, and knows no verdict"
            self._find("damaged", uri, without_uri(error, uri), advice)
        try:
            verdicts.read_acceptance(self.folder)
        except StoreError as error:
            uri = uris.join(self.folder.uri, verdicts.ACCEPTED)
            advice = "delete it, and accept the run again: 'afn audit --accept'"
            self._find("damaged", uri, without_uri(error, uri), advice)
        for name in filter(verdicts.FIGURES.fullmatch, storage.list_names(self.folder.uri)):
            try:
                verdicts.read_figures_file(self.folder, name)
            except StoreError as error:
                uri = uris.join(self.folder.uri, name)
                advice = "delete it: the next audit that needs its figures finds them again"
                self._find("damaged", uri, without_uri(error, uri), advice)

    def _check_files(self) -> bool:
        """Check the files that run.json lists; False if the plan is damaged."""
        for name, entry in self.folder.info.get("tables", {}).items():
            file = entry.get("name") if isinstance(entry, dict) else None
            if not isinstance(file, str) or "/" in file:
                self._find("damaged", self._run_json, f"its table {name} is {entry!r}")
                continue
            is_plan = name == "plan"
            advice = self._begin_again if is_plan else self._redo
            finding = self._check_file(self._table_uri(name), entry, advice)
            if finding is not None:
                self.findings.append(finding)
                if is_plan:
                    return False
        return True

    def _check_file(self, uri: str, entry: Mapping[str, Any], advice: str) -> Finding | None:
        """Check and count the file at ``uri``; ``entry`` is what run.json has on it."""
        data, finding = read_listed(uri, entry, advice)
        self.num_files += 1
        self.num_bytes += len(data)
        if finding is None and blocks.checksums(data) != entry.get("crc32"):
            message = f"its blocks do not have the CRC-32 that {self._run_json} lists; {advice}"
            return Finding("damaged", uri, message)
        return finding

    def _read_plan(self) -> None:
        try:
            self.shards, header = read_shards(self.folder)
        except StoreError as error:
            self._find("damaged", self._plan, without_uri(error, self._plan), self._begin_again)
            return
        self._stored_measure = header["measure"]
        self.measure_id = fingerprint(self._stored_measure)
        self._config = header["config"]
        self._frozen = header.get("frozen", [])
        try:
            self.measure = Measure.of_dict(self._stored_measure)
        except checksums.DAMAGES as error:
            message = f"its measure is not what afn-ray writes: {error!r}"
            self._find("damaged", self._plan, message, self._begin_again)
        self._check_plan()

    @property
    def record(self) -> str:
        """The rows of tokens that the run keeps, by its plan."""
        return token_rows.record_of(self._config)

    def _find(self, kind: str, uri: str, message: str, advice: str | None = None) -> None:
        self.findings.append(Finding(kind, uri, f"{message}; {advice or self._redo}"))

    def _check_plan(self) -> None:
        times_listed = Counter(shard.id for shard in self.shards)
        for shard_id, times in times_listed.items():
            if times > 1:
                message = f"it lists shard {shard_id} {times} times"
                self._find("plan", self._plan, message, self._begin_again)
        if self.findings:
            return
        slices = [piece for shard in self.shards for piece in shard.slices]
        slices.sort(key=lambda piece: (piece.uri, piece.start))
        is_limited = self._config.get("limit") is not None
        for uri, pieces in itertools.groupby(slices, key=lambda piece: piece.uri):
            may_end_early = is_limited and uri == slices[-1].uri
            for message in _gaps(pieces, may_end_early=may_end_early):
                self._find("plan", self._plan, message, self._begin_again)

    def orphans(self, files: Iterable[storage.StoredFile], age: Age) -> Iterator[Orphan]:
        """The files of ``files``, the run's folder, that the run does not name.

        Yields nothing for an incomplete run.
        """
        if not self.folder.info:
            return
        named = orphans.names_of(self.folder)
        for file in files:
            name = file.uri.rpartition("/")[2]
            of_run = layout.LEASE.fullmatch(name) or verdicts.FIGURES.fullmatch(name)
            if name not in named and not of_run:
                yield age.orphan(file, True)

    def check(self, checked: Mapping[ShardKey, CheckedShard], memory_limit: str) -> None:
        """Compare the complete run with its shards.

        Damage of a shard is reported with the shard, and leaves the run unproved.
        """
        try:
            self._check(checked, memory_limit)
        except (StoreError, *checksums.DAMAGES) as error:
            message = str(error)
            if not isinstance(error, StoreError):
                message = f"it is not what afn-ray writes: {error!r}"
            self._find("tables", self.folder.uri, message)
            self.proved = False

    def _check(self, checked: Mapping[ShardKey, CheckedShard], memory_limit: str) -> None:
        info = self.folder.info
        if not info or not self.shards:
            return
        self._check_run_json()
        given_up_ids = {entry["shard"] for entry in info.get("quarantined", [])}
        kept = [shard for shard in self.shards if shard.id not in given_up_ids]
        given_up = [shard for shard in self.shards if shard.id in given_up_ids]
        found = [checked.get((self.measure_id, shard.id)) for shard in kept]
        commits = self._commits_of(kept, found)
        provenance = provenance_of(commits)
        self.makers = describe_makers(provenance)
        if self.findings or any(one is None or one.findings for one in found):
            return
        if info.get("makers", self.makers) != self.makers:
            message = f"its makers are {info['makers']}, but its shards give {self.makers}"
            self._find("tables", self._run_json, message)
        if info.get("provenance", provenance) != provenance:
            message = "its provenance is not that of its shards' commits"
            self._find("tables", self._run_json, message)
        assert self.measure is not None  # else there is a finding
        try:
            shards = self._check_copies(commits, [shard.num_bytes for shard in kept])
            if totals := self._wrong_totals(shards, given_up):
                self._find("tables", self._run_json, totals)
            self._check_tables(self.measure, shards, memory_limit)
        except StoreError as error:
            self._find("tables", self.folder.uri, str(error))
        self.proved = not self.findings

    def _check_copies(self, commits: Sequence[Commit], num_bytes: Sequence[int]) -> CommittedShards:
        """Check the run's copies and repeated ids; return its shards without what is left out."""
        columns = kept.parse(self._config.get("keep_columns") or "")
        shards = CommittedShards(self.folder.store, self.measure_id, commits, num_bytes, columns)
        choice = self._config.get("duplicates", duplicates.KEEP)
        found = duplicates.find(shards, choice)
        expected = found.figures.to_json()
        if self.folder.info.get("duplicates", expected) != expected:
            message = f"its duplicates are not those of its shards, which give {expected}"
            self._find("tables", self._run_json, message)
        if choice != duplicates.KEEP:
            names = self.folder.info["tables"].keys() & {"duplicates"}
            stored = {name: manifest.read_table(self.folder, name) for name in names}
            self._compare({"duplicates": found.table}, stored)
        return replace(shards, left_out=found.left_out, copies=found.copies)

    def _wrong_totals(self, shards: CommittedShards, given_up: Sequence[Shard]) -> str:
        """Difference between run.json's counts and the sums over its commits and given-up shards.

        Empty where there is none. The special tokens of a run with copies left out are those of its
        thresholds, which are checked with the tables.
        """
        commits, left_out = shards.commits, shards.left_out
        names = commits[0].counts if commits else ()
        totals = {name: sum(commit.counts[name] for commit in commits) for name in names}
        expected = {**losses.with_given_up(totals, given_up), "shards": len(commits)}
        if commits and len(left_out.docs):
            expected["documents"] -= len(left_out.docs)
            expected["tokens"] -= left_out.n_tokens
            thresholds = manifest.read_table(self.folder, "thresholds")
            expected["special"] = thresholds["n_special"][0].as_py()
        wrong = rows.differing(self.folder.info["counts"], expected)
        if not wrong:
            return ""
        return f"its counts are {wrong}, but its commits give {rows.only(expected, wrong)}"

    def _check_tables(self, measure: Measure, found: CommittedShards, memory_limit: str) -> None:
        """Compare the stored tables with recomputed ones, until there is a finding."""
        names = self.folder.info["tables"]
        stored = {name: manifest.read_table(self.folder, name) for name in names}
        shards = shards_table(self.measure_id, found.commits, found.num_bytes)
        self._compare({"shards": shards}, stored)
        if not self.findings and token_rows.is_complete(self.record):
            self._ask_duckdb(measure, memory_limit, found, stored)
        if not self.findings:
            vocabulary, files = stored["vocabulary"], stored["files"]
            reduced = self._reduced(measure, found, vocabulary, files)
            if not measure.tagged and self.folder.info.get("function_words") != lexicon.SOURCE:
                reduced, stored = map(self._without_lists, (reduced, stored))
            if has_decomposed_forms(stored):
                reduced, stored = without_forms(reduced), without_forms(stored)
            self._compare(reduced, stored)

    def _without_lists(self, tables: Mapping[str, pa.Table]) -> dict[str, pa.Table]:
        """The run's ``tables`` without what its closed-class words decide,
        where those here differ.
        """
        depend = {"word_vocabulary"}
        if group_drift.grouped_by_language(self.folder):
            depend.add("group_classes")
        found = {name: table for name, table in tables.items() if name not in depend}
        if "languages" in found:
            found["languages"] = found["languages"].drop_columns("has_list")
        return found

    def _check_run_json(self) -> None:
        """Check what run.json repeats of its plan."""
        info = self.folder.info
        given_up = {entry["shard"] for entry in info.get("quarantined", [])}
        if info["id"] != self.folder.id:
            self._find("misplaced", self._run_json, f"it is the run.json of run {info['id']}")
        if given_up - {shard.id for shard in self.shards}:
            message = "it names quarantined shards that its plan does not have"
            self._find("tables", self._run_json, message)
        measure = info["measure"]
        is_same = without_id(measure) == self._stored_measure
        if not is_same or measure.get("id") != self.measure_id:
            message = f"its measure is not {self.measure_id} of its plan"
            self._find("misplaced", self._run_json, message)
        if info["layers"] != self._stored_measure["layers"]:
            message = f"layers are {info['layers']}, not those of its measure"
            self._find("tables", self._run_json, message)

    def _commits_of(
        self, shards: Sequence[Shard], found: Sequence[CheckedShard | None]
    ) -> list[Commit]:
        """The commit of each shard that has one: the one that the run names, else the newest."""
        commits = []
        named = self._named_files()
        for shard, one in zip(shards, found, strict=True):
            if one is not None and one.commits:
                commits.append(self._commit_of(shard, one, named))
            elif one is None or not one.findings:
                folder = shard_files.shard_uri(self.folder.store, self.measure_id, shard.id)
                message = f"run {self.folder.uri} has a shard without a commit"
                self._find("missing", uris.join(folder, "commit.json"), message)
        return commits

    def _commit_of(self, shard: Shard, checked: CheckedShard, named: Collection[str]) -> Commit:
        folder = f"shards/{self.measure_id}/{shard.id}"
        for commit in checked.commits.values():
            if f"{folder}/{commit.files['tokens']['name']}" in named:
                return commit
        return checked.commits[max(checked.commits)]

    def _named_files(self) -> set[str]:
        """Token files that the run names; empty where its table is damaged."""
        try:
            return set(manifest.read_table(self.folder, "shards")["tokens_file"].to_pylist())
        except (StoreError, *checksums.DAMAGES):
            return set()

    def _table_uri(self, name: str) -> str:
        return uris.join(self.folder.uri, str(self.folder.info["tables"][name]["name"]))

    def _compare(self, expected: Mapping[str, pa.Table], stored: Mapping[str, pa.Table]) -> None:
        for name, table in expected.items():
            if name not in stored:
                self._find("missing", self._run_json, f"it lists no table {name}")
            elif differs := difference(stored[name], without_added(name, table, stored[name])):
                self._find("tables", self._table_uri(name), differs)

    def _reduced(
        self,
        measure: Measure,
        shards: CommittedShards,
        vocabulary: pa.Table,
        files: pa.Table,
    ) -> dict[str, pa.Table]:
        """Recompute the run's tables: reduce the summaries, which match the rows, and screen.

        The tokenizer and word lists that name and classify types may be missing here, or newer. So
        ``token``, ``text``, ``class`` and what says how sure it is come from the stored
        ``vocabulary``, and only its checksum vouches for them; classes that are tags are
        recomputed. The list of files left out of the corpus comes from the stored ``files``.
        """
        texts = texts_of(vocabulary)
        recorded = tree.RecordedSeries.of(measure)
        rules = tree.LabelRules(self._config["language"], self._config["sink_factor"], self._frozen)
        tables = tree.reduce_run(shards, recorded, texts, rules)
        tables["vocabulary"] = without_added("vocabulary", tables["vocabulary"], vocabulary)
        if not measure.tagged:
            tables |= with_classes(tables, vocabulary)
        tables["files"] = losses.files_table(shards, self.shards, losses.skipped_files(files))
        if shards.kept:
            tables["kept"] = kept_columns.kept_table(shards)
        near = self._config.get("near_duplicates")
        if near is not None and find_spec("rensa") is not None:  # else its checksum vouches for it
            found = near_duplicates.find(shards, near, texts.readable)
            tables["near_duplicates"] = found
        if worst := self._config.get("screen"):
            by_group = self._config.get("thresholds_by") == "group"
            language = self._config["language"]
            by = self._config.get("group_by")
            words = self._has_comparable_words(measure)
            asked = screen.Asked(worst, by, by_group, language, measure.tagged, words)
            tables |= screen.scan_run(shards, measure.layers, tables, texts.readable, asked)
            newer = {"strange", "copied", "salience"}
            for name in newer - self.folder.info["tables"].keys():
                del tables[name]  # the run is older
        return tables

    def _has_comparable_words(self, measure: Measure) -> bool:
        """True if the run has a table of words, and not by other classes, which make other rows."""
        of_same_classes = self.folder.info.get("function_words") == lexicon.SOURCE
        return "word_vocabulary" in self.folder.info["tables"] and (
            measure.tagged or of_same_classes
        )

    def _ask_duckdb(
        self,
        measure: Measure,
        memory_limit: str,
        shards: CommittedShards,
        stored: Mapping[str, pa.Table],
    ) -> None:
        """Recompute thresholds and counts from the rows, in SQL independent of ``reduce``."""
        with database.open_run(
            self.folder.uri, memory_limit=memory_limit, timeout_s=database.MAX_TIMEOUT_S
        ) as run:
            ((got,),) = run.sql("SELECT count(*) FROM tokens").fetchall()
            if got != shards.n_tokens:
                message = f"DuckDB reads {got} tokens of {shards.n_tokens}"
                self._find("tables", self._table_uri("shards"), message)
                return
            if "languages" in self.folder.info["tables"]:
                wrong = run.sql(recount.LANGUAGES_SQL).fetchall()
                self._find_wrong_rows("languages", "language", None, wrong)
            for layer in measure.layers:
                self._recount_layer(run, layer)
            for layer in measure.neuron_layers:
                wrong = run.sql(recount.neurons_sql(layer, bool(measure.neurons_above)))
                self._find_wrong_rows("neurons", "neuron", layer, wrong.fetchall())
            if measure.mean_types:
                for table, message in vector_check.wrong_means(run, shards, measure, stored):
                    self._find("tables", self._table_uri(table), message)

    def _recount_layer(self, run: database.Run, layer: int) -> None:
        sink_factor = float(self._config["sink_factor"])
        recomputed = run.sql(recount.thresholds_sql(layer), [sink_factor]).to_arrow_table()
        names = ", ".join(recomputed.column_names)
        stored = run.sql(
            f"SELECT {names} FROM thresholds WHERE layer = {layer} ORDER "  # noqa: S608
            "BY population"
        )
        if differs := difference(stored.to_arrow_table(), recomputed):
            self._find("tables", self._table_uri("thresholds"), f"layer {layer}: {differs}")
            return
        wrong = run.sql(recount.vocabulary_sql(layer))
        self._find_wrong_rows("vocabulary", "token_id", layer, wrong.fetchall())
        is_checked = "salience" in self.folder.info["tables"] and not self.findings
        if is_checked and (differs := salience_check.wrong_type(run, layer)):
            self._find("tables", self._table_uri("salience"), f"layer {layer}: {differs}")
        if "word_vocabulary" in self.folder.info["tables"]:
            wrong = run.sql(recount.word_vocabulary_sql(layer))
            self._find_wrong_rows("word_vocabulary", "word", layer, wrong.fetchall())
            if not self.findings and (differs := salience_check.wrong_word(run, layer)):
                self._find(
                    "tables", self._table_uri("word_vocabulary"), f"layer {layer}: {differs}"
                )

    def _find_wrong_rows(
        self, table: str, key: str, layer: int | None, wrong: Sequence[Sequence[object]]
    ) -> None:
        if wrong:
            counted = {"neurons": "neurons", "word_vocabulary": "words"}.get(table, "tokens")
            where = "" if layer is None else f"layer {layer}: "
            message = (
                f"{where}{len(wrong)} rows are here or in DuckDB's count of the {counted}, "
                f"not in both; the first is of {key} {wrong[0][0]}"
            )
            self._find("tables", self._table_uri(table), message)


def _gaps(pieces: Iterable[FileSlice], *, may_end_early: bool) -> Iterator[str]:
    """Sentences on parts of one file that ``pieces``, by their starts, read twice or never."""
    end = 0
    for piece in pieces:
        if piece.start != end:
            what = "twice" if piece.start < end else "never"
            yield (
                f"it reads part of {piece.uri} {what}: a slice starts at {piece.start}, expected "
                f"{end}"
            )
        end = piece.end
    if piece.format != "parquet" and end != piece.size and not may_end_early:
        yield (
            f"it reads part of {piece.uri} never: its last slice ends at {end}, the file at "
            f"{piece.size}"
        )
