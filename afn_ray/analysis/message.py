"""A verdict as a short message for a phone: what broke, what moved, and where the page is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import pyarrow.compute as pc

from afn_ray.analysis import verdict
from afn_ray.analysis.audit import Audit, by_state, state_in_words
from afn_ray.analysis.learned import UsualRange
from afn_ray.analysis.verdict import BROKEN, Rule
from afn_ray.reduce import compare
from afn_ray.reduce.compare import Comparison
from afn_ray.text import visible

MOST_RULES, MOST_REASONS, MOST_MOVERS = 4, 2, 3
"""Largest number of broken limits, of reasons and of moved types in a message."""
MOST_PAGE_CHARS = 200
"""Longest URL of a page in a message, in characters."""
MOST_ANSWER_CHARS = 300
"""Longest state of a night in a message, with the reason why it was accepted, in characters."""
ACTIVE = {ord(c): ord(c) + 0xFEE0 for c in "\\`*_[]<>#|~@&!$"}
"""Characters with a meaning in Markdown or in a chat, and their full-width forms, without one."""
IN_LINK = re.compile(r"(?<=\w)([.:])(?=[\w/])")
"""Marks inside a word that make it a link."""
WORD_JOINER = "\u2060"
"""Invisible character, after which a mark makes no link."""


class Message(NamedTuple):
    """A message in plain text that is also Markdown; its words from the corpus are inert."""

    title: str
    body: str


def message(
    found: Audit, page: str | None, usual: Mapping[str, UsualRange] | None = None
) -> Message:
    """The message about the night ``found``; ``page`` is the URL of its page, if it has one.

    ``usual`` has the usual range of limits by name, where earlier nights tell.
    """
    day = "" if found.partition is None else f" {found.partition}"
    title = f"afn audit {found.state}: {inert(found.series, 60)}{day}"
    lines = [inert(state_in_words(found), MOST_ANSWER_CHARS), "", *_unjudged(found)]
    lines += [*_broken(found, usual or {}), ""]
    if found.comparison is not None:
        lines += [*_movers(found.comparison, found.layer), ""]
    if page is not None:
        lines.append(page)
    body = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
    return Message(title, body)


def inert(text: str, most_chars: int) -> str:
    """``text`` that no service takes for markup, a mention or a link, cut after ``most_chars``."""
    shown = visible(text)
    if len(shown) > most_chars:
        shown = shown[: most_chars - 1] + "…"
    return IN_LINK.sub(rf"\1{WORD_JOINER}", shown.translate(ACTIVE))


def _unjudged(found: Audit) -> Iterator[str]:
    """The first reasons why limits were not judged, as list items."""
    reasons = list(verdict.reasons(found.rules))
    for reason in reasons[:MOST_REASONS]:
        yield f"- not judged: {inert(reason, 120)}"
    if len(reasons) > MOST_REASONS:
        yield f"- and {len(reasons) - MOST_REASONS} more reasons"


def _broken(found: Audit, usual: Mapping[str, UsualRange]) -> Iterator[str]:
    """The first broken limits, as list items."""
    broken = [rule for rule in by_state(found.rules) if rule.state == BROKEN]
    for rule in broken[:MOST_RULES]:
        where = "" if rule.where is None else f": {inert(rule.where, 50)}"
        yield (
            f"- {rule.key} {verdict.value_text(rule)}, {_against(rule, usual.get(rule.key))}{where}"
        )
    if len(broken) > MOST_RULES:
        yield f"- and {len(broken) - MOST_RULES} more"


def _against(rule: Rule, usual: UsualRange | None = None) -> str:
    """The limit that ``rule`` broke, how far its value is beyond, and what is ``usual``."""
    if rule.usual is not None:
        return verdict.usual_text(rule.usual)
    limit = rule.limit.fail
    assert isinstance(limit, int | float)
    number = f"{limit:,}" if rule.limit.is_whole else f"{limit:g}"
    text = f"at least {number}" if rule.limit.is_minimum else f"at most {number}"
    if not rule.limit.is_minimum and rule.value is not None and limit > 0:
        text += f" ({rule.value / limit:.1f} times)"
    return text if usual is None else f"{text}, {verdict.usual_text(usual)}"


def _movers(comparison: Comparison, layer: int) -> Iterator[str]:
    """The words that moved most at ``layer``, then the most frequent new and vanished ones."""
    movers = comparison.movers_to_read
    movers = compare.whole_words(movers.filter(pc.equal(movers["layer"], layer)))
    rows = compare.moved(movers).slice(0, MOST_MOVERS).to_pylist()
    for status in ("new", "vanished"):
        some = movers.filter(pc.equal(movers["status"], status))
        rows += some.slice(0, MOST_MOVERS - len(rows)).to_pylist()
    for row in rows:
        text = inert(row["text"].strip(), 30)
        if row["status"] == "both":
            before, now = (f"{row[f'share_high_{run}']:.0%}" for run in "ab")
            yield f"- {text}: HIGH {before} before, {now} now"
        else:
            n = row["n_b"] if row["status"] == "new" else row["n_a"]
            yield f"- {text}: {row['status']}, {n:,} times"
