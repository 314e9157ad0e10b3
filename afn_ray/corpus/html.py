"""The text of an HTML page, by resiliparse: the main content, within bounds of size and nesting."""

from __future__ import annotations

import re
from collections import Counter

from afn_ray.corpus.documents import INVALID
from afn_ray.corpus.streams import MARK

HTML_BYTES = 4 << 20
"""Largest page, in bytes. Crawlers cut pages at 1 to 5 MB."""
NESTING = 2_000
"""Most elements that are open at once. The extractor's time grows with the square of it."""
STAND_IN = "\ufdd0"
"""Character that stands for an invalid sequence in the extractor, which takes no surrogates."""

TAG = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9:-]*)")
NEVER_OPEN = frozenset(
    {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source",
     "track", "wbr", "p", "li", "dt", "dd", "tr", "td", "th", "option", "thead", "tbody", "tfoot"}
)  # fmt: skip
"""Elements that have no content, or that the next one of their kind closes."""


def html_text(body: bytes, charset: str) -> str:
    """The text of the page ``body``, with ``INVALID`` for invalid sequences.

    Without a ``charset`` the page's own is used, else the detected one. Raises ``ValueError`` for a
    page that exceeds a bound or has an unknown charset.
    """
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.encoding import detect_encoding, map_encoding_to_html5

    if len(body) > HTML_BYTES:
        raise ValueError(f"page of {len(body)} bytes is over the limit of {HTML_BYTES}")
    stated = map_encoding_to_html5(charset, fallback_utf8=False) if charset else None
    encoding = stated or detect_encoding(body, from_html_meta=True) or "utf-8"
    try:
        page = body.decode(encoding, MARK).removeprefix("\ufeff").replace(INVALID, STAND_IN)
    except LookupError as error:
        raise ValueError(f"charset {encoding!r} is unknown") from error
    if (depth := nesting(page)) > NESTING:
        raise ValueError(f"page nests {depth} elements, over the limit of {NESTING}")
    text = extract_plain_text(page, main_content=True, alt_texts=False)
    return str(text).replace(STAND_IN, INVALID)


def nesting(page: str) -> int:
    """Most elements of ``page`` that are open at once, or somewhat more."""
    open_tags: Counter[str] = Counter()
    depth = most = 0
    for match in TAG.finditer(page):
        name = match[2].lower()
        if name in NEVER_OPEN:
            continue
        if not match[1]:
            open_tags[name] += 1
            depth += 1
            most = max(most, depth)
        elif open_tags[name]:
            open_tags[name] -= 1
            depth -= 1
    return most
