"""Facts of a run, and cautions that its figures do not show, in words."""

from __future__ import annotations

import re
from collections.abc import Iterator

from afn_ray import token_rows
from afn_ray.reduce import duplicates, losses, near_duplicates, selected
from afn_ray.run_info import RunInfo
from afn_ray.runs import precision
from afn_ray.show import provenance
from afn_ray.show.figures import figure, number
from afn_ray.show.summary import RunSummary
from afn_ray.store import checksums
from afn_ray.store.commits import COMPOSED, num_measured
from afn_ray.text import count

GENERIC = re.compile(
    r"models?|weights|final|export|output|snapshots?|checkpoint.*|[0-9a-f]{40}", re.IGNORECASE
)
"""Names of folders that do not identify a model."""


def model_title(name: str) -> str:
    """Short name of the model ``name`` (a hub name, a folder or a GGUF file), without its path."""
    parts = [part for part in re.split(r"[/\\]", name) if part not in ("", ".", "..", "~")]
    if not parts or (len(parts) == 2 and not name.startswith(("/", ".", "~"))):
        return name  # a hub name, or a folder relative to the run's working directory
    for part in parts:
        if part.startswith("models--"):  # the hub's cache
            return part.removeprefix("models--").replace("--", "/")
    for at in reversed(range(len(parts))):
        if not GENERIC.fullmatch(parts[at]):
            return "/".join(parts[at:])
    return parts[-1]


def facts(summary: RunSummary) -> list[tuple[str, str]]:
    """Facts about the run, names and values for people.

    Raises ``StoreError`` for a damaged run.json.
    """
    with checksums.named_damage(summary.uri):
        return _facts(summary)


def _facts(summary: RunSummary) -> list[tuple[str, str]]:
    info = summary.info
    counts, model, size = info["counts"], info["model"], summary.bytes_per_token
    num_composed = 0  # copies of earlier columns, maybe beside measured ones
    for kind in info.get("provenance", ()):
        num_composed += kind["shards"] if COMPOSED in kind["made_by"] else 0
    composed = f", {num_composed} with columns copied from the store" if num_composed else ""
    signals, classes = info["measure"]["signals"], ""
    if "labels" in info["measure"]:
        classes = f"of a type its most frequent tag in {info['measure']['labels']!r}"
    rows = [
        ("where", summary.uri),
        ("corpus", ", ".join(info["config"]["corpus"])),
        (
            "documents",
            f"{counts['documents']:,} = {num_measured(counts):,} measured + {counts['empty']:,} "
            f"empty + {counts['quarantined']:,} quarantined, in "
            f"{count(info['corpus']['files'], 'file')}",
        ),
        *_row_if_any("selected", selected.describe(info)),
        *_kept_rows(info),
        *_copies(info),
        ("lost", losses.describe(summary.losses) or "nothing"),
        *_row_if_any("replaced", losses.describe_replaced(summary.losses)),
        *_row_if_any("unknown", losses.describe_unknown(info)),
        (
            "tokens",
            f"{counts['tokens']:,}, of them {counts['special']:,} special (kept out of the "
            "thresholds)",
        ),
        (
            "model",
            f"{model_title(model['name'])} ({model['type']}, {count(model['depth'], 'layer')}, "
            f"{info['measure']['dtype']})",
        ),
        ("precision", precision.describe(precision.from_json(info["precision"]))),
        *provenance.facts(info),
        ("layers", ", ".join(str(k) for k in info["layers"]) + "  (0 = embeddings)"),
        *_row_if_any("classes", classes),
        *_row_if_any("languages", summary.languages),
        (
            "size",
            f"{size['tokens']:.2f} bytes a token in the tokens table, {size['all']:.2f} in all",
        ),
        *_row_if_any("signals", ", ".join(signals) if len(signals) > 1 else ""),
        (
            "padding",
            f"{summary.padding_share:.1%} of what the model saw was padding, filler or overlap",
        ),
        (
            "finished",
            f"{info['finished_at']}, {info['seconds']:,.0f} s, "
            f"{counts['shards'] - counts['shards_reused']} of {count(counts['shards'], 'shard')} "
            f"new{composed}",
        ),
    ]
    if missing := info.get("quarantined"):
        uris = ", ".join(one["uri"] for one in missing[:3])
        if len(missing) > 3:
            uris += ", ..."
        rows.append(
            (
                "missing",
                f"{len(missing)} of {count(len(missing) + counts['shards'], 'shard')}: {uris}",
            )
        )
    if summary.skipped:
        rows.append(("skipped", summary.skipped))
    return rows


def _row_if_any(name: str, value: str) -> list[tuple[str, str]]:
    """The fact ``name``; none for an empty ``value``."""
    return [(name, value)] if value else []


def _kept_rows(info: RunInfo) -> Iterator[tuple[str, str]]:
    """Rows of tokens that the run keeps, if not all."""
    record = token_rows.record_of(info["config"])
    if not token_rows.is_complete(record):
        yield "recorded", token_rows.describe(record)


def _copies(info: RunInfo) -> Iterator[tuple[str, str]]:
    """Facts about copies and repeated ids; none for a run that does not know them, or has none."""
    found = duplicates.figures_of(info)
    if found is None:
        return
    sentences = duplicates.describe(found, duplicates.choice_of(info))
    for name, sentence in zip(("copies", "repeated ids"), sentences, strict=True):
        if sentence:
            yield name, sentence
    if near := near_duplicates.describe(info):
        yield "near-copies", near


def cautions(summary: RunSummary) -> list[str]:
    """Limits of what the figures say; an indented line belongs to the line before it."""
    lines = []
    makers = summary.info.get("makers", {})
    if len(makers) > 1:
        lines.append(
            f"Its shards were measured in {len(makers)} ways (measured on): strengths differ in "
            "their last digits between them, and a token close to a threshold can change its label."
        )
    if summary.losses.any:
        lines.append(f"Lost, and in no figure: {losses.describe(summary.losses)}.")
    for layer in summary.layers:
        main = layer.thresholds["tokens"]
        line = (
            f"Layer {layer.layer}: Q3 lies {layer.q3_over_q2 - 1:.1%} above the median (CV "
            f"{layer.cv:.2f})"
        )
        if layer.idf_auc is not None:
            line += (
                f"; rarity alone tells HIGH from LOW with AUC {layer.idf_auc:.2f} (0.5 = not at "
                "all, 1 = always)"
            )
        if layer.special_mean is not None:
            line += (
                f"; special tokens have mean {figure(layer.special_mean)}, the others "
                f"{number(main['mean'])}"
            )
        lines.append(line + ".")
        if main["n_sinks"]:
            sinks = f"{main['n_sinks']:,} sinks over {main['sink_factor']:g} medians"
            lines.append(f"  {sinks}: compare medians, not means.")
    if all(layer.layer != 0 for layer in summary.layers):
        layers = [0, *(layer.layer for layer in summary.layers)]
        with_control = ",".join(map(str, layers))
        lines.append(
            "Layer 0 was not recorded: to see what the embeddings alone explain, give the same "
            f"'afn run' command with --layers {with_control}: only layer 0 is then measured."
        )
    lines.append("Never compare raw strengths across layers or models; compare ranks and shares.")
    return lines
