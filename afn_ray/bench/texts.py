"""Generate models that need no download, and texts of planned lengths for any model."""

from __future__ import annotations

import itertools
import json
import random
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from afn_ray.errors import ConfigError
from afn_ray.tokens import encode
from afn_ray.tokens import windows as tokens

VOCABULARY = 30_522
"""Vocabulary size of BERT-base, in types."""
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""Special tokens of BERT, in the order of their ids."""
SEED = 20_260
SHORTEST = 4
"""Length of the shortest text, in tokens, including special tokens."""
RUNS = 16
"""Sampling interval of the planned lengths: one run in this many is kept."""
WINDOWS = 4
"""Largest length of a text in the mixed profile, in windows."""
SPREAD = {"short": (40, 1.0), "mixed": (150, 1.1)}
"""Mean length in tokens, and standard deviation of the length's logarithm, by profile.

Padded batches of 32 random texts are then 20 % text; for paragraphs of documentation the measured
share is 14-25 %.
"""
CANDIDATES = 20_000
"""Largest number of types that are tested as words of the texts."""
ZIPF = 2.7
"""Rank offset of the Zipf-Mandelbrot law of word frequencies."""


def save_bert(folder: Path, **changes: Any) -> Path:
    """Save a BERT-base with random weights and a tokenizer of made-up words in ``folder``.

    ``changes`` override its ``BertConfig``. Returns ``folder``.
    """
    config = transformers.BertConfig(**{"vocab_size": VOCABULARY} | changes)
    _save_tokenizer(folder, config.vocab_size, config.max_position_embeddings)
    return _save_weights(folder, config)


def save_bert_with(tokenizer: tokenizers.Tokenizer, folder: Path, **changes: Any) -> Path:
    """Like ``save_bert``, with ``tokenizer``."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    of_class = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(of_class))
    return _save_weights(folder, transformers.BertConfig(**changes))


def _save_weights(folder: Path, config: transformers.BertConfig) -> Path:
    """Save a model of ``config`` with random weights in ``folder``; return ``folder``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = transformers.BertModel(config)
        with torch.no_grad():
            for name, value in model.named_parameters():
                # With the initial weights every norm is sqrt(hidden size). With random ones it
                # differs by token and by layer.
                if name.endswith("LayerNorm.weight"):
                    value.copy_(torch.randn_like(value).exp())
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    return folder


def _save_tokenizer(folder: Path, size: int, context: int) -> None:
    """Save a tokenizer of ``size`` types in ``folder``; ``context`` is its longest input."""
    pieces = [*SPECIAL, *string.ascii_lowercase]
    pieces += [f"##{letter}" for letter in string.ascii_lowercase]
    pieces += _made_up_words(size - len(pieces))
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))  # noqa: S106
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    assert len(vocabulary) == size
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        **dict(zip(roles, SPECIAL, strict=True)),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _made_up_words(number: int) -> list[str]:
    """So many different words of one to four syllables."""
    rng = random.Random(SEED)  # noqa: S311 - nothing here is a secret
    syllables = [a + b for a, b in itertools.product("bcdfghjklmnprstvwz", "aeiou")]
    words: dict[str, None] = {}
    while len(words) < number:
        num_syllables = rng.randint(1, 4)
        word = "".join(rng.choices(syllables, k=num_syllables))
        words[word] = None
    return list(words)


@dataclass(frozen=True, slots=True)
class Piece:
    """One window of a text, as a separate text."""

    text: str
    keep_start: int  # tokens keep_start to keep_end are recorded, including special ones
    keep_end: int
    length: int  # in tokens


@dataclass(frozen=True)
class Text:
    """A text, and its windows for variants that cannot cut windows."""

    text: str
    pieces: tuple[Piece, ...]

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of the whole text; each is recorded in exactly one window."""
        return sum(p.keep_end - p.keep_start for p in self.pieces)


def plan_lengths(profile: str, num_tokens: int, window: int, run_tokens: int) -> list[int]:
    """Lengths of texts in tokens, including special tokens, in random order.

    Their sum is at most ``num_tokens``, except for a single text. The lengths are a sample of a
    corpus ``RUNS`` times as long: it is sorted by length and cut into runs of ``run_tokens``
    tokens, and one run in ``RUNS`` is kept. A text then has as many neighbours of nearly the same
    length as in the long corpus. Variants that sort by length therefore pad as little: 1 %, where
    a small sample of single texts has 14 %.
    """
    if profile == "full":
        return [window] * max(1, num_tokens // window)
    mean, sigma = SPREAD[profile]
    normal = NormalDist(np.log(mean) - sigma**2 / 2, sigma)
    n = max(2, round(num_tokens / mean)) * RUNS
    longest = window if profile == "short" else WINDOWS * window
    corpus: list[int] = []
    for i in range(n):
        quantile = normal.inv_cdf((i + 0.5) / n)
        length = round(float(np.exp(quantile)))
        corpus.append(min(longest, max(SHORTEST, length)))
    # Limit the length of a run, so that a small sample has several runs and many lengths.
    run_tokens = max(1, min(run_tokens, num_tokens // 8))
    runs = list(budgeted(corpus, run_tokens))
    lengths: list[int] = []
    for run in runs[RUNS // 2 :: RUNS]:
        lengths += [corpus[i] for i in run]
    random.Random(SEED).shuffle(lengths)  # noqa: S311
    while len(lengths) > 1 and sum(lengths) > num_tokens:
        lengths.pop()
    return lengths


def budgeted(lengths: list[int], budget: int) -> Iterator[list[int]]:
    """Indices of ``lengths`` by batch: sorted, and at most ``budget`` tokens with padding.

    A text that is longer than ``budget`` is alone.
    """
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if group and lengths[i] * (len(group) + 1) > budget:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


class Writer:
    """Writes texts from the whole words of a tokenizer's vocabulary, with Zipf frequencies.

    Raises ``ConfigError`` when the tokenizer has fewer than two such words.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, window: int) -> None:
        self._encoder = encode.TextEncoder(tokenizer)
        self._width, self._overlap = tokens.window_sizes(window, None, self._encoder.template)
        self._window = window
        self._words = self._whole_words()
        if len(self._words) < 2:
            raise ConfigError(
                "the tokenizer has no whole words to write texts in; measure another model"
            )
        frequencies = [1 / (rank + ZIPF) for rank in range(len(self._words))]
        self._weights = list(accumulate(frequencies))

    def _whole_words(self) -> list[str]:
        """Words that are one token at every position: n of them are n tokens."""
        types = dict.fromkeys(self._encoder.texts()[1])  # without duplicates, in order
        readable = [text for text in types if _is_readable(text)]
        candidates = readable[:CANDIDATES]
        encoded = self._encoder.encode([f"{word} {word}" for word in candidates])
        num_expected = 2 + self._encoder.template.num_special
        words = []
        for word, num_tokens in zip(candidates, np.diff(encoded.bounds), strict=True):
            if num_tokens == num_expected:
                words.append(word)
        return words

    def write(self, profile: str, num_tokens: int, run_tokens: int, *, causal: bool) -> list[Text]:
        """Texts of ``profile`` with the lengths of ``plan_lengths``.

        ``causal``: cut their windows as for a decoder.
        """
        rng = random.Random(f"{SEED} {profile}")  # noqa: S311
        template = self._encoder.template
        texts = []
        for length in plan_lengths(profile, num_tokens, self._window, run_tokens):
            num_words = max(1, length - template.num_special)
            words = rng.choices(self._words, cum_weights=self._weights, k=num_words)
            texts.append(" ".join(words))
        encoded = self._encoder.encode(texts)
        windows = tokens.make_windows(encoded, template, self._width, self._overlap, causal)
        pieces: list[list[Piece]] = [[] for _ in texts]
        num_prefix = len(template.prefix)
        num_suffix = len(template.suffix)
        for window in windows:
            at = int(np.searchsorted(encoded.bounds, window.row, side="right")) - 1
            first = window.row + num_prefix
            last = window.row + window.length - num_suffix - 1
            begin = 0
            if window.row > encoded.bounds[at]:
                # Keep the space before the window: many tokens contain it, but their offsets do
                # not.
                begin = encoded.end[first - 1]
            text = texts[at][begin : encoded.end[last]]
            pieces[at].append(Piece(text, window.keep_start, window.keep_end, window.length))
        return [Text(text, tuple(parts)) for text, parts in zip(texts, pieces, strict=True)]


def _is_readable(text: str) -> bool:
    """True if ``text`` is a word of at least two ASCII letters."""
    return len(text) > 1 and text.isalpha() and text.isascii()


def share(texts: Sequence[Text], parts: int) -> list[list[int]]:
    """Indices of the texts of each of ``parts`` workers, in order.

    All workers have about the same number of tokens, and texts of all lengths.
    """
    order = sorted(range(len(texts)), key=lambda i: -texts[i].num_tokens)
    given: list[list[int]] = [[] for _ in range(parts)]
    load = [0] * parts
    for i in order:
        least = load.index(min(load))
        given[least].append(i)
        load[least] += texts[i].num_tokens
    return [sorted(indices) for indices in given]


def sample(texts: list[Text], one_in: int) -> list[int]:
    """Indices of one text in ``one_in``, over all lengths, in order; at least one text."""
    order = sorted(range(len(texts)), key=lambda i: texts[i].num_tokens)
    chosen = order[one_in // 2 :: one_in] or order[:1]
    return sorted(chosen)
