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
PATHS = 20_000_000
"""Most elements on the paths to all elements, together. The extractor walks each path."""
ATTRIBUTES = 500
"""Most attributes of an element. The parser's time grows with the square of it."""
OPTIONS = 10_000
"""Most options of a page. The parser's time grows with the square of those in one list."""
STAND_IN = "\ufdd0"
"""Character that stands for an invalid sequence in the extractor, which takes no surrogates."""

WS = r"\t\n\f\r "
"""White space of HTML, in a class of a regular expression."""
VALUE = rf"(?:\"[^\"]*+\"|'[^']*+'|[^{WS}>]*+)"
ATTRIBUTE = re.compile(rf"[^{WS}/>][^{WS}/>=]*+(?:[{WS}]*+=[{WS}]*+{VALUE})?+")
TAG = re.compile(rf"<(/?)([a-zA-Z][^{WS}/>]*+)((?:[{WS}/]++|{ATTRIBUTE.pattern})*+)")
"""A tag: the slash of an end, the name, and the attributes."""
MARKUP = re.compile(r"<(?=[a-zA-Z/!?])")
"""Beginning of a tag or a comment."""
COMMENT_END = re.compile(r"--!?>")
CDATA = "<![CDATA["
OPTION = re.compile(r"<option", re.IGNORECASE)
NEVER_OPEN = frozenset(
    {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source",
     "track", "wbr", "p", "li", "dt", "dd", "tr", "thead", "tbody", "tfoot"}
)  # fmt: skip
"""Elements that have no content, or that the next one of their kind closes."""
RAW = {
    name: re.compile(rf"</{name}(?=[{WS}/>])", re.IGNORECASE)
    for name in ("script", "style", "textarea", "title", "xmp", "iframe", "noembed", "noframes")
}
"""Elements whose content has no tags, and their ends; in SVG, MathML and select it may have."""
FOREIGN = frozenset({"svg", "math"})
NEST_IN_FOREIGN = NEVER_OPEN & frozenset(
    [
        "area",
        "base",
        "col",
        "input",
        "link",
        "param",
        "source",
        "tbody",
        "tfoot",
        "thead",
        "tr",
        "track",
        "wbr",
    ]
)
"""Elements that have content in SVG and MathML, and that do not end these."""
TABLE_DEPTH = 4
"""Most elements that are open at once for a table: tbody, tr and a cell may be implied."""
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
    """Raise ``ValueError`` for a page whose elements exceed a bound.

    Comments and raw text end where a parser ends them: else a page could hide elements in what this
    takes for a comment, or close in a comment what stays open.
    """
    if sum(1 for _ in OPTION.finditer(page)) > OPTIONS:
        raise ValueError(f"page has more than {OPTIONS} options")
    open_elements = _OpenElements()
    at = 0
    while found := MARKUP.search(page, at):
        match = TAG.match(page, found.start())
        if match is None:
            at = _after_comment(page, found.start(), open_elements.is_unsure)
            continue
        at = match.end()
        if len(match[3]) > ATTRIBUTES:
            num_attributes = sum(1 for _ in ATTRIBUTE.finditer(match[3]))
            if num_attributes > ATTRIBUTES:
                raise ValueError(
                    f"page has {num_attributes} attributes in a tag, over the limit of {ATTRIBUTES}"
                )
        name = match[2].lower()
        if match[1]:
            open_elements.end(name)
        else:
            is_unsure = open_elements.is_unsure
            open_elements.start(name)
            if name in FOREIGN and re.search(rf"(^|[{WS}\"'])/$", match[3]):
                open_elements.end(name)
            if name in RAW:
                at = _after_raw(page, at, name, is_unsure)
            elif name == "plaintext" and not is_unsure:
                return
        if open_elements.depth > NESTING:
            raise ValueError(f"page nests more than {NESTING} elements")
        if open_elements.num_on_paths > PATHS:
            raise ValueError(f"page has more than {PATHS} elements on the paths to its elements")
        if open_elements.num_elements > ELEMENTS:
            raise ValueError(f"page has more than {ELEMENTS} elements, with formatting opened anew")


def _after_comment(page: str, start: int, is_unsure: bool) -> int:
    """First character after what begins at ``start`` and is no tag."""
    if page.startswith(CDATA, start) and is_unsure:
        end = page.find("]]>", start)
        if ">" in page[start : end if end >= 0 else None]:
            raise ValueError("page has a '>' in a CDATA section that may be none")
    if not page.startswith("<!--", start):
        end = page.find(">", start + 2)
        return end + 1 if end >= 0 else len(page)
    if page.startswith((">", "->"), start + 4):
        return page.index(">", start) + 1
    found = COMMENT_END.search(page, start + 4)
    return found.end() if found else len(page)


def _after_raw(page: str, start: int, name: str, is_unsure: bool) -> int:
    """First character after the raw text of an element; ``is_unsure``: it may have tags."""
    found = RAW[name].search(page, start)
    end = found.start() if found else len(page)
    if is_unsure and MARKUP.search(page[start:end].replace(CDATA, "")):
        raise ValueError(f"page has tags in a {name} in SVG, MathML or select")
    return end


class _OpenElements:
    """Upper bounds of the elements that a parser of HTML has open, and of those that it made."""

    def __init__(self) -> None:
        self._scopes: list[tuple[str, Counter[str]]] = [("", Counter())]
        self._formatting = 0
        self._foreign: list[int] = []  # depths at which SVG and MathML were opened
        self._is_mixed = False
        self._selects: list[int] = []  # options that were open before each
        self._list = ""
        self._last = ""
        self.depth = 0
        self.num_elements = 0
        self.num_on_paths = 0

        self.is_unsure = False
        """True if the next element may be in SVG, MathML or select."""

    def start(self, name: str) -> None:
        self._last = name
        self.num_on_paths += self.depth
        self.num_elements += 1 + self._formatting
        if name in CELLS and self._scopes[-1][0] in CELLS and not self.is_unsure:
            self._leave()
        if ITEMS.get(name, self._list) != self._list:
            self._list = ITEMS[name]
            self.depth += 1
        if name in NEVER_OPEN:
            self._mix(bool(self._foreign))
            if not (self.is_unsure and name in NEST_IN_FOREIGN):
                return
        self._mix(name == "frameset")
        if name in FOREIGN:
            self._foreign.append(self.depth)
            self.is_unsure = True
        if name == "select":
            self._selects.append(self._scopes[-1][1]["option"])
            self.is_unsure = True
        self._scopes[-1][1][name] += 1
        self.depth += TABLE_DEPTH if name == "table" else 1
        self._formatting += name in FORMATTING
        if name in SCOPES:
            self._scopes.append((name, Counter()))

    def end(self, name: str) -> None:
        self.num_on_paths += self.depth
        self.num_elements += 1 + self._formatting
        if name == self._scopes[-1][0]:
            self._leave()
        elif self._scopes[-1][1][name] and self._is_closed(name):
            self._close(name)

    def _is_closed(self, name: str) -> bool:
        """True if an end tag closes ``name`` for sure; what is within may keep some open."""
        return name != "noscript" and (name != "option" or self._last == name)

    def _leave(self) -> None:
        """Leave a scope.

        What is still open in it may be so after it, if the parser saw no scope.
        """
        name, inside = self._scopes.pop()
        self._scopes[-1][1].update(inside)
        self._close(name)

    def _close(self, name: str) -> None:
        self._scopes[-1][1][name] -= 1
        self.depth -= TABLE_DEPTH if name == "table" else 1
        self._formatting -= name in FORMATTING
        if name == "select":
            is_open = self._scopes[-1][1]
            options_before = self._selects.pop()
            self.depth -= max(0, is_open["option"] - options_before)
            is_open["option"] = min(is_open["option"], options_before)
        if name in FOREIGN:
            self._mix(self._foreign.pop() != self.depth)
        self.is_unsure = self._is_mixed or bool(self._selects) or bool(self._foreign)

    def _mix(self, is_mixed: bool) -> None:
        """Note that HTML may be open in SVG or MathML, which then may stay open, or frames."""
        self._is_mixed = self._is_mixed or is_mixed
        self.is_unsure = self.is_unsure or is_mixed
