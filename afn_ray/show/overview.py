"""The summary of a run on a terminal: facts, thresholds, classes and cautions."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from afn_ray.show import provenance, run_facts
from afn_ray.show.figures import number
from afn_ray.show.summary import MAX_CLASSES, RunSummary, frequent_classes, ratio
from afn_ray.show.terminal_tables import print_whole, titled_table
from afn_ray.store import checksums
from afn_ray.text import count, printable


def render(summary: RunSummary, console: Console) -> None:
    """Print a run's facts, thresholds, class shares beside their control, and cautions."""
    with checksums.named_damage(summary.uri):
        _render(summary, console)


def _render(summary: RunSummary, console: Console) -> None:
    table = titled_table(f"Run {summary.info['id']}", "", "", left=2)
    table.columns[1].no_wrap, table.columns[1].overflow = False, "fold"
    table.show_header = False
    for name, value in run_facts.facts(summary):
        table.add_row(name, Text(printable(value)))
    console.print(table)
    render_thresholds(summary, console)
    render_classes(summary, console)
    render_caution(summary, console)
    command = provenance.shown_command(summary.info["config"])
    console.print("[bold]To repeat it[/bold]")
    # one line at any width, to be copied
    console.print(printable(command), markup=False, soft_wrap=True)


def render_thresholds(summary: RunSummary, console: Console) -> None:
    """Print the quartiles of every layer, with and without sinks."""
    table = titled_table(
        "Thresholds (a token at or above Q3 is HIGH)",
        "layer",
        "of",
        "tokens",
        "Q1",
        "Q2",
        "Q3",
        "max",
        "CV",
        "Q3/Q2",
        "sinks",
        left=2,
    )
    for facts in summary.layers:
        for population, row in facts.thresholds.items():
            if population != "tokens" and not row["n_sinks"]:
                continue
            main = population == "tokens"
            table.add_row(
                str(facts.layer),
                "all" if main else "no sinks",
                f"{row['n']:,}",
                *(number(row[q]) for q in ("q1", "q2", "q3", "max")),
                f"{ratio(row['sd'], row['mean']):.3f}",
                f"{ratio(row['q3'], row['q2']):.3f}",
                f"{row['n_sinks']:,}" if main else "",
            )
        if (row := facts.labels["tokens"]) != facts.thresholds["tokens"]:
            table.add_row(
                str(facts.layer),
                "frozen",
                f"{row['n']:,}",
                *(number(row[q]) for q in ("q1", "q2", "q3")),
                "",
                "",
                f"{ratio(row['q3'], row['q2']):.3f}",
                f"{row['n_sinks']:,}",
            )
    print_whole(table, console)
    if summary.is_frozen:
        shares = []
        for facts in summary.layers:
            row = facts.labels["tokens"]
            shares.append(f"layer {facts.layer}: {ratio(row['n_high'], row['n']):.1%}")
        console.print(
            "HIGH is decided by the frozen thresholds, of "
            f"{printable(str(summary.info['config']['thresholds']))}; tokens that are HIGH by "
            f"them: {', '.join(shares)}",
            markup=False,
            soft_wrap=True,
        )


def render_classes(summary: RunSummary, console: Console) -> None:
    """Print the HIGH share of each class at every layer, beside the embeddings as the control."""
    ordered = sorted(summary.layers, key=lambda f: (f.layer == 0, f.layer))
    shown = ordered[-max(2, (console.width - 20) // 21) :]
    heads = [f"layer {f.layer}" + (" (control)" if f.layer == 0 else "") for f in shown]
    unit = ordered[0].unit
    title = "Which classes are HIGH (share, 95 % interval)"
    if unit == "word":
        title = "Which classes of words are HIGH (strongest token; share, 95 % interval)"
    table = titled_table(title, "class", f"{unit}s", *heads)
    classes = ordered[0].shown_classes
    left_out = []
    if len(shown) < len(ordered):
        left_out.append(f"{len(ordered) - len(shown)} more layers")
    if len(classes) > MAX_CLASSES:
        left_out.append(count(len(classes) - MAX_CLASSES, "rarer tag"))
    if left_out:
        table.caption = f"and {' and '.join(left_out)}: afn show --json"
        table.caption_justify = "left"
    total = sum(c.n for c in classes)
    for at in frequent_classes(ordered[0]):
        of_layers = [facts.shown_classes[at] for facts in shown]
        shares = [f"{one.share:.3f} ({one.low:.3f}-{one.high:.3f})" for one in of_layers]
        table.add_row(Text(printable(classes[at].name)), f"{classes[at].n / total:.1%}", *shares)
    print_whole(table, console)


def render_caution(summary: RunSummary, console: Console) -> None:
    """Print the cautions."""
    lines = [
        "[bold]To be careful about[/bold]",
        *(escape(printable(line)) for line in run_facts.cautions(summary)),
    ]
    console.print("\n".join(lines), highlight=False, soft_wrap=True)
