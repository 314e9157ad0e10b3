"""Conditions on kept columns: a small part of SQL, parsed, checked by type and evaluated here.

::

    condition  = all ("OR" all)*
    all        = single ("AND" single)*
    single     = "NOT" single | "(" condition ")" | test
    test       = column                                     (a column of type bool)
               | column ("=" | "<>" | "!=" | "<" | "<=" | ">" | ">=") literal
               | column ["NOT"] "IN" "(" literal ("," literal)* ")"
               | column ["NOT"] "LIKE" string               (% is any text, _ any character)
               | column "IS" ["NOT"] "NULL"
    literal    = string | number | "TRUE" | "FALSE"

A null makes a test unknown, as in SQL: ``NOT`` of unknown is unknown, and a document is selected
only where the condition is true.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NamedTuple, NoReturn

from afn_ray import kept
from afn_ray.errors import ConfigError
from afn_ray.text import nearest

MOST_CHARS = 4096
"""Longest condition that a user gives, in characters."""
LONGER = 4
"""Most times that a condition may be longer in canonical form."""
MOST_DEPTH = 32
"""Deepest nesting of brackets and NOTs."""
WORDS = frozenset({"AND", "OR", "NOT", "IN", "IS", "NULL", "LIKE", "TRUE", "FALSE"})
"""Words of the language; a column of such a name is written in double quotes."""
COMPARISONS: Mapping[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "<>": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
TOKEN = re.compile(
    r"""\s*(?:(?P<string>'(?:[^']|'')*')
    |(?P<quoted>"(?:[^"]|"")+")
    |(?P<number>[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?(?![\w.]))
    |(?P<name>[^\W\d][\w-]*(?:\.[\w-]+)*)
    |(?P<sign><>|!=|<=|>=|[=<>(),]))""",
    re.VERBOSE,
)
PLAIN = re.compile(r"[^\W\d]\w*")
"""Name of a column that needs no quotes."""
EXPECTED = (
    "expected comparisons of a column with a value (=, <>, <, <=, >, >=, IN, LIKE, IS NULL), "
    "joined by AND, OR, NOT and brackets, as in lang = 'de' AND year >= 2020"
)

Row = Sequence[Any]
"""Values of the kept columns of a document, in their order."""


# --- what a condition consists of


class Column(NamedTuple):
    """A kept column."""

    at: int  # place in a ``Row``
    name: str
    kind: str  # one of ``kept.KINDS``

    def __str__(self) -> str:
        is_plain = PLAIN.fullmatch(self.name) and self.name.upper() not in WORDS
        return self.name if is_plain else f'"{self.name}"'


class Literal(NamedTuple):
    """A value, and how the condition writes it."""

    value: Any
    text: str


@dataclass(frozen=True, slots=True)
class Compare:
    """A column beside a value."""

    column: Column
    sign: str  # one of ``COMPARISONS``
    literal: Literal

    def holds(self, row: Row) -> bool | None:
        value = row[self.column.at]
        return None if value is None else COMPARISONS[self.sign](value, self.literal.value)

    def __str__(self) -> str:
        return f"{self.column} {self.sign} {self.literal.text}"


@dataclass(frozen=True, slots=True)
class IsTrue:
    """A column of type bool."""

    column: Column

    def holds(self, row: Row) -> bool | None:
        value: bool | None = row[self.column.at]
        return value

    def __str__(self) -> str:
        return str(self.column)


@dataclass(frozen=True, slots=True)
class In:
    """A column whose value is one of several."""

    column: Column
    literals: tuple[Literal, ...]

    def holds(self, row: Row) -> bool | None:
        value = row[self.column.at]
        return None if value is None else any(value == known.value for known in self.literals)

    def __str__(self) -> str:
        return f"{self.column} IN ({', '.join(known.text for known in self.literals)})"


@dataclass(frozen=True, slots=True)
class Like:
    """A column whose text has a form."""

    column: Column
    literal: Literal

    def holds(self, row: Row) -> bool | None:
        value = row[self.column.at]
        return None if value is None else is_like(value, self.literal.value)

    def __str__(self) -> str:
        return f"{self.column} LIKE {self.literal.text}"


@dataclass(frozen=True, slots=True)
class IsNull:
    """A column without a value."""

    column: Column

    def holds(self, row: Row) -> bool | None:
        return row[self.column.at] is None

    def __str__(self) -> str:
        return f"{self.column} IS NULL"


@dataclass(frozen=True, slots=True)
class Not:
    """The opposite of a condition."""

    of: Condition

    def holds(self, row: Row) -> bool | None:
        found = self.of.holds(row)
        return None if found is None else not found

    def __str__(self) -> str:
        if isinstance(self.of, IsNull):
            return f"{self.of.column} IS NOT NULL"
        return f"NOT ({self.of})" if isinstance(self.of, Joined) else f"NOT {self.of}"


@dataclass(frozen=True, slots=True)
class Joined:
    """Two or more conditions, all of which hold (AND) or one of which holds (OR)."""

    word: str
    parts: tuple[Condition, ...]

    def holds(self, row: Row) -> bool | None:
        decisive = self.word == "OR"  # the value of a part that decides alone
        found: bool | None = not decisive
        for part in self.parts:
            value = part.holds(row)
            if value is decisive:
                return decisive
            if value is None:
                found = None
        return found

    def __str__(self) -> str:
        parts = [f"({part})" if isinstance(part, Joined) else str(part) for part in self.parts]
        return f" {self.word} ".join(parts)


Condition = Compare | IsTrue | In | Like | IsNull | Not | Joined


def is_like(text: str, form: str) -> bool:
    """True if ``text`` has the ``form`` of SQL's LIKE, in time of the product of their lengths."""
    at = place = 0
    star = after = -1  # the last % of the form, and the place of the text that it reaches to
    while at < len(text):
        if place < len(form) and form[place] == "%":
            star, after = place, at
            place += 1
        elif place < len(form) and form[place] in ("_", text[at]):
            at, place = at + 1, place + 1
        elif star >= 0:
            after += 1
            at, place = after, star + 1
        else:
            return False
    return not form[place:].strip("%")


# --- parsing


def parse(text: str, columns: kept.Kept) -> Condition:
    """The condition that ``text`` writes of the kept ``columns``.

    Raises ``ConfigError`` for a text that is none, a column that is not kept, or a value that the
    type of its column cannot have.
    """
    if len(text) > MOST_CHARS and not _is_canonical(text, columns):
        raise ConfigError(
            f"where has {len(text):,} characters; expected at most {MOST_CHARS:,}: mark the "
            "documents in a column of the corpus, and select by that"
        )
    return _Parser(text, columns).parse()


def _is_canonical(text: str, columns: kept.Kept) -> bool:
    """True if ``text`` is a condition as this module writes it, with more
    spaces than the user's.
    """
    if len(text) > LONGER * MOST_CHARS:
        return False
    try:
        return str(_Parser(text, columns).parse()) == text
    except ConfigError:
        return False


class _Parser:
    """A parser that reads from left to right and never goes back."""

    def __init__(self, text: str, columns: kept.Kept) -> None:
        self._columns = columns
        self._text = text
        self._tokens = [*_tokens(text), ("end", "the end")]
        self._at = self._depth = 0

    def parse(self) -> Condition:
        found = self._condition()
        if self._tokens[self._at][0] != "end":
            self._refuse()
        return found

    def _condition(self) -> Condition:
        return self._joined("OR", lambda: self._joined("AND", self._single))

    def _joined(self, word: str, part: Callable[[], Condition]) -> Condition:
        parts = [part()]
        while self._takes(word):
            parts.append(part())
        return parts[0] if len(parts) == 1 else Joined(word, tuple(parts))

    def _single(self) -> Condition:
        self._depth += 1
        if self._depth > MOST_DEPTH:
            raise ConfigError(f"where is nested more than {MOST_DEPTH} deep: write it flatter")
        if self._takes("NOT"):
            found: Condition = Not(self._single())
        elif self._takes("("):
            found = self._condition()
            self._needs(")")
        else:
            found = self._test()
        self._depth -= 1
        return found

    def _test(self) -> Condition:
        column = self._column()
        kind, token = self._tokens[self._at]
        sign = token.replace("!=", "<>")
        if kind == "sign" and sign in COMPARISONS:
            self._at += 1
            return Compare(column, sign, self._literal(column))
        if self._takes("IS"):
            is_not = self._takes("NOT")
            self._needs("NULL")
            return Not(IsNull(column)) if is_not else IsNull(column)
        is_not = self._takes("NOT")
        if self._takes("IN"):
            self._needs("(")
            literals = [self._literal(column)]
            while self._takes(","):
                literals.append(self._literal(column))
            self._needs(")")
            found: Condition = In(column, tuple(literals))
        elif self._takes("LIKE"):
            if column.kind != "string":
                raise ConfigError(f"where has {column} LIKE, but {column} is {column.kind}")
            found = Like(column, self._literal(column))
        elif column.kind == "bool" and not is_not:
            return IsTrue(column)
        else:
            self._refuse()
        return Not(found) if is_not else found

    def _column(self) -> Column:
        kind, token = self._tokens[self._at]
        if kind not in ("name", "quoted"):
            self._refuse()
        self._at += 1
        name = token[1:-1].replace('""', '"') if kind == "quoted" else token
        names = [column.name for column in self._columns]
        for at, known in enumerate(self._columns):
            if name.lower() in (known.name.lower(), known.path.lower()):
                return Column(at, known.name, known.kind)
        kept_names = f"kept are {', '.join(names)}" if names else "none is kept"
        shown = name[:80]
        columns = [kept.canonical(self._columns), shown]
        raise ConfigError(
            f"where names {shown!r}{nearest([name], names)}, which is not in keep_columns "
            f"({kept_names}): add it there, with its type if it is not a string, as in "
            f"--keep-columns {','.join(filter(None, columns))}"
        )

    def _literal(self, column: Column) -> Literal:
        kind, token = self._tokens[self._at]
        word = token.upper()
        if kind == "name" and word == "NULL":
            raise ConfigError(
                f"where compares {column} with NULL, which is never true: write {column} IS NULL"
            )
        if kind == "string":
            given = token[1:-1].replace("''", "'")
            is_fit = column.kind in TEXTS
        elif kind == "number":
            given = token
            is_fit = column.kind in ("int64", "double")
        elif kind == "name" and word in ("TRUE", "FALSE"):
            given = word
            token = word
            is_fit = column.kind == "bool"
        else:
            self._refuse()
        try:
            value = _VALUES[column.kind](given) if is_fit else None
        except (ValueError, ArithmeticError):
            value = None
        if value is None:
            hint = ""
            if kind == "number" and column.kind == "string":
                hint = f"; if it is a number, keep it as one: {column.name}:int64"
            raise ConfigError(
                f"where compares {column} with {token[:80]}, but {column} is {column.kind}; "
                f"expected {_FORMS[column.kind]}{hint}"
            )
        self._at += 1
        return Literal(value, token)

    def _takes(self, word: str) -> bool:
        """True if ``word`` is next; if so, it is read."""
        kind, token = self._tokens[self._at]
        found = kind in ("name", "sign") and token.upper() == word
        self._at += found
        return found

    def _needs(self, word: str) -> None:
        if not self._takes(word):
            self._refuse()

    def _refuse(self) -> NoReturn:
        raise _not_one(self._text, self._tokens[self._at][1])


def _not_one(text: str, at: str) -> ConfigError:
    return ConfigError(f"where is {text[:200]!r}, which goes wrong at {at[:80]}; {EXPECTED}")


def _tokens(text: str) -> list[tuple[str, str]]:
    """Kinds and texts of the tokens of ``text``, without white space."""
    found: list[tuple[str, str]] = []
    at = 0
    text = text.rstrip()
    while at < len(text):
        match = TOKEN.match(text, at)
        if match is None or match.lastgroup is None:
            raise _not_one(text, text[at:].lstrip())
        found.append((match.lastgroup, match[match.lastgroup]))
        at = match.end()
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _number(text: str) -> int | Decimal:
    value = Decimal(text)
    return int(value) if value == value.to_integral_value() else value


TEXTS = ("string", "date", "timestamp")
"""Types whose values are written as strings."""
_VALUES: Mapping[str, Callable[[str], Any]] = {
    "string": str,
    "int64": _number,
    "double": _finite,
    "bool": lambda word: word == "TRUE",
    "date": lambda text: kept.convert(text, "date"),
    "timestamp": lambda text: kept.convert(text, "timestamp"),
}
"""Conversions of a written value to the type of its column; ``ValueError`` if it is none."""
_FORMS = {
    "string": "a string, in single quotes",
    "int64": "a number",
    "double": "a number",
    "bool": "TRUE or FALSE",
    "date": "a day, as '2026-11-30'",
    "timestamp": "a moment of ISO 8601, as '2026-11-30T12:00:00Z'",
}
