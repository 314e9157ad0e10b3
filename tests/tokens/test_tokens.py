"""Every token once, where it sees most; texts are data, and offsets lead back to them."""

from __future__ import annotations

import functools
import itertools
import json
import math
import random
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import cast
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Encoding,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

import afn_ray
from afn_ray.config import RunConfig
from afn_ray.errors import ConfigError, ModelError
from afn_ray.runs import demo
from afn_ray.schema import REPLACED, SPECIAL, WORD_START
from afn_ray.tokens import encode
from afn_ray.tokens.encode import Encoded, Template, TextEncoder
from afn_ray.tokens.segments import find_cut, word_ids
from afn_ray.tokens.surfaces import Speller
from afn_ray.tokens.windows import (
    FILLED_TO,
    TokenBatch,
    Window,
    make_batches,
    make_windows,
    window_sizes,
)
from conftest import save_model, write_jsonl

# --- windows and batches
# ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Documents of so many text tokens, and how they are cut."""

    lengths: list[int]
    template: Template
    width: int
    overlap: int
    causal: bool
    batch_tokens: int

    @property
    def encoded(self) -> Encoded:
        """Text tokens are numbered from 100 over all documents, so that a value tells where it
        comes from.
        """
        before, after = self.template.prefix, self.template.suffix
        number = itertools.count(100)
        rows = [
            [*before, *(next(number) for _ in range(n)), *after] if n else [] for n in self.lengths
        ]
        ids = np.array([i for row in rows for i in row], np.int32)
        bounds = np.cumsum([0, *map(len, rows)]).astype(np.int64)
        return Encoded(bounds, ids, ids, ids, np.zeros(len(ids), np.uint8), ids)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    width = draw(st.integers(1, 24) | st.sampled_from([128, 510]))
    overlap = draw(st.integers(0, width - 1))
    lengths = draw(
        st.lists(
            st.integers(0, 80) | st.sampled_from([width, width + 1, 2 * width, 1000, 5000]),
            max_size=6,
        )
    )
    longest = 400 * (width - overlap)  # a stride of one token makes as many windows as tokens
    return Case(
        [min(n, longest) for n in lengths],
        Template(
            tuple(range(1, 1 + draw(st.integers(0, 2)))),
            tuple(range(11, 11 + draw(st.integers(0, 2)))),
        ),
        width,
        overlap,
        draw(st.booleans()),
        draw(st.integers(16, 4000)),
    )


def _cut(case: Case) -> tuple[Encoded, list[Window]]:
    encoded = case.encoded
    return encoded, make_windows(encoded, case.template, case.width, case.overlap, case.causal)


def _batches(
    case: Case, encoded: Encoded, windows: Sequence[Window], packed: bool
) -> list[TokenBatch]:
    encoder = cast(TextEncoder, SimpleNamespace(template=case.template))
    return list(make_batches(windows, encoded, encoder, case.batch_tokens, packed=packed))


def _input(case: Case, encoded: Encoded, window: Window) -> list[int]:
    """Tokens of ``window`` for the model: its rows' tokens, and the template over both ends."""
    ids: list[int] = encoded.token_ids[window.row : window.row + window.length].tolist()
    before, after = list(case.template.prefix), list(case.template.suffix)
    return before + ids[len(before) : len(ids) - len(after)] + after


def _sequences(batch: TokenBatch) -> list[list[int]]:
    """The inputs of ``batch``, one by one; what is behind the last is filler."""
    ends = list(itertools.accumulate(batch.lengths))
    return [batch.ids[end - n : end].tolist() for end, n in zip(ends, batch.lengths, strict=True)]


@given(cases(), st.booleans())
@settings(deadline=None)
def test_every_row_is_recorded_exactly_once_from_its_own_input(case: Case, packed: bool) -> None:
    encoded, windows = _cut(case)
    out = np.full(len(encoded.token_ids), -1)
    for batch in _batches(case, encoded, windows, packed):
        assert (
            batch.kept.max() < sum(batch.lengths) <= len(batch.ids)
        )  # nothing is recorded from filler
        assert (out[batch.rows] == -1).all()
        assert len(set(batch.rows.tolist())) == len(batch.rows) == len(batch.kept)
        out[batch.rows] = batch.ids[batch.kept]
    assert np.array_equal(out, encoded.token_ids)
    assert sum(w.keep_end - w.keep_start for w in windows) == len(encoded.token_ids)


@given(cases(), st.booleans())
@settings(deadline=None)
def test_a_batch_holds_whole_inputs_one_behind_the_other(case: Case, packed: bool) -> None:
    encoded, windows = _cut(case)
    of_input: dict[tuple[int, ...], list[Window]] = {}
    for window in windows:
        of_input.setdefault(tuple(_input(case, encoded, window)), []).append(window)
    for batch in _batches(case, encoded, windows, packed):
        kept, at = [], 0
        for sequence in _sequences(batch):
            window = of_input[tuple(sequence)].pop()
            kept += [(at + i, window.row + i) for i in range(window.keep_start, window.keep_end)]
            at += window.length
        assert kept == list(zip(batch.kept.tolist(), batch.rows.tolist(), strict=True))
        assert at == sum(batch.lengths)
        assert set(batch.ids[at:].tolist()) <= set(
            encoded.token_ids.tolist()
        )  # filler is in the vocabulary
    assert not any(of_input.values())


@given(cases())
@settings(deadline=None)
def test_a_windows_input_is_the_documents_tokens_inside_the_template(case: Case) -> None:
    encoded, windows = _cut(case)
    before, after = list(case.template.prefix), list(case.template.suffix)
    seen = []
    for ids in itertools.chain.from_iterable(
        map(_sequences, _batches(case, encoded, windows, packed=True))
    ):
        text = ids[len(before) : len(ids) - len(after)]
        assert ids == [*before, *text, *after]
        assert 1 <= len(text) <= case.width
        assert text == list(range(text[0], text[0] + len(text)))
        doc = next(
            i for i, end in enumerate(itertools.accumulate(case.lengths)) if text[0] < 100 + end
        )
        begin = 100 + sum(case.lengths[:doc])
        assert begin <= text[0] and text[-1] < begin + case.lengths[doc]
        assert len(text) == min(
            case.width, case.lengths[doc]
        )  # full, unless the document is shorter
        seen.append(text[0])
    assert len(seen) == len(set(seen)) == len(windows)


@given(cases())
@settings(deadline=None)
def test_a_token_is_recorded_in_the_window_where_it_sees_most(case: Case) -> None:
    encoded, windows = _cut(case)
    before, around = len(case.template.prefix), case.template.num_special
    for doc, n in enumerate(case.lengths):
        first = int(encoded.bounds[doc])
        here = [w for w in windows if first <= w.row < encoded.bounds[doc + 1]]
        spans = [(w.row - first, w.row - first + w.length - around) for w in here]
        best, got = np.full(n, -1.0), np.full(n, -1.0)
        for window, (begin, end) in zip(here, spans, strict=True):
            at = np.arange(begin, end)
            left = at - begin + (math.inf if begin == 0 else 0)
            right = end - 1 - at + (math.inf if end == n else 0)
            sees = left if case.causal else np.minimum(left, right)
            best[begin:end] = np.maximum(best[begin:end], sees)
            kept = slice(
                max(0, window.keep_start - before), min(window.keep_end - before, end - begin)
            )
            got[begin:end][kept] = sees[kept]
        assert got.tolist() == best.tolist()
        assert len(spans) == (
            1 + max(0, -(-(n - case.width) // (case.width - case.overlap))) if n else 0
        )


@given(cases(), st.randoms(use_true_random=False), st.booleans())
@settings(deadline=None)
def test_batches_do_not_depend_on_the_order_of_windows(
    case: Case, order: random.Random, packed: bool
) -> None:
    encoded, windows = _cut(case)
    shuffled = order.sample(windows, len(windows))
    mine, other = (_batches(case, encoded, w, packed) for w in (windows, shuffled))
    assert len(mine) == len(other)
    for a, b in zip(mine, other, strict=True):
        assert a.lengths == b.lengths and a.forward_tokens == b.forward_tokens
        for name in ("ids", "kept", "rows"):
            assert np.array_equal(getattr(a, name), getattr(b, name)), name


@given(cases())
@settings(deadline=None)
def test_packed_batches_are_full(case: Case) -> None:
    encoded, windows = _cut(case)
    batches = _batches(case, encoded, windows, packed=True)
    left = [w.length for w in windows]
    for batch in batches:
        assert len(batch.ids) == batch.forward_tokens
        total, room = (
            sum(batch.lengths),
            max(case.batch_tokens, max(left)),
        )  # a window over the budget is alone
        if len(batches) == 1:  # a power of two, or the budget, or the window
            assert total <= len(batch.ids) < max(2 * total, 2)
            assert len(batch.ids) in {room, total, 1 << (total - 1).bit_length()}
        elif room > case.batch_tokens:
            assert len(batch.ids) == room == total
        else:  # full, or the rest of a large budget
            assert (
                len(batch.ids)
                == min(case.batch_tokens, -(-total // FILLED_TO) * FILLED_TO)
                >= total
            )
            assert len(batch.ids) == case.batch_tokens or len(batch.ids) % 2048 == 0
        for n in batch.lengths:
            left.remove(n)
        assert not left or room - sum(batch.lengths) < min(
            left
        )  # no window that is left would have fitted
        assert max(batch.lengths) <= case.batch_tokens or len(batch.lengths) == 1
    assert not left


@given(cases())
@settings(deadline=None)
def test_padded_batches_keep_their_budget(case: Case) -> None:
    encoded, windows = _cut(case)
    batches = _batches(case, encoded, windows, packed=False)
    for batch in batches:
        assert len(batch.ids) == sum(batch.lengths)  # the model pads
        assert batch.forward_tokens == len(batch.lengths) * max(batch.lengths)
        assert len(batch.lengths) == 1 or batch.forward_tokens <= case.batch_tokens
    for a, b in itertools.pairwise(batches):  # no room was left for the next window
        assert (len(a.lengths) + 1) * b.lengths[0] > case.batch_tokens
    assert [n for b in batches for n in b.lengths] == sorted(w.length for w in windows)


@pytest.mark.parametrize("packed", [True, False])
def test_a_window_over_the_budget_is_a_batch_alone(packed: bool) -> None:
    case = Case([3, 100, 4, 100, 5], Template((1,), (11,)), 100, 0, False, 16)
    encoded, windows = _cut(case)
    batches = _batches(case, encoded, windows, packed)
    small = [[5], [7, 6]] if packed else [[5, 6], [7]]
    assert sorted(b.lengths for b in batches) == sorted([*small, [102], [102]])
    assert sorted(len(b.ids) for b in batches) == (
        [16, 16, 102, 102] if packed else [7, 11, 102, 102]
    )


@pytest.mark.parametrize("budget", [64, 512, 2048, 16384])
def test_little_of_packed_batches_is_filler(budget: int) -> None:
    lengths = (
        np.random.default_rng(0).lognormal(3.3, 0.8, 6500).astype(int).clip(1, 2000).tolist()
    )  # as verses have
    case = Case(lengths, Template((1,), (11,)), 62 if budget == 64 else 510, 15, False, budget)
    encoded, windows = _cut(case)
    batches = _batches(case, encoded, windows, packed=True)
    needed = sum(sum(b.lengths) for b in batches)
    computed = sum(b.forward_tokens for b in batches)
    assert needed == sum(w.length for w in windows) > 240_000
    last = min(batches, key=lambda b: sum(b.lengths))  # the rest, that fills no batch
    filler = computed - needed - (last.forward_tokens - sum(last.lengths))
    assert filler < needed * 0.003


def test_no_windows_are_no_batches() -> None:
    case = Case([0, 0], Template((1,), (11,)), 100, 0, False, 16)
    encoded, windows = _cut(case)
    assert (
        windows
        == []
        == _batches(case, encoded, windows, True)
        == _batches(case, encoded, windows, False)
    )


def test_window_sizes_leave_room_to_move() -> None:
    bert, none = Template((101,), (102,)), Template((), ())
    assert window_sizes(512, None, bert) == (510, 127)
    assert window_sizes(8, 0, none) == (8, 0)
    assert window_sizes(8, 5, bert) == (6, 5)
    for window, overlap in ((8, 6), (2, None), (8, 100), (1, 0)):
        with pytest.raises(
            ConfigError,
            match="has no room to move; give a larger window_tokens or a smaller overlap",
        ):
            window_sizes(window, overlap, bert)


# --- the real WordPiece tokenizer
# ------------------------------------------------------------------------

FILE = demo.model_folder() / "tokenizer.json"
MINILM = TextEncoder(Tokenizer.from_file(str(FILE)))
PIECES, READABLE = MINILM.texts()
CONTROL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

LETTERS = "aeinorstLORDéÉüßñøÅİﬁżе́дЖΣςαمرحباहिन्दीก漢字日本語カナ한국어"
OTHERS = ".,;:!?'\"-()[]#@$%&*_/\\+=<>|~^`§«»“”…—٪，。¿0123456789²½Ⅻ①€❤👍🚀🇩\u0301\u0308\ufe0f"
SPACES = " \t\n\r\u00a0\u2009\u3000"
DROPPED = "\x00\x07\u200b\u200d\u2060\ufeff\ufffd"
CHARS = st.sampled_from(LETTERS + OTHERS + SPACES + DROPPED)
TEXTS = st.lists(
    st.text(CHARS, max_size=12)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
    | st.sampled_from([*CONTROL, "##ing", " the LORD ", "👩‍🚀", "naïve"]),
    max_size=8,
).map("".join)


def _fold(text: str) -> str:
    """Part of ``text`` that uncased BERT keeps: lower case, no accents, no control or format
    characters.
    """
    dropped = ("Mn", "Cc", "Cf", "Co")
    kept = (
        c
        for c in unicodedata.normalize("NFD", text)
        if unicodedata.category(c) not in dropped and c != "\ufffd"
    )
    return "".join(
        c
        for c in unicodedata.normalize("NFD", "".join(kept).lower())
        if unicodedata.category(c) != "Mn"
    )


def _words(encoded: Encoded, doc: int) -> list[tuple[int, int]]:
    """First row and the one behind the last of every word of ``doc``, by flags alone."""
    rows = [
        r for r in range(*encoded.bounds[doc : doc + 2].tolist()) if not encoded.flags[r] & SPECIAL
    ]
    heads = [r for r in rows if encoded.flags[r] & WORD_START]
    assert heads[:1] == rows[:1]
    return list(zip(heads, [*heads[1:], rows[-1] + 1 if rows else 0], strict=False))


def surfaces(encoded: Encoded, texts: Sequence[str], readable: Sequence[str]) -> list[str | None]:
    """Every row's surface from ``Speller``, which are those of ``one_by_one``."""
    found = Speller(readable).surfaces(encoded, texts)
    expected = one_by_one(encoded, texts, readable)
    # The column of the tables is the same too: the order of the dictionary decides its bytes.
    assert found.equals(pa.array(expected, pa.string()).dictionary_encode())
    return expected


def one_by_one(encoded: Encoded, texts: Sequence[str], readable: Sequence[str]) -> list[str | None]:
    """The slow reference of ``Speller.surfaces``: one word after the other, as strings."""
    result: list[str | None] = [None] * len(encoded.token_ids)
    heads = np.flatnonzero(encoded.flags & WORD_START).tolist()
    for head, next_head in itertools.pairwise([*heads, len(encoded.token_ids)]):
        doc = int(encoded.docs[head])
        rows = range(head, min(next_head, int(encoded.bounds[doc + 1])))
        text_rows = [row for row in rows if not encoded.flags[row] & SPECIAL]
        written = texts[doc][encoded.start[head] : encoded.word_end[head]].strip()
        spelled = "".join(readable[encoded.token_ids[row]] for row in text_rows)
        if written != spelled:
            result[head] = written
    return result


def test_surfaces_of_odd_offsets_are_those_of_slices() -> None:
    text = " \u3000LORD  lord \n"
    spans = [(0, 6), (8, 12), (3, 1), (13, 14), (0, 0)]  # the third ends before it begins
    starts = np.full(5, WORD_START, np.uint8)
    start, end = np.array(spans, np.int32).T
    ids = np.array([0, 1, 2, 3, 4], np.int32)
    encoded = Encoded(np.array([0, 5]), ids, start, end, starts, end)
    readable = ["lord", "lord", "", "x", ""]
    assert surfaces(encoded, [text], readable) == ["LORD", None, None, "", None]
    empty = Encoded(np.zeros(2, np.int64), ids[:0], ids[:0], ids[:0], starts[:0], ids[:0])
    assert surfaces(empty, [""], []) == []


def test_tokens_without_a_word_have_no_words_number() -> None:
    some = [SimpleNamespace(word_ids=[0, 0, 1]), SimpleNamespace(word_ids=[None, 0])]
    assert word_ids(cast(list[Encoding], some), 5).tolist() == [0, 0, 1, -1, 0]
    assert word_ids(cast(list[Encoding], some[:1]), 3).tolist() == [0, 0, 1]


def written(encoder: TextEncoder, readable: Sequence[str], texts: Sequence[str]) -> list[list[str]]:
    """Every word of ``texts`` as the tables have it: its surface, else its tokens' readable
    texts.
    """
    encoded = encoder.encode(texts)
    surface = surfaces(encoded, texts, readable)
    assert all(s is None or encoded.flags[r] & WORD_START for r, s in enumerate(surface))
    result: list[list[str]] = []
    for doc in range(len(texts)):
        result.append([])
        for head, behind in _words(encoded, doc):
            spelled = "".join(readable[i] for i in encoded.token_ids[head:behind])
            said = surface[head]
            assert said != spelled  # nothing is said twice
            result[-1].append(spelled if said is None else said)
    return result


def test_truncation_and_padding_of_tokenizer_json_are_off() -> None:
    held = json.loads(FILE.read_text("utf-8"))
    assert (
        held["truncation"]["max_length"] == 128 and held["padding"] is not None
    )  # the trap is really there
    encoded = MINILM.encode(["word " * 1000, "word"])
    assert np.diff(encoded.bounds).tolist() == [1002, 3]


def test_the_template_is_found() -> None:
    assert Template((101,), (102,)) == MINILM.template


@pytest.mark.parametrize("control", CONTROL)
def test_a_control_token_in_a_text_is_text(control: str) -> None:
    for text in (control, f"a {control} b", f"{control}{control}", f"a{control}"):
        encoded = MINILM.encode([text])
        inside = encoded.token_ids[1:-1]
        assert MINILM._tokenizer.token_to_id(control) not in inside
        assert "".join(READABLE[i] for i in inside) == text.replace(" ", "").lower()
        assert (encoded.flags[1:-1] & SPECIAL == 0).all() and (
            encoded.flags[[0, -1]] == SPECIAL
        ).all()


@given(st.lists(TEXTS, max_size=4))
@example(["re\u0301sume\u0301 [SEP] 漢字 ab\ufffdcd", "", "İstanbul ﬁn"])
def test_offsets_lead_back_to_the_text(texts: list[str]) -> None:
    encoded = MINILM.encode(texts)
    for doc, text in enumerate(texts):
        rows = range(*encoded.bounds[doc : doc + 2].tolist())
        if not rows:
            assert not any(unicodedata.category(c)[0] in "P" for c in text)
            continue
        assert encoded.token_ids[[rows[0], rows[-1]]].tolist() == [101, 102]
        assert encoded.start[rows[-1]] == encoded.end[rows[-1]] == encoded.end[rows[-2]]
        assert encoded.positions[rows].tolist() == list(range(len(rows))) and set(
            encoded.docs[rows]
        ) == {doc}
        end = 0
        for row in rows[1:-1]:
            piece, span = (
                PIECES[encoded.token_ids[row]],
                (int(encoded.start[row]), int(encoded.end[row])),
            )
            assert end <= span[1] and 0 <= span[0] < span[1] <= len(text)
            if piece != "[UNK]":
                folded, spelled = (
                    _fold(text[slice(*span)]),
                    piece if piece == "##" else piece.removeprefix("##"),
                )
                shared = (
                    span[0] < end or span[1] > encoded.start[row + 1]
                )  # by pieces of one character, as of 국
                assert spelled in folded if shared else spelled == folded
            apart = (
                span[0] >= max(end, 1) and text[span[0] - 1].isspace()
            )  # a form feed, which BERT drops and reads on
            assert bool(encoded.flags[row] & WORD_START) == (
                not piece.startswith("##") or piece == "##" or apart
            )
            end = span[1]


@pytest.mark.parametrize(
    "text", ["", " ", "\n\t \u3000", "\x00\x07", "\u200b\ufeff", "\ufffd", "\u0301"]
)
def test_a_text_without_tokens_has_no_rows(text: str) -> None:
    encoded = MINILM.encode([text, "a", text], [True, False, True])
    assert encoded.bounds.tolist() == [0, 0, 3, 3]
    assert encoded.docs.tolist() == [1, 1, 1]
    assert surfaces(encoded, [text, "a", text], READABLE) == [None] * 3
    assert MINILM.encode([]).bounds.tolist() == [0]


def test_replaced_marks_tokens_that_cover_a_replacement_character() -> None:
    texts = ["ab\ufffdc the", "ab\ufffdc the"]
    encoded = MINILM.encode(texts, [True, False])
    marked = [
        texts[0][encoded.start[r] : encoded.end[r]]
        for r in np.flatnonzero(encoded.flags & REPLACED)
    ]
    assert marked == ["ab\ufffdc"]
    assert encoded.flags[: encoded.bounds[1]].max() == REPLACED | WORD_START


def _without_stray_marks(text: str) -> str:
    """``text`` without marks that follow white space: no word has them."""
    kept = " "
    for c in text:
        if not (kept[-1].isspace() and unicodedata.category(c)[0] == "M"):
            kept += c
    return kept[1:]


PLAIN_TEXTS = st.lists(
    st.text(st.sampled_from(LETTERS + OTHERS + SPACES), max_size=12)
    | st.sampled_from(["naïve", "re\u0301sume\u0301 "]),
    max_size=6,
).map(lambda parts: _without_stray_marks(" ".join(parts)))


@given(st.lists(PLAIN_TEXTS, max_size=3))
@example(["aRésumé re\u0301sume\u0301 LORD, a❤\ufe0f"])
def test_the_words_as_written_are_the_text_but_for_white_space(texts: list[str]) -> None:
    assert ["".join(words) for words in written(MINILM, READABLE, texts)] == [
        "".join(t.split()) for t in texts
    ]


def test_a_lower_casing_tokenizer_has_surfaces_for_capitals_alone() -> None:
    text = "The LORD said, the Lord's résumé unaffordable"
    encoded = MINILM.encode([text])
    shown = {
        text[encoded.start[r] :].split()[0]: s
        for r, s in enumerate(surfaces(encoded, [text], READABLE))
        if s
    }
    assert list(shown.values()) == ["The", "LORD", "Lord", "résumé"]


def test_a_tokenizer_that_makes_nothing_of_text_is_refused() -> None:
    with pytest.raises(ModelError, match="no text between its special tokens"):
        TextEncoder(Tokenizer(models.BPE()))


# --- texts that a tokenizer cannot take
# ------------------------------------------------------------------


class PanicException(BaseException):
    """A panic of a Rust library in Python."""


class Faulty:
    """MiniLM's tokenizer, which fails for texts with ``word``, or does what ``spoil`` does to their
    encodings.
    """

    def __init__(
        self, word: str, error: BaseException | None = None, offsets: tuple[int, int] | None = None
    ) -> None:
        self.word, self.error, self.offsets, self.calls = word, error, offsets, 0
        self.inner = Tokenizer.from_file(str(FILE))

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def encode_batch(
        self, texts: list[str], add_special_tokens: bool
    ) -> Sequence[Encoding | SizedNamespace]:
        self.calls += 1
        if self.error is not None and any(self.word in t for t in texts):
            raise self.error
        encodings = self.inner.encode_batch(texts, add_special_tokens=add_special_tokens)
        if self.offsets is None:
            return encodings
        return [
            self._spoiled(e) if self.word in t else e for t, e in zip(texts, encodings, strict=True)
        ]

    def _spoiled(self, e: Encoding) -> SizedNamespace:
        assert self.offsets is not None
        return SizedNamespace(
            ids=e.ids, offsets=[*e.offsets[:-1], self.offsets], word_ids=e.word_ids
        )


class SizedNamespace(SimpleNamespace):
    def __len__(self) -> int:
        return len(self.ids)


def without_word(num_ids: int | None = None) -> TextEncoder:
    """A Unigram tokenizer of the small letters and a space, which has no piece for anything else
    and says so.
    """
    pieces = [(c, -1.0) for c in " abcdefghijklmnopqrstuvwxyz"]
    return TextEncoder(Tokenizer(models.Unigram(pieces, unk_id=None)), num_ids)


def assert_as_if_empty(
    encoder: TextEncoder, plain: TextEncoder, texts: list[str], bad: dict[int, str]
) -> None:
    """``bad`` texts have no rows and those reasons; every row of the others is what ``plain`` makes
    of them.
    """
    got = encoder.encode(texts, [False] * len(texts))
    expected = plain.encode(["" if i in bad else t for i, t in enumerate(texts)])
    assert got.problems.keys() == bad.keys()
    for i, reason in bad.items():
        assert reason in got.problems[i]
    for name in ("bounds", "token_ids", "start", "end", "flags", "word_end"):
        a, b = getattr(got, name), getattr(expected, name)
        assert a.dtype == b.dtype and np.array_equal(a, b), name
    assert len(got.token_ids) > 0


def test_a_text_that_the_tokenizer_has_no_piece_for_costs_itself_alone(verses: list[str]) -> None:
    texts = ["in the beginning", "Let", "", "there be", "light \u05d0", "and", "\u05d0"]
    reason = "the tokenizer cannot take it: Exception: "
    assert_as_if_empty(without_word(), without_word(), texts, {1: reason, 4: reason, 6: reason})


@pytest.mark.parametrize(
    "error", [PanicException("index out of bounds"), ValueError("no"), TypeError("no")]
)
def test_a_text_that_breaks_the_tokenizer_costs_itself_alone(
    error: BaseException, verses: list[str]
) -> None:
    texts = [*verses[:40], f"{verses[40]} poison", *verses[41:100], "poison", verses[0]]
    broken = Faulty("poison", error)
    encoder = TextEncoder(cast(Tokenizer, broken))
    assert_as_if_empty(
        encoder, MINILM, texts, {40: f"{type(error).__name__}: ", 100: f"{type(error).__name__}: "}
    )
    assert broken.calls < 4 * math.log2(len(texts)) + 4


def test_texts_that_all_break_the_tokenizer_take_two_calls_each(verses: list[str]) -> None:
    broken = Faulty("poison", ValueError("no"))
    got = TextEncoder(cast(Tokenizer, broken)).encode([f"poison {v}" for v in verses[:64]])
    assert len(got.problems) == 64 and not len(got.token_ids) and broken.calls <= 2 * 64 + 2


@pytest.mark.parametrize(
    "error", [MemoryError("no memory"), OSError(5, "input/output"), KeyboardInterrupt()]
)
def test_want_of_memory_a_disk_and_ctrl_c_are_no_text_s_fault(error: BaseException) -> None:
    with pytest.raises(type(error)):
        TextEncoder(cast(Tokenizer, Faulty("poison", error))).encode(["a", "poison"])


def test_a_tokenizer_that_takes_nothing_any_more_is_no_text_s_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = Faulty("", ValueError("lock poisoned"))
    encoder = TextEncoder(cast(Tokenizer, broken))
    monkeypatch.setattr(broken, "encode", broken.encode_batch, raising=False)
    with pytest.raises(ModelError, match="cannot encode 'a'"):
        encoder.encode(["a", "b"])


def test_a_text_with_a_token_beyond_the_embeddings_costs_itself_alone() -> None:
    texts = ["and there was light", "a", "the beginning", "quintessentially yours", ""]
    ids = [
        e.ids for e in Tokenizer.from_file(str(FILE)).encode_batch(texts, add_special_tokens=False)
    ]
    most = max(ids[0])
    encoder = TextEncoder(Tokenizer.from_file(str(FILE)), most + 1)
    bad = {
        i: f"the model has embeddings for the ids 0 to {most}"
        for i, row in enumerate(ids)
        if row and max(row) > most
    }
    assert 0 < len(bad) < 4 and 0 not in bad
    assert_as_if_empty(encoder, MINILM, texts, bad)
    first = next(i for i in bad)
    name = Tokenizer.from_file(str(FILE)).id_to_token(next(i for i in ids[first] if i > most))
    assert repr(name) in encoder.encode(texts).problems[first]


@pytest.mark.parametrize("offsets", [(3, 1 << 20), (9, 3), (0, 1 << 31)])
def test_a_text_whose_tokens_are_not_of_its_characters_costs_itself_alone(
    offsets: tuple[int, int],
) -> None:
    texts = ["let there be light", "let there be poison", "light"]
    encoder = TextEncoder(cast(Tokenizer, Faulty("poison", offsets=offsets)))
    assert_as_if_empty(
        encoder, MINILM, texts, {1: f"gives characters {offsets[0]} to {offsets[1]} of 19"}
    )


def test_a_template_beyond_the_embeddings_is_refused() -> None:
    with pytest.raises(
        ModelError, match=r"puts token id 101 \('\[CLS\]'\) around every text.* ids 0 to 99"
    ):
        TextEncoder(Tokenizer.from_file(str(FILE)), 100)


def test_a_tokenizer_that_cannot_encode_at_all_is_refused() -> None:
    with pytest.raises(ModelError, match="cannot encode 'a': Exception: "):
        TextEncoder(Tokenizer(models.Unigram([("b", -1.0)], unk_id=None)))


# --- other kinds of tokenizers
# ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def byte_level(byte_bpe: Path) -> TextEncoder:
    """GPT-2 and Llama 3: bytes, white space at the front of words, no special tokens."""
    return TextEncoder(Tokenizer.from_file(str(byte_bpe / "tokenizer.json")))


@pytest.fixture(scope="module")
def metaspace(verses: list[str]) -> TextEncoder:
    """Llama 2 and Gemma: a normalizer writes spaces as \u2581, there is no pre-tokenizer, bytes
    are a fallback.
    """
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        prepend_scheme="never"
    )  # while it learns: no piece of two words
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<s>", *(f"<0x{i:02X}>" for i in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(verses[:400], trainer)
    return TextEncoder(
        Tokenizer.from_str(json.dumps(json.loads(tokenizer.to_str()) | {"pre_tokenizer": None}))
    )


def _trained(tokenizer: Tokenizer, trainer: trainers.Trainer, verses: list[str]) -> TextEncoder:
    tokenizer.train_from_iterator([*verses[:100], *3 * WRITINGS], trainer)
    return TextEncoder(tokenizer)


@pytest.fixture(scope="module")
def cased(verses: list[str]) -> TextEncoder:
    """BERT's cased models: WordPiece that folds nothing."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(),
    )
    trainer = trainers.WordPieceTrainer(
        vocab_size=500, special_tokens=["[UNK]"], show_progress=False
    )
    return _trained(tokenizer, trainer, verses)


@pytest.fixture(scope="module")
def split(verses: list[str]) -> TextEncoder:
    """Qwen and Llama 3: composes accents, and a pattern of its own splits, to which a vowel sign
    is no letter.
    """
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    pattern = words + r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder, tokenizer.post_processor = (
        decoders.ByteLevel(),
        processors.ByteLevel(trim_offsets=False),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    return _trained(tokenizer, trainer, verses)


def _unigram(verses: list[str], *normal: normalizers.Normalizer) -> TextEncoder:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([*normal, normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    ends = ["<s>", "</s>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=[*ends, "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([*verses[:100], *3 * WRITINGS], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(e, tokenizer.token_to_id(e)) for e in ends]
    )
    return TextEncoder(tokenizer)


@pytest.fixture(scope="module")
def unigram(verses: list[str]) -> TextEncoder:
    """XLM-R: Unigram behind a normalizer that makes several characters of one."""
    return _unigram(verses, normalizers.NFKC())


@pytest.fixture(scope="module")
def folding(verses: list[str]) -> TextEncoder:
    """ALBERT: Unigram without accents and capitals."""
    return _unigram(verses, normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase())


KINDS = ["byte_level", "metaspace", "cased", "split", "unigram", "folding"]
WRITINGS = [
    "The naïve re\u0301sume\u0301, Z\u0351\u036b\u0343algo x\u0301\u0302 ÅNGSTRÖM",
    "漢字とカナ、日本語テキスト。 한국어 문장 中文",
    "👩\u200d🚀 flies 🇩🇪🇫🇷 and 👨\u200d👩\u200d👧\u200d👦 says ❤\ufe0f 👍🏽!",
    "שָׁלוֹם עולם, مَرْحَبًا بالعالم 12٣",
    "हिन्दी, में। नमस्ते ภาษาไทย",
    "ﬁne … ² Ⅻ ½ ﷺ don´t rock¨n 1999",
    "a\u200db  two\n\nlines\tand\u00a0more \u3000 wide",
]
"""Accents, CJK, emoji of several code points, right to left, vowel signs, characters that are more
than one, spaces.
"""


SPACED = (
    "résumé re\u0301sume\u0301 שָׁלוֹם عربي مَرْحَبًا हिन्दी नमस्ते ภาษาไทย 한국어 カナ 👩\u200d🚀 "
    "👨\u200d👩\u200d👧\u200d👦 🇩🇪 ❤\ufe0f Ⅻ ﷺ ½ 7 end"
)


@pytest.mark.parametrize("kind", KINDS)
def test_words_of_any_script_are_what_stands_between_spaces(
    request: pytest.FixtureRequest, kind: str
) -> None:
    encoder: TextEncoder = request.getfixturevalue(kind)
    assert written(encoder, encoder.texts()[1], [SPACED]) == [SPACED.split()]
    if kind not in ("metaspace", "unigram", "folding"):  # which have no other words
        assert written(encoder, encoder.texts()[1], ["हिन्दी, में। שָׁלוֹם! e\u0301."]) == [
            ["हिन्दी", ",", "में", "।", "שָׁלוֹם", "!", "e\u0301", "."]
        ]


@pytest.mark.parametrize("kind", KINDS)
def test_offsets_of_any_script_are_the_characters_of_the_piece(
    request: pytest.FixtureRequest, kind: str
) -> None:
    encoder: TextEncoder = request.getfixturevalue(kind)
    readable, num_pieces = encoder.texts()[1], 0
    encoded = encoder.encode(WRITINGS)
    for doc, text in enumerate(WRITINGS):
        rows = [
            r
            for r in range(*encoded.bounds[doc : doc + 2].tolist())
            if not encoded.flags[r] & SPECIAL
        ]
        spans = [(int(encoded.start[r]), int(encoded.end[r])) for r in rows]
        assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in itertools.pairwise(spans))
        covered = {i for a, b in spans for i in range(a, b)}
        assert not [
            c
            for i, c in enumerate(text)
            if i not in covered and unicodedata.category(c)[0] not in "ZCM"
        ]
        for row, (a, b) in zip(rows, spans, strict=True):
            piece = readable[encoded.token_ids[row]]
            if (
                "\ufffd" not in piece
                and piece not in ("[UNK]", "<unk>")
                and not piece.startswith("<0x")
            ):
                num_pieces += 1
                assert _bare(piece) in _bare(text[a:b])
    assert num_pieces > 80


def _bare(text: str) -> str:
    """Characters alone, without what a normalizer may fold or drop, or write for a space."""
    kept = (
        c
        for c in unicodedata.normalize("NFKD", text)
        if unicodedata.category(c)[0] not in "MC" and c != "\u2581"
    )
    return "".join("".join(kept).lower().split())


@pytest.mark.parametrize("kind", ["byte_level", "unigram"])
def test_the_words_of_a_run_are_those_of_its_texts(
    request: pytest.FixtureRequest,
    kind: str,
    tmp_path: Path,
    make_config: Callable[..., RunConfig],
    tiny_gpt: Path,
) -> None:
    folder = tiny_gpt
    if kind == "unigram":
        encoder: TextEncoder = request.getfixturevalue(kind)
        tokenizer = tmp_path / "tokenizer"
        tokenizer.mkdir()
        encoder._tokenizer.save(str(tokenizer / "tokenizer.json"))
        (tokenizer / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
        )
        size = encoder._tokenizer.get_vocab_size()
        config = transformers.XLMRobertaConfig(
            vocab_size=size,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=66,
            pad_token_id=1,
        )
        folder = save_model(tmp_path / "model", config, tokenizer=tokenizer)
    (tmp_path / "corpus").mkdir()
    write_jsonl(tmp_path / "corpus" / "texts.jsonl", [{"text": t} for t in WRITINGS])
    with afn_ray.run(make_config(model=str(folder), layers="1")) as run:
        rows = run.sql("SELECT doc, text FROM words ORDER BY doc, word").fetchall()
    for doc, text in enumerate(WRITINGS):
        assert "".join("".join(t for d, t in rows if d == doc).split()) == "".join(text.split())


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_words_of_other_tokenizers_start_where_white_space_ends(
    request: pytest.FixtureRequest, kind: str, verses: list[str]
) -> None:
    encoder: TextEncoder = request.getfixturevalue(kind)
    assert encoder.template == Template((), ())
    texts = [" ".join(w for w in v.split() if w.isalpha()) for v in verses[:300]]
    encoded = encoder.encode(texts)
    assert len(encoded.token_ids) > sum(len(t.split()) for t in texts)  # words have pieces
    for doc, text in enumerate(texts):
        words = _words(encoded, doc)
        got = [text[encoded.start[a] : encoded.end[b - 1]].strip() for a, b in words]
        assert got == text.split()
        assert [
            text[encoded.start[a] : encoded.word_end[a]].strip() for a, _ in words
        ] == text.split()
    assert written(encoder, encoder.texts()[1], texts) == [t.split() for t in texts]
    readable = encoder.texts()[1]
    for row, surface in enumerate(surfaces(encoded, texts, readable)):  # nothing was folded
        assert surface is None or readable[encoded.token_ids[row]] in (" ", "\u2581")


@given(st.lists(TEXTS, max_size=3))
@example(["\u3000\u3000 a", "\u2009", "👩‍🚀 \n\n x", "a\u0301 b"])
@example(["ﷺ", "don´t ½", "ि हिि,ि ि", "漢\ufe00字"])
@settings(deadline=None)
@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "split", "unigram"])
def test_no_text_is_lost_or_said_twice(
    request: pytest.FixtureRequest, kind: str, texts: list[str]
) -> None:
    encoder: TextEncoder = request.getfixturevalue(kind)
    encoded = encoder.encode(texts)
    for doc, (text, words) in enumerate(
        zip(texts, written(encoder, encoder.texts()[1], texts), strict=True)
    ):
        assert "".join("".join(words).split()) == "".join(text.split())
        spans = [(int(encoded.start[a]), int(encoded.end[b - 1])) for a, b in _words(encoded, doc)]
        assert all(
            a[1] <= b[0] for a, b in itertools.pairwise(spans)
        )  # a character is in one word only
        assert all(0 <= a <= b <= len(text) for a, b in spans)


def test_the_readable_vocabulary_has_no_marks_of_the_tokenizer(
    byte_level: TextEncoder, metaspace: TextEncoder
) -> None:
    ids = MINILM._tokenizer.get_vocab()
    assert READABLE[ids["##ing"]] == "ing"
    assert READABLE[ids["[SEP]"]] == "[SEP]"
    assert READABLE[ids["#"]] == "#"
    for encoder, piece in ((byte_level, "\u0120the"), (metaspace, "\u2581the")):
        pieces, readable = encoder.texts()
        assert readable[pieces.index(piece)] == "the"
        assert len(pieces) == len(readable) == encoder._tokenizer.get_vocab_size()


# --- texts cut into segments


@pytest.fixture(scope="module")
def spaced(verses: list[str]) -> dict[str, object]:
    """JSON of a tokenizer of bytes that has tokens for runs of white space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    runs = ["a   b    c\n\n\nd \n\n e\t\t f \t\n  "] * 99
    tokenizer.train_from_iterator([*verses[:200], *3 * WRITINGS, *runs], trainer)
    assert {"\u0120\u0120", "\u010a\u010a"} < tokenizer.get_vocab().keys()
    held: dict[str, object] = json.loads(tokenizer.to_str())
    return held


def _changed(held: dict[str, object], **changes: object) -> TextEncoder:
    return TextEncoder(Tokenizer.from_str(json.dumps(held | changes)))


@pytest.fixture(scope="module")
def gpt2(spaced: dict[str, object]) -> TextEncoder:
    """GPT-2: spaces are part of the offsets."""
    after = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    return _changed(spaced, post_processor=after | {"use_regex": True})


@pytest.fixture(scope="module")
def roberta(spaced: dict[str, object]) -> TextEncoder:
    """RoBERTa: spaces are no part of the offsets."""
    ends = {"sep": ["Z", 58], "cls": ["Y", 57]}
    after = {"type": "RobertaProcessing", "trim_offsets": True, "add_prefix_space": False}
    return _changed(spaced, post_processor=after | ends)


@pytest.fixture(scope="module")
def minilm_encoder() -> TextEncoder:
    return MINILM


@pytest.fixture(scope="module")
def llama3(split: TextEncoder) -> TextEncoder:
    """Llama 3: up to three digits are a word; with a token that was added."""
    held = json.loads(split._tokenizer.to_str())
    pattern = held["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    pattern["Regex"] = pattern["Regex"].replace(r"\p{N}|", r"\p{N}{1,3}|")
    held["post_processor"] = {"type": "Sequence", "processors": [held["post_processor"]]}
    tokenizer = Tokenizer.from_str(json.dumps(held))
    tokenizer.add_tokens([AddedToken("<tool_call>"), AddedToken("or", normalized=False)])
    return TextEncoder(tokenizer)


@pytest.fixture(scope="module")
def smollm(spaced: dict[str, object]) -> TextEncoder:
    """SmolLM: GPT-2's pattern after a split at digits."""
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps = [{"type": "Digits", "individual_digits": True}, bytes_ | {"use_regex": True}]
    splitter = {"type": "Sequence", "pretokenizers": steps}
    return _changed(spaced, pre_tokenizer=splitter)


CUT = ["minilm_encoder", "cased", "gpt2", "roberta", "split", "llama3", "smollm"]
NEVER_CUT = ["byte_level", "metaspace", "unigram", "folding"]


def assert_same_by_texts(encoder: TextEncoder, texts: Sequence[str]) -> Encoded:
    """Every array and surface of ``texts`` is the one without segments; returns the tokens."""
    whole = TextEncoder(encoder._tokenizer)
    whole._cut = None  # the slow reference
    replaced = [i % 2 == 0 for i in range(len(texts))]
    got, expected = encoder.encode(texts, replaced), whole.encode(texts, replaced)
    for name in ("bounds", "token_ids", "start", "end", "flags", "word_end"):
        a, b = getattr(got, name), getattr(expected, name)
        assert a.dtype == b.dtype and np.array_equal(a, b), name
    assert got.problems == expected.problems
    surfaces(got, texts, readable_of(encoder))
    return got


@functools.cache
def readable_of(encoder: TextEncoder) -> list[str]:
    return encoder.texts()[1]


PARTS = [
    "the",
    " the",
    " and",
    "God",
    " LORD",
    "   ",
    "\n",
    " \n\n",
    " \t",
    "s",
    "'s",
    "12",
    " 345",
]
WORDED = st.lists(st.sampled_from(PARTS), max_size=12).map("".join)


@given(st.lists(TEXTS | WORDED, max_size=4))
@example(
    ["a \u0301b", "\u0301 a", " a  b\n\nc \n", "a\u2009 b", "a \x00b \x00", "\x85 \x1c x \x1c"]
)
@example(["[SEP] [UNK] </s> <|endoftext|> a", "don't ' s 's 12 ½", "\ufffd a\ufffd \ufffdb"])
@example([" <tool_call> x<tool_call>  for or  or\n or", "12345 1 2  3\n4 \n 5a 6", ".\n\n. .\n  ."])
@settings(deadline=None)
@pytest.mark.parametrize("kind", CUT)
def test_segments_have_the_tokens_of_whole_texts(
    request: pytest.FixtureRequest, kind: str, texts: list[str]
) -> None:
    encoder: TextEncoder = request.getfixturevalue(kind)
    with mock.patch.object(encode, "MOST_DISTINCT", math.inf):  # however few are the same
        got = assert_same_by_texts(encoder, [*texts, *reversed(texts)])
    assert got.same is not None


@pytest.mark.parametrize("kind", CUT)
def test_segments_of_a_corpus_have_the_tokens_of_whole_texts(
    request: pytest.FixtureRequest, kind: str, verses: list[str]
) -> None:
    texts = [*verses[:700], *WRITINGS, "", *WRITINGS, SPACED]
    encoder: TextEncoder = request.getfixturevalue(kind)
    with mock.patch.object(encoder, "_batch", wraps=encoder._batch) as batch:
        got = assert_same_by_texts(encoder, texts)
    assert got.same is not None
    (encoded,) = batch.call_args_list  # the segments alone, and few of them
    assert sum(map(len, encoded.args[0])) < sum(map(len, texts)) / 4


@pytest.mark.parametrize("kind", NEVER_CUT)
def test_texts_of_other_tokenizers_are_never_cut(
    request: pytest.FixtureRequest, kind: str, verses: list[str]
) -> None:
    encoder: TextEncoder = request.getfixturevalue(kind)
    assert encoder._cut is None
    assert assert_same_by_texts(encoder, verses[:100]).same is None


@pytest.mark.parametrize(
    "token",
    [
        AddedToken("in the"),
        AddedToken("God", lstrip=True),
        AddedToken("God", rstrip=True),
        AddedToken("God", single_word=True),
    ],
)
def test_tokens_added_to_a_vocabulary_forbid_cutting(token: AddedToken, verses: list[str]) -> None:
    tokenizer = Tokenizer.from_file(str(FILE))
    tokenizer.add_tokens([token])
    encoder = TextEncoder(tokenizer)
    assert find_cut(tokenizer) is None
    got = assert_same_by_texts(encoder, verses[:20])
    assert tokenizer.token_to_id(token.content) in got.token_ids


def test_a_random_or_changed_tokenizer_is_not_cut(gpt2: TextEncoder) -> None:
    def changed(encoder: TextEncoder, part: str, **changes: object) -> Tokenizer:
        held = json.loads(encoder._tokenizer.to_str())
        held[part] = (held[part] or {}) | changes
        return Tokenizer.from_str(json.dumps(held))

    assert find_cut(changed(gpt2, "model")) and find_cut(changed(MINILM, "model"))
    assert not find_cut(changed(gpt2, "model", dropout=0.1))
    assert not find_cut(changed(gpt2, "pre_tokenizer", add_prefix_space=True))
    assert not find_cut(changed(gpt2, "pre_tokenizer", use_regex=False))
    assert not find_cut(changed(gpt2, "post_processor", trim_offsets=True))
    assert not find_cut(
        changed(gpt2, "normalizer", type="Replace", pattern={"String": " "}, content="_")
    )
    assert not find_cut(changed(MINILM, "normalizer", type="Prepend", prepend="x"))
    assert not find_cut(changed(MINILM, "pre_tokenizer", type="Whitespace"))


def test_texts_of_few_equal_segments_are_encoded_whole() -> None:
    assert MINILM.encode(["every word is another one"]).same is None
    assert MINILM.encode(["again and again and again and again"]).same is not None


def test_equal_numbers_are_equal_words(verses: list[str]) -> None:
    texts = verses[:500]
    encoded = MINILM.encode(texts)
    assert encoded.same is not None
    rows = np.flatnonzero((encoded.flags & SPECIAL) == 0)
    seen: dict[int, tuple[object, ...]] = {}
    written: list[tuple[object, ...]] = []
    for row, number in zip(rows.tolist(), encoded.same.tolist(), strict=True):
        text = texts[encoded.docs[row]]
        piece = text[encoded.start[row] : max(encoded.end[row], encoded.word_end[row])]
        written.append((piece, int(encoded.token_ids[row]), int(encoded.flags[row])))
        assert seen.setdefault(number, written[-1]) == written[-1]
    assert len(seen) < len(written) / 3
