"""A labelled corpus: tags are read in every shape, each lands on its tokens, and classes everywhere
are the tags.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

import afn_ray
from afn_ray import schema
from afn_ray.analysis import claims, explain, masking, verify
from afn_ray.classes import CLASSES, in_order, upos_classes
from afn_ray.cli import commands
from afn_ray.config import RunConfig
from afn_ray.corpus import listing as corpus
from afn_ray.corpus import tags
from afn_ray.corpus_values import Shard, Span
from afn_ray.errors import ConfigError, CorpusError
from afn_ray.reduce import compare
from afn_ray.reduce.stats import wilson
from afn_ray.show.summary import summarise
from afn_ray.store import manifest
from afn_ray.tokens import encode
from conftest import config_of, recommit, write_jsonl
from test_corpus import COMPRESS, OPTIONS, jsonl, one, parquet, read_all, remember

TAGS = dataclasses.replace(OPTIONS, labels="tags")


# --- cells
# -----------------------------------------------------------------------------------------------

GOOD: list[tuple[object, object, str, list[Span]]] = [
    (["The", "old dog", "", "."], ["DET", None, "X", "PUNCT"], "The old dog  .",
     [Span(0, 3, "DET"), Span(13, 14, "PUNCT")]),
    (["a", "b"], [0, 12], "a b", [Span(0, 1, "0"), Span(2, 3, "12")]),
    ("The  old\ndog", ["DET", "", "NOUN"], "The  old\ndog",
     [Span(0, 3, "DET"), Span(9, 12, "NOUN")]),
    ("née 漢字", ["ADJ", "NOUN"], "née 漢字", [Span(0, 3, "ADJ"), Span(4, 6, "NOUN")]),
    ("Ann met Bob", [{"start": 8, "end": 11, "label": "PER"},
                     {"start": 0, "end": 3, "label": "PER", "id": 1}],
     "Ann met Bob", [Span(0, 3, "PER"), Span(8, 11, "PER")]),
    ("Ann met Bob", [[0, 3, "PER"], [3, 3, "nothing"]], "Ann met Bob", [Span(0, 3, "PER")]),
    ("Ann met Bob", [], "Ann met Bob", []),
    ("", [], "", []),
    ([], [], "", []),
]  # fmt: skip
BAD: list[tuple[object, object, str]] = [
    ("a b", "X Y", "tags is str, expected a list of tags or of spans"),
    ("a b", None, "tags is null, expected a list of tags or of spans"),
    ("a b", {"0": "X"}, "tags is dict, expected a list"),
    (7, ["X"], "text is int, expected a string or a list of words"),
    (["a", None], ["X", "Y"], "text: word 1 is null, expected a string"),
    (["a", "b"], ["X"], "tags has 1 tag, expected 2: one for each word"),
    (["a"], [], "tags has 0 tags, expected 1"),
    ("a b", ["X", "Y", "Z"], "tags has 3 tags, expected 2"),
    ("a b", ["X", 1.5], "tags: tag 1 is float, expected a string or a whole number"),
    ("a b", ["X", True], "tags: tag 1 is bool"),
    ("a b", ["X", ["Y"]], "tags: tag 1 is list"),
    ("a b", ["X", "Y" * 101], "tags: tag 1 has 101 characters, expected at most 100"),
    (
        "a b",
        ["X", "a\x1b[2J"],
        r"tags: tag 1 is 'a\\x1b\[2J', expected characters that can be printed",
    ),
    (
        "a b",
        ["X", "special"],
        "tags: tag 1 is 'special', the name for tokens without a tag",
    ),
    ("a b", ["X", "untagged"], "tags: tag 1 is 'untagged'"),
    (
        "a b",
        [{"start": 0, "end": 4, "label": "X"}],
        "tags: span 0 is 0 to 4, expected 0 to 3, the characters of the",
    ),
    ("a b", [{"start": -1, "end": 1, "label": "X"}], "tags: span 0 is -1 to 1"),
    ("a b", [{"start": 2, "end": 1, "label": "X"}], "tags: span 0 is 2 to 1"),
    ("a b", [{"start": 0, "label": "X"}], "tags: span 0 is not start, end"),
    ("a b", [[0, 1]], "tags: span 0 is not start, end"),
    ("a b", [["0", 1, "X"]], "tags: span 0 is not start, end"),
    ("a b", [[True, 1, "X"]], "tags: span 0 is not start, end"),
    (
        "a b",
        [[0, 2, "X"], [1, 3, "Y"]],
        "tags: spans 0 to 2 and 1 to 3 overlap, expected one tag for a character",
    ),
]


@pytest.mark.parametrize(("text", "labels", "expected", "spans"), GOOD)
def test_every_shape_of_cells(
    text: object, labels: object, expected: str, spans: list[Span]
) -> None:
    document = one(jsonl({"text": text, "tags": labels}), "jsonl", TAGS)
    assert (document.text, list(document.tags), document.problem) == (expected, spans, None)
    assert one(jsonl({"text": text, "tags": labels}), "jsonl").tags == ()  # nobody asked


@pytest.mark.parametrize(("text", "labels", "why"), BAD)
def test_what_is_no_tag_quarantines_its_document_alone(
    text: object, labels: object, why: str
) -> None:
    good = {"text": "a", "tags": ["X"]}
    documents = read_all(remember(jsonl(good, {"text": text, "tags": labels}, good), "jsonl"), TAGS)
    assert [d.problem is None for d in documents] == [True, False, True] and documents[1].tags == ()
    with pytest.raises(ValueError, match=why):
        tags.from_cells(text, labels, "text", "tags")
    assert re.match(why, str(documents[1].problem))


def test_a_line_without_tags_and_one_nested_too_deeply() -> None:
    deep = b'{"text": "a", "tags": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"
    data = jsonl({"text": "a"}) + deep + jsonl({"text": "b", "tags": [1]})
    lacks, nested, last = read_all(remember(data, "jsonl"), TAGS)
    assert lacks.problem == "no column 'tags'; it has: text" and "nested too deeply" in str(
        nested.problem
    )
    assert last.tags == (Span(0, 1, "1"),)


@pytest.mark.parametrize("kind", ["words", "text", "spans", "large", "numbers", "dictionary"])
def test_parquet_has_the_same_shapes(tmp_path: Path, kind: str) -> None:
    words, names = [["Ann", "ran"], ["x"], [], ["b", "c"]], [["PER", None], ["O"], [], ["O"]]
    text: Any = pa.array([" ".join(w) for w in words] if kind in ("text", "spans") else words)
    labels: Any = pa.array(names)
    expected: list[tuple[Span, ...] | None] = [(Span(0, 3, "PER"),), (Span(0, 1, "O"),), (), None]
    if kind == "spans":
        labels = pa.array(
            [
                [{"start": 0, "end": 3, "label": "PER"}],
                [{"start": 0, "end": 1, "label": "O"}],
                [],
                [{"start": 0, "end": 9, "label": "O"}],
            ]
        )
    elif kind == "large":
        text = text.cast(pa.large_list(pa.large_string()))
    elif kind == "numbers":
        labels = pa.array([[1, None], [0], [], [0]])
        expected[:2] = [(Span(0, 3, "1"),), (Span(0, 1, "0"),)]
    elif kind == "dictionary":
        labels = labels.cast(pa.list_(pa.dictionary(pa.int32(), pa.string())))
    file = parquet(
        tmp_path / "a.parquet",
        {"text": text, "tags": labels, "other": list(range(4))},
        row_group_size=3,
    )
    documents = read_all(file, TAGS, 1)
    assert [d.tags if d.problem is None else None for d in documents] == expected
    assert [d.text for d in documents[:3]] == ["Ann ran", "x", ""]
    why = "tags: span 0 is 0 to 9" if kind == "spans" else "tags has 1 tag, expected 2"
    assert str(documents[3].problem).startswith(why)


def test_parquet_of_other_tags_is_another_slice_and_bad_utf8_another_reason(tmp_path: Path) -> None:
    one_, two = (
        parquet(tmp_path / f"{name}.parquet", {"text": ["a"], "tags": [[name]]})
        for name in ("x", "y")
    )
    shas = [corpus.cut(f, TAGS, 1)[0].sha256 for f in (one_, two)]
    assert shas[0] != shas[1]  # a tag is a part of what is read
    assert len({corpus.cut(f, OPTIONS, 1)[0].sha256 for f in (one_, two)}) == 1
    bad = pa.array([[b"\xff"], [b"b"]], pa.list_(pa.binary())).view(pa.list_(pa.string()))
    first, second = read_all(
        parquet(tmp_path / "bad.parquet", {"text": bad, "tags": [["X"], ["X"]]}), TAGS
    )
    assert first.problem == "text is UnicodeDecodeError, expected a string or a list of words"
    assert second.tags == (Span(0, 1, "X"),)


def test_shards_without_labels_have_the_ids_that_they_had() -> None:
    file = remember(jsonl({"text": "a", "tags": ["X"]}), "jsonl")
    cut = corpus.cut(file, OPTIONS, 1)
    assert OPTIONS.identity("jsonl") == ["text", None, 1 << 20]
    assert (
        Shard.of(cut, OPTIONS).id
        != Shard.of(cut, TAGS).id
        != Shard.of(cut, replace(TAGS, labels="ner")).id
    )
    assert OPTIONS.identity("txt") == TAGS.identity("txt")
    assert OPTIONS.identity("conllu") == replace(
        OPTIONS, labels="upos", text_column="other"
    ).identity("conllu")


def test_what_cannot_have_tags_is_refused(
    tmp_path: Path, make_config: Callable[..., RunConfig]
) -> None:
    for format in ("csv", "txt"):
        (tmp_path / f"a.{format}").write_text("text,tags\na,b\n")
        files, _ = corpus.list_files([str(tmp_path / f"a.{format}")], TAGS)
        with pytest.raises(
            CorpusError,
            match=rf"labels is 'tags', but .*a\.{format} is {format}, which has no column",
        ):
            corpus.check_columns(files, TAGS)
    config = make_config(corpus=(str(tmp_path / "a.csv"),), format="conllu", labels="feats")
    with pytest.raises(
        CorpusError, match=r"labels is 'feats', but .*a\.csv is conllu, which has upos and xpos"
    ):
        afn_ray.run(config)
    with pytest.raises(ConfigError, match="labels is empty"):
        make_config(labels="")
    files = [parquet(tmp_path / "a.parquet", {"text": ["a"]})]
    with pytest.raises(CorpusError, match="no column 'tags'"):
        corpus.check_columns(files, TAGS)


# --- CoNLL-U
# ---------------------------------------------------------------------------------------------

SAMPLE = """\
# sent_id = river-1
# text = The old dog barked at Rivera.
1	The	the	DET	DT	Definite=Def|PronType=Art	3	det	_	_
2	old	old	ADJ	JJ	Degree=Pos	3	amod	_	_
3	dog	dog	NOUN	NN	Number=Sing	4	nsubj	_	_
4	barked	bark	VERB	VBD	Mood=Ind|Tense=Past|VerbForm=Fin	0	root	_	_
5	at	at	ADP	IN	_	6	case	_	_
6	Rivera	Rivera	PROPN	NNP	Number=Sing	4	obl	_	SpaceAfter=No
7	.	.	PUNCT	.	_	4	punct	_	_

# sent_id = river-2
# text = They don't.
1	They	they	PRON	PRP	Case=Nom	2	nsubj	_	_
2-3	don't	_	_	_	_	_	_	_	Gloss=x|SpaceAfter=No
2	do	do	AUX	VBP	_	0	root	_	SpaceAfter=No
3	n't	not	PART	RB	_	2	advmod	_	_
3.1	bark	bark	VERB	VB	_	_	_	2:conj	_
4	.	.	PUNCT	.	_	2	punct	_	_
"""


def words_of(conllu: str, column: int = 3) -> list[tuple[str, list[tuple[str, str]]]]:
    """Text as ``# text`` says it, and each surface word with its tag: all that a reader of CoNLL-U
    must get right.
    """
    found = []
    for sentence in conllu.strip().split("\n\n"):
        (text,) = (line[9:] for line in sentence.split("\n") if line.startswith("# text = "))
        rows = [
            line.split("\t")
            for line in sentence.split("\n")
            if line[0] != "#" and "." not in line.split("\t")[0]
        ]
        joined: dict[int, tuple[str, int]] = {}
        for row in rows:
            if "-" in row[0]:
                a, b = map(int, row[0].split("-"))
                joined |= dict.fromkeys(range(a, b + 1), (row[1], a))
        words: dict[tuple[str, int], list[str]] = {}
        for row in rows:
            if "-" not in row[0]:
                words.setdefault(joined.get(int(row[0]), (row[1], int(row[0]))), []).append(
                    row[column]
                )
        found.append((text, [(form, "+".join(t)) for (form, _), t in words.items()]))
    return found


@pytest.mark.parametrize("ending", ["conllu", *(f"conllu.{c}" for c in COMPRESS)])
@pytest.mark.parametrize("labels", [None, "upos", "xpos"])
def test_conllu_gives_the_text_of_its_comments_and_the_tag_of_every_word(
    ending: str, labels: str | None
) -> None:
    data = COMPRESS.get(ending[7:], bytes)(b"\xef\xbb\xbf" + SAMPLE.replace("\n", "\r\n").encode())
    documents = read_all(remember(data, ending), replace(OPTIONS, labels=labels))
    expected = words_of(SAMPLE, 4 if labels == "xpos" else 3)
    assert [d.text for d in documents] == [text for text, _ in expected]
    assert [[(d.text[s.start : s.end], s.tag) for s in d.tags] for d in documents] == [
        words for _, words in expected
    ]
    assert [d.doc_id for d in documents] == ["river-1", "river-2"]


def test_a_newdoc_begins_a_document_of_sentences() -> None:
    first, second = SAMPLE.split("\n\n")
    second = second.replace(
        "4\t.\t.\tPUNCT\t.\t_\t2\tpunct\t_\t_", "4\t.\t.\tPUNCT\t.\t_\t2\tpunct\t_\tSpaceAfter=No"
    )
    blocks = [
        "# a note",
        first,
        f"# newdoc id = tale\n{first}",
        second,
        first + "\n",
        f"# newdoc\n# newpar\n{second}",
        "# newdoc id = empty",
        "# newdoc id = last",
        second,
    ]
    alone, tale, unnamed, empty, last = read_all(remember("\n\n".join(blocks).encode(), "conllu"))
    dog, they = "The old dog barked at Rivera.", "They don't."
    assert (alone.text, alone.doc_id, tale.doc_id, unnamed.doc_id) == (dog, "river-1", "tale", None)
    assert (
        tale.text == f"{dog} {they}{dog}" and len(tale.tags) == 7 + 3 + 7
    )  # SpaceAfter=No between sentences as well
    assert (empty.text, empty.problem, empty.doc_id, last.doc_id, last.text) == (
        "",
        None,
        "empty",
        "last",
        they,
    )


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("\tJJ\tDegree=Pos\t3\tamod\t_\t_", "", "line 4 has 4 columns, expected 10"),
        ("2\told\told\tADJ\tJJ\tDegree=Pos\t3\tamod\t_\t_\n", "", "line 4 is word '3', expected 2"),
        ("2\told\told", "two\told\told", "line 4 is word 'two', expected 2"),
        ("2\told\told", "1\told\told", "line 4 is word '1', expected 2"),
        ("2\told\told", "2\t \told", "line 4 has no form"),
        (
            "2\told\told\tADJ",
            "2\told\told\tA\x07J",
            "the tag of 'old' is 'A.x07J', expected characters that can",
        ),
        ("2\told\told\tADJ", "2\told\told\tspecial", "the tag of 'old' is 'special'"),
        ("7\t.\t.", "7-9\t.\t.", "line 9 ends the sentence at word 6, expected 9"),
        ("7\t.\t.", "7-6\t.\t.", "line 9 is word '7-6', expected 7"),
    ],
)
def test_a_damaged_sentence_is_quarantined_alone(old: str, new: str, why: str) -> None:
    assert old in SAMPLE
    bad, good = read_all(remember(SAMPLE.replace(old, new, 1).encode(), "conllu"))
    assert (
        bad.problem is not None
        and bad.problem.startswith("not CoNLL-U: ")
        and good.text == "They don't."
    )
    assert why.replace(".x07", "\\x07") in bad.problem


def test_conllu_is_read_in_bounded_memory_and_what_is_cut_off_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = SAMPLE.split("\n\n")
    cut = gzip.compress(
        "\n".join(SAMPLE.replace("river", str(i * 7919**5 % 10**12)) for i in range(900)).encode()
    )[:-900]
    *whole, broken = read_all(remember(cut, "conllu.gz"))
    assert len(whole) > 900 and {d.problem for d in whole} == {None}
    assert f"truncated or corrupt gz stream after {len(whole)} documents" in str(broken.problem)
    monkeypatch.setattr("afn_ray.corpus.streams.LINE_BYTES", 1)
    small = replace(OPTIONS, max_document_bytes=80)  # at most 640 bytes of CoNLL-U
    blocks = [first, f"# newdoc\n{first}", first, f"# newdoc\n{second}"]
    over = "document of CoNLL-U, or a line of it, is over the limit of 640 bytes or 1048576 lines"
    documents = read_all(remember("\n\n".join(blocks).encode(), "conllu"), small)
    assert [d.problem for d in documents] == [None, over, None]
    long = first.replace(
        "7\t.", "\n".join(f"{i}\tx\tx\tX\tX\t_\t_\t_\t_\t_" for i in range(7, 90)) + "\n90\t."
    )
    documents = read_all(remember(f"{long}\n\n{second}".encode(), "conllu"), small)
    assert [d.problem for d in documents] == [over, None]
    assert documents[0].lost_bytes == len(long.encode()) + 1
    blocks = [f"# newdoc\n{second}", f"# newdoc id = long\n{long}", f"# newdoc\n{second}"]
    documents = read_all(remember("\n\n".join(blocks).encode(), "conllu"), small)
    assert [d.problem for d in documents] == [
        None,
        over,
        None,
    ]  # the long one ends the document before it
    assert documents[1].lost_bytes == len(blocks[1].encode()) + 1


@pytest.mark.parametrize("ending", ["gz", "bz2"])
def test_a_sentence_of_conllu_that_was_read_ahead_of_damage_is_lost_with_the_rest(
    ending: str,
) -> None:
    short, long = (
        f"1\t{word}\t_\tNOUN\t_\t_\t_\t_\t_\t_\n\n" for word in ("x", os.urandom(9000).hex())
    )
    data = COMPRESS[ending]((short + long).encode()) + b"no stream"
    good, bad = read_all(remember(data, f"conllu.{ending}"))
    assert good.problem is None and bad.problem is not None
    assert (
        bad.lost_bytes > 9000
    )  # of the long sentence, which the end of the stream alone would have given


# --- tokens
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["wordpiece", "byte_bpe"])
def test_a_token_has_the_tag_of_its_first_character(
    request: pytest.FixtureRequest, folder: str
) -> None:
    tokenizer = Tokenizer.from_file(str(request.getfixturevalue(folder) / "tokenizer.json"))
    encoder = encode.TextEncoder(tokenizer)
    texts = ["Nebuchadnezzar's  old\n 漢字 dog.", "no tags here", "", "\u00a0née x"]
    of_first = (Span(0, 14, "PROPN"), Span(14, 16, "PART"), Span(23, 25, "NOUN"), Span(29, 30, "X"))
    spans = [of_first, (), (), (Span(1, 4, "ADJ"),)]
    encoded = encoder.encode(texts)
    found = encode.find_tags(encoded, texts, spans)
    for row, tag in enumerate(found):
        doc = int(encoded.docs[row])
        start, end = int(encoded.start[row]), int(encoded.end[row])
        ink = [i for i in range(start, end) if not texts[doc][i].isspace()]
        expected = next((s.tag for s in spans[doc] if ink and s.start <= ink[0] < s.end), None)
        if encoded.flags[row] & schema.SPECIAL:
            assert tag is None
        elif ink or not encoded.flags[row] & schema.WORD_START:
            assert tag == expected
    for doc, of_doc in enumerate(spans):  # no span goes without a token
        assert {s.tag for s in of_doc} == {
            t for t, d in zip(found, encoded.docs, strict=True) if d == doc and t
        }


def test_classes_and_tags_have_one_order() -> None:
    assert in_order(
        ["special", "B-PER", "VERB", "untagged", "X", "A", "NOUN", "PUNCT", "ADP", "NOUN"]
    ) == [
        "NOUN",
        "VERB",
        "ADP",
        "PUNCT",
        "X",
        "A",
        "B-PER",
        "special",
        "untagged",
    ]
    assert in_order(reversed(CLASSES)) == list(CLASSES)
    assert upos_classes(["NOUN", "X", "ADP+DET", "VERB+PRON", "PUNCT", "untagged"]) == {
        "NOUN": "content",
        "ADP+DET": "function",
        "PUNCT": "punctuation",
    }
    assert upos_classes(["NOUN", "B-PER"]) == upos_classes([]) == {}


# --- runs
# ------------------------------------------------------------------------------------------------


def treebank(verses: list[str], folder: Path) -> Path:
    """Verses as CoNLL-U in two files, tagged by a rule that gives one form several tags."""
    folder.mkdir()
    for name, part in (("a.conllu", verses[:40]), ("b.conllu.gz", verses[40:60])):
        sentences = []
        for i, verse in enumerate(part):
            rows = []
            for at, word in enumerate(verse.split(), 1):
                stem = word.strip(",.;:?!")
                ends = word[len(stem) :] if word.startswith(stem) and stem else ""
                tag = ("DET", "NOUN", "VERB", "ADP", "ADJ")[(len(stem) + at % 2) % 5]
                rows.append((stem if ends else word, tag, "SpaceAfter=No" if ends else "_"))
                rows += [(ends, "PUNCT", "_")] if ends else []
            body = "".join(
                f"{n}\t{w}\t_\t{t}\t_\t_\t_\t_\t_\t{m}\n" for n, (w, t, m) in enumerate(rows, 1)
            )
            sentences.append(f"# sent_id = {name}-{i}\n# text = {verse}\n{body}\n")
        data = "".join(sentences).encode()
        (folder / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    return folder


@pytest.fixture(scope="module")
def labelled(
    tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, verses: list[str]
) -> tuple[RunConfig, str]:
    folder = tmp_path_factory.mktemp("labels")
    config = config_of(
        tiny_bert,
        treebank([" ".join(v.split()) for v in verses[:60]], folder / "corpus"),
        folder / "store",
        layers="0,2",
        signals="shift",
        shard_bytes=2048,
    )
    with afn_ray.run(config) as run:
        return config, run.uri


@pytest.fixture(scope="module")
def expected(labelled: tuple[RunConfig, str]) -> list[dict[str, Any]]:
    """Every text token of the corpus by a slow way, with its tag: the word that holds its first
    character.
    """
    config, _ = labelled
    tokenizer = Tokenizer.from_file(str(Path(config.model) / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    found = []
    for name in ("a.conllu", "b.conllu.gz"):
        data = (Path(config.corpus[0]) / name).read_bytes()
        for text, words in words_of(
            (gzip.decompress(data) if name.endswith("gz") else data).decode()
        ):
            at, places = 0, []
            for form, tag in words:
                at = text.index(form, at)
                places.append((at, at := at + len(form), tag))
            encoding = tokenizer.encode(text, add_special_tokens=False)
            for token_id, (start, _) in zip(encoding.ids, encoding.offsets, strict=True):
                (tag,) = (t for a, b, t in places if a <= start < b)
                found.append({"text": text, "token_id": token_id, "start": start, "tag": tag})
    return found


def test_every_token_has_the_tag_of_its_word(
    labelled: tuple[RunConfig, str], expected: list[dict[str, Any]]
) -> None:
    with afn_ray.open_run(labelled[1]) as run:
        got = run.sql(
            "SELECT token_id, start, tag FROM tokens WHERE NOT is_special ORDER BY doc, position"
        ).fetchall()
        assert run.sql(
            "SELECT count(*) FROM tokens WHERE is_special AND tag IS NOT NULL"
        ).fetchall() == [(0,)]
        words = run.sql("SELECT tag, count(*) FROM words GROUP BY ALL").fetchall()
        heads = run.sql(
            "SELECT tag, count(*) FROM tokens WHERE is_word_start GROUP BY ALL"
        ).fetchall()
        ids = run.sql("SELECT doc_id FROM documents ORDER BY doc").fetchall()
    assert got == [(e["token_id"], e["start"], e["tag"]) for e in expected]
    assert sorted(words) == sorted(heads) and len({i for (i,) in ids}) == 60


def test_classes_are_the_files_own_tags_in_every_table(
    labelled: tuple[RunConfig, str], expected: list[dict[str, Any]]
) -> None:
    counts = Counter((e["token_id"], e["tag"]) for e in expected)
    tags_of: dict[int, list[tuple[int, str]]] = {}
    for (token_id, tag), n in counts.items():
        tags_of.setdefault(token_id, []).append((-n, tag))
    class_of = {token_id: min(found)[1] for token_id, found in tags_of.items()}
    assert any(len(found) > 1 for found in tags_of.values())  # else "most frequent" says nothing
    with afn_ray.open_run(labelled[1], baseline=labelled[1]) as run:
        for view in ("vocabulary", "signal_vocabulary", "movers"):
            rows = run.sql(f"SELECT token_id, class FROM {view}").fetchall()
            assert {c for _, c in rows} <= {*class_of.values(), "special"} and len(rows) >= len(
                class_of
            )
            assert all(c == "special" or c == class_of[i] for i, c in rows), view
        sure = run.sql(
            "SELECT token_id, class, class_confidence, is_ambiguous FROM vocabulary"
        ).fetchall()
        for token_id, name, confidence, is_ambiguous in sure:
            found = [-n for n, _ in tags_of.get(token_id, ())] if name != "special" else [1]
            assert confidence == pytest.approx(max(found) / sum(found))
            assert is_ambiguous == (max(found) <= 0.99 * sum(found))
        drift = run.sql("SELECT class, n_a, n_b FROM class_drift WHERE layer = 2").fetchall()
        by_type = Counter(class_of[e["token_id"]] for e in expected)
        assert {c: (a, b) for c, a, b in drift} == {c: (n, n) for c, n in by_type.items()}
        table = run.sql("FROM classes").to_dicts()
        rows = run.sql(
            "SELECT coalesce(tag, 'untagged') AS tag, strength_0, strength_2, high_0, high_2 FROM "
            "tokens "
            "WHERE NOT is_special"
        ).to_arrow_table()
    tag = np.array(rows["tag"].to_pylist())
    assert Counter(tag.tolist()) == Counter(e["tag"] for e in expected)
    assert {(r["layer"], r["class"]) for r in table} == {
        (k, t) for k in (0, 2) for t in set(tag.tolist())
    }
    check_classes(table, rows, tag)
    summary = summarise(manifest.find_run(labelled[1]))
    assert [(c.name, c.n) for c in summary.layers[0].classes] == [
        (c, by_type[c]) for c in in_order(by_type)
    ]


def check_classes(
    table: list[dict[str, Any]], rows: pa.Table, classes: np.ndarray[Any, Any]
) -> None:
    """Rows of the view ``classes`` against numpy on the tokens ``rows``, whose classes are
    ``classes``.
    """
    for row in table:
        here = classes == row["class"]
        values = rows[f"strength_{row['layer']}"].to_numpy()[here]
        high = np.array(rows[f"high_{row['layer']}"].to_pylist())[here]
        quartiles = np.quantile(values, [0.25, 0.5, 0.75], method="inverted_cdf")
        assert [row["q1"], row["q2"], row["q3"]] == quartiles.tolist()
        assert (row["n"], row["n_high"]) == (here.sum(), high.sum())
        assert (
            row["mean"] == pytest.approx(values.astype(np.float64).mean())
            and row["share_high"] == high.mean()
        )
        low, upper = wilson(int(high.sum()), int(here.sum()))
        assert (row["share_high_low"], row["share_high_high"]) == pytest.approx(
            (float(low), float(upper)), rel=1e-12
        )


def test_verify_compare_show_claims_and_report_take_such_a_run(
    labelled: tuple[RunConfig, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config, uri = labelled
    found = verify.verify_store(config.store)
    assert (
        not found.findings and not found.unproved and (found.num_runs, found.num_shards) == (1, 2)
    )
    assert not [r for r in compare.compare(uri, uri).movers.to_pylist() if r["z"]]
    with pytest.raises(SystemExit):
        commands.main(["show", uri])
    said = capsys.readouterr().out
    assert "PUNCT" in said and "of a type its most frequent tag in 'upos'" in said
    assert {t.token_id for t in explain.explain(uri, "In the beginning").tokens} >= {
        1999,
        1996,
        2927,
    }
    with pytest.raises(SystemExit):
        commands.main(["claims", uri])
    said = capsys.readouterr().out
    said = " ".join(said.split())
    assert "Are content words HIGH" in said and "NOUN (control) 0" in said and ", layer 0, " in said
    page = afn_ray.write_report(uri, tmp_path / "page.html").read_text("utf-8")
    assert "PUNCT" in page and "tableau20" in page


def test_the_figures_of_claims_are_those_of_the_tokens_own_tags(
    labelled: tuple[RunConfig, str],
) -> None:
    with afn_ray.open_run(labelled[1]) as run:
        figures = {(f.what, f.of, f.layer): f for f in claims.claims(run).figures}
        rows = run.sql("SELECT tag, high_2 FROM tokens WHERE NOT is_special").fetchall()
    kinds = upos_classes({t for t, _ in rows})
    for name, of in (("content", kinds), ("punctuation", kinds), ("ADP", {t: t for t, _ in rows})):
        high = [h for t, h in rows if of.get(t) == name]
        what = (
            (f"share of {name} that is HIGH", "strength")
            if of is kinds
            else ("share that is HIGH", name)
        )
        assert figures[*what, 2].value == pytest.approx(np.mean(high))
        assert figures[*what, 2].n == len(high)
    assert all(figures["share that is HIGH", t, 0].is_control for t in {t for t, _ in rows})


def test_masking_knows_content_words_by_their_own_tags(labelled: tuple[RunConfig, str]) -> None:
    with afn_ray.open_run(labelled[1]) as run:
        figures, note = masking.check(run, num_documents=20)
    assert {f.of for f in figures} >= {"HIGH content tokens masked", "LOW content tokens masked"}
    assert "is not known" not in note


def test_rare_tags_are_counted_together(
    tmp_path: Path, make_config: Callable[..., RunConfig]
) -> None:
    words = ["the", "beginning", "heaven", "earth"]
    rows = [{"text": [w, "God"], "lemma": [f"tag{i}", "same"]} for i, w in enumerate(words * 8)]
    config = make_config(corpus=(str(write_jsonl(tmp_path / "c.jsonl", rows)),), labels="lemma")
    with afn_ray.run(config) as run:
        figures = [f for f in claims.claims(run).figures if f.claim == "tags"]
        _, note = masking.check(run, num_documents=5)
        ((n,),) = run.sql("SELECT count(*) FROM tokens WHERE NOT is_special").fetchall()
    assert [f.of for f in figures][-1] == "9 rarer tags together" and len(figures) == 25
    assert sum(f.n for f in figures) == n and figures[-1].n == 9
    assert "are content words is not known" in note


def test_verify_finds_a_tag_that_was_changed(
    tmp_path: Path, make_config: Callable[..., RunConfig]
) -> None:
    rows = [
        {"text": ["In", "the", "beginning"], "ner": ["O", "O", "B-TIME"]},
        {"text": ["Then"], "ner": ["O", "O"]},
        {"text": ["the", "the", "beginning", "the"], "ner": ["O", "O", "B-TIME", None]},
    ]
    config = make_config(corpus=(str(write_jsonl(tmp_path / "c.jsonl", rows)),), labels="ner")
    with afn_ray.run(config) as run:
        assert run.info["measure"]["labels"] == "ner"
        assert run.sql("SELECT status FROM documents WHERE doc = 1").fetchall() == [
            ("quarantined: ner has 2 tags, expected 1: one for each word",),
        ]
        assert run.sql("SELECT text, class FROM vocabulary ORDER BY token_id").fetchall() == [
            ("[CLS]", "special"),
            ("[SEP]", "special"),
            ("the", "O"),
            ("in", "O"),
            ("beginning", "B-TIME"),
        ]
        figures = claims.claims(run).figures
        assert [f.of for f in figures if f.claim == "tags"] == ["B-TIME", "O", "untagged"]
        assert not [
            f for f in figures if f.claim == "classes"
        ]  # which of these are content words is not known
    assert not verify.verify_store(config.store).findings
    (file,) = Path(config.store).glob("shards/*/*/*-tokens.parquet")
    table = pq.read_table(file)
    at = table.schema.get_field_index("tag")
    assert table["tag"].to_pylist() == [
        None,
        "O",
        "O",
        "B-TIME",
        None,
        None,
        "O",
        "O",
        "B-TIME",
        None,
        None,
    ]
    changed = pa.array(
        [None, "O", "O", "O", None, None, "O", "O", "B-TIME", None, None]
    ).dictionary_encode()
    pq.write_table(table.set_column(at, table.schema.field(at), changed), file)
    recommit(str(file.parent), "tokens", file.read_bytes())
    (finding,) = verify.verify_store(config.store).findings
    assert finding.kind == "rows" and "not the summary of the tokens" in finding.message


@pytest.fixture(scope="module")
def guessed(
    tmp_path_factory: pytest.TempPathFactory, labelled: tuple[RunConfig, str], verses: list[str]
) -> str:
    """A run of verses without labels."""
    folder = tmp_path_factory.mktemp("guessed")
    corpus = write_jsonl(folder / "c.jsonl", [{"text": t} for t in verses[:9]])
    with afn_ray.run(
        replace(labelled[0], corpus=(str(corpus),), store=str(folder / "store"), layers="2")
    ) as run:
        return run.uri


def test_classes_of_a_run_without_labels_are_guessed(guessed: str) -> None:
    with afn_ray.open_run(guessed) as run:
        assert (
            "tag" not in run.tables()["tokens"] + run.tables()["words"]
            and "labels" not in run.info["measure"]
        )
        rows = run.sql(
            "SELECT strength_2, high_2, class FROM tokens JOIN vocabulary USING (token_id) "
            "WHERE NOT is_special AND class <> 'special'"
        ).to_arrow_table()
        table = run.sql("FROM classes").to_dicts()
    classes = np.array(rows["class"].to_pylist())
    assert {r["class"] for r in table} == {*classes.tolist()}
    check_classes(table, rows, classes)


def test_a_run_without_labels_beside_one_with_them(
    labelled: tuple[RunConfig, str], guessed: str
) -> None:
    with pytest.raises(ConfigError, match="different measures"):
        compare.compare(labelled[1], guessed)
    found = compare.compare(labelled[1], guessed, ranks_only=True)
    assert any(
        "Classes are the tags in 'upos' in A and guessed in B" in note for note in found.notes
    )
    assert {"NOUN", "content"} <= {r["class"] for r in found.classes.to_pylist()}
    assert json.dumps(compare.to_json(found))


def test_documents_without_tags_beside_a_treebank_are_untagged(
    tmp_path: Path, labelled: tuple[RunConfig, str]
) -> None:
    (tmp_path / "a.conllu").write_text(SAMPLE)
    write_jsonl(tmp_path / "b.jsonl", [{"text": "the cat"}])
    with afn_ray.run(
        replace(labelled[0], corpus=(str(tmp_path),), store=str(tmp_path / "store"), layers="2")
    ) as run:
        assert run.info["measure"]["labels"] == "upos"
        rows = run.sql(
            "SELECT DISTINCT text, class FROM vocabulary WHERE text IN ('the', 'cat', 'don')"
        ).fetchall()
        assert sorted(rows) == [("cat", "untagged"), ("don", "AUX+PART"), ("the", "DET")]
        assert run.sql(
            "SELECT text FROM tokens WHERE tag IS NULL AND NOT is_special"
        ).fetchall() == [
            ("the",),
            ("cat",),
        ]
        assert run.sql("SELECT n FROM classes WHERE class = 'untagged'").fetchall() == [(2,)]
