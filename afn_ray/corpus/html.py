"""The text of an HTML page, by resiliparse: the main content, within bounds of size and nesting."""

from __future__ import annotations

import re
from collections import Counter

from afn_ray.corpus.documents import INVALID
from afn_ray.corpus.streams import MARK
from afn_ray.text_encodings import canonical

HTML_BYTES = 4 << 20
"""Largest page, in bytes. Crawlers cut pages at 1 to 5 MB."""
NESTING = 2_000
"""Most elements that are open at once. The extractor's time grows with the square of it."""
ELEMENTS = 1_000_000
"""Most elements of a page. A parser opens formatting that was not closed anew in each block."""
PATHS = 50_000_000
"""Most elements on the paths to all elements, together. The extractor walks each path."""
ATTRIBUTES = 10_000
"""Most attributes of an element. The parser's time grows with the square of it."""
STAND_IN = "\ufdd0"
"""Character that stands for an invalid sequence in the extractor, which takes no surrogates."""

TAG = re.compile(
    r"<(/?)([a-zA-Z][^\s/>]*+)"
    r"((?:[\s/]++(?:[^\s=>/]++(?:\s*+=\s*+(?:\"[^\"]*+\"|'[^']*+'|[^\s>]*+))?+)?+)*+)"
)
"""A tag: the slash of an end, the name, and the attributes."""
ATTRIBUTE = re.compile(r"[^\s=>/]++(?:\s*+=\s*+(?:\"[^\"]*+\"|'[^']*+'|[^\s>]*+))?+")
NEVER_OPEN = frozenset(
    {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source",
     "track", "wbr", "p", "li", "dt", "dd", "tr", "option", "thead", "tbody", "tfoot"}
)  # fmt: skip
"""Elements that have no content, or that the next one of their kind closes."""
RAW = {name: re.compile(rf"</{name}\b", re.IGNORECASE) for name in ("script", "style")}
"""Elements whose content has no tags, and their ends; in SVG and MathML it has."""
FOREIGN = frozenset({"svg", "math"})
ITEMS = {"li": "li", "dt": "dl", "dd": "dl"}
"""Elements that only one of the same list closes: a li in a dd in a li nests."""
FORMATTING = frozenset(
    {
        "a",
        "b",
        "big",
        "code",
        "em",
        "font",
        "i",
        "nobr",
        "s",
        "small",
        "strike",
        "strong",
        "tt",
        "u",
    }
)
CELLS = ("td", "th")
SCOPES = frozenset({*CELLS, "applet", "button", "caption", "marquee", "object", "template"})
"""Elements in which an end tag closes nothing outside."""


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
    encoding = (
        stated or _of_python(charset) or detect_encoding(body, from_html_meta=True) or "utf-8"
    )
    try:
        page = body.decode(encoding, MARK).removeprefix("\ufeff").replace(INVALID, STAND_IN)
    except LookupError as error:
        raise ValueError(f"charset {encoding!r} is unknown") from error
    _check_bounds(page)
    text = extract_plain_text(page, main_content=True, alt_texts=False)
    return str(text).replace(STAND_IN, INVALID)


def _of_python(charset: str) -> str:
    """Python's encoding ``charset``, for a name that browsers do not know; empty if it is none."""
    try:
        return canonical(charset)
    except ValueError:
        return ""


def _check_bounds(page: str) -> None:
    """Raise ``ValueError`` for a page whose elements exceed a bound."""
    open_elements = _OpenElements()
    at = 0
    while match := TAG.search(page, at):
        at = match.end()
        if len(match[3]) > ATTRIBUTES:
            found = sum(1 for _ in ATTRIBUTE.finditer(match[3]))
            if found > ATTRIBUTES:
                raise ValueError(
                    f"page has {found} attributes in a tag, over the limit of {ATTRIBUTES}"
                )
        name = match[2].lower()
        if match[1]:
            open_elements.end(name)
        else:
            open_elements.start(name)
            if name in RAW and not open_elements.has_foreign:
                end = RAW[name].search(page, at)
                at = end.start() if end else len(page)
        if open_elements.depth > NESTING:
            raise ValueError(f"page nests more than {NESTING} elements")
        if open_elements.num_on_paths > PATHS:
            raise ValueError(f"page has more than {PATHS} elements on the paths to its elements")
        if open_elements.num_elements > ELEMENTS:
            raise ValueError(f"page has more than {ELEMENTS} elements, with formatting opened anew")


class _OpenElements:
    """Upper bounds of the elements that a parser of HTML has open, and of those that it made."""

    def __init__(self) -> None:
        self._scopes: list[tuple[str, Counter[str]]] = [("", Counter())]
        self._formatting = 0
        self._foreign = 0
        self._list = ""
        self.depth = 0
        self.num_elements = 0
        self.num_on_paths = 0

    @property
    def has_foreign(self) -> bool:
        """True if SVG or MathML may be open."""
        return self._foreign > 0

    def start(self, name: str) -> None:
        self.num_on_paths += self.depth
        self.num_elements += 1 + self._formatting
        if name in CELLS and self._scopes[-1][0] in CELLS:
            self._leave()
        if ITEMS.get(name, self._list) != self._list:
            self._list = ITEMS[name]
            self.depth += 1
        if name in NEVER_OPEN:
            return
        self._scopes[-1][1][name] += 1
        self.depth += 1
        self._formatting += name in FORMATTING
        self._foreign += name in FOREIGN
        if name in SCOPES:
            self._scopes.append((name, Counter()))

    def end(self, name: str) -> None:
        self.num_elements += 1 + self._formatting
        if name == self._scopes[-1][0]:
            self._leave()
        elif self._scopes[-1][1][name]:
            self._close(name)

    def _leave(self) -> None:
        """Leave a scope.

        What is still open in it may be so after it, if the parser saw no scope.
        """
        name, inside = self._scopes.pop()
        self._scopes[-1][1].update(inside)
        self._close(name)

    def _close(self, name: str) -> None:
        self._scopes[-1][1][name] -= 1
        self.depth -= 1
        self._formatting -= name in FORMATTING
        self._foreign -= name in FOREIGN
