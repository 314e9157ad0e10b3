"""Measure how well screening finds junk that replaces 1 % of the King James verses."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from afn_ray.bench import machine
from afn_ray.config import RunConfig
from afn_ray.query.database import Run
from afn_ray.runs import demo, job
from afn_ray.store import storage, uris

SHARE = 0.01
"""Share of the verses that are replaced by junk."""
# From the Universal Declaration of Human Rights, in German, Spanish, Finnish and French.
FOREIGN = (
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und "
    "Gewissen begabt und sollen einander im Geist der Brüderlichkeit begegnen. Jeder hat das "
    "Recht auf Leben, Freiheit und Sicherheit.",
    "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como están "
    "de razón y conciencia, deben comportarse fraternalmente los unos con los otros. Todo "
    "individuo tiene derecho a la vida.",
    "Kaikki ihmiset syntyvät vapaina ja tasavertaisina arvoltaan ja oikeuksiltaan. Heille on "
    "annettu järki ja omatunto, ja heidän on toimittava toisiaan kohtaan veljeyden hengessä. "
    "Jokaisella on oikeus elämään.",
    "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de "
    "raison et de conscience et doivent agir les uns envers les autres dans un esprit de "
    "fraternité.",
)
BOILERPLATE = (
    "We use cookies to give you the best experience on this site. By going on to use it you accept "
    "our terms of service and our privacy policy. All rights reserved."
)
ROW = "asdfghjkl"
"""Letters of the middle row of a keyboard."""


def _base64(verse: str, dice: random.Random) -> str:
    return base64.b64encode(dice.randbytes(max(12, len(verse) * 3 // 4))).decode()


def _mojibake(verse: str, dice: random.Random) -> str:
    """A foreign text, encoded as UTF-8 and decoded as Latin-1, twice."""
    text = _foreign(verse, dice)
    for _ in range(2):
        text = text.encode().decode("latin-1")
    return text[: len(verse)]


def _foreign(verse: str, dice: random.Random) -> str:
    words = dice.choice(FOREIGN).split()
    begin = dice.randrange(len(words) // 2)
    return " ".join((words * 20)[begin:])[: max(30, len(verse))]


def _boilerplate(verse: str, dice: random.Random) -> str:
    return BOILERPLATE


def _repeated(verse: str, dice: random.Random) -> str:
    """The first words of the verse, repeated to about its length or up to 1,000 times."""
    words = verse.split()
    phrase = " ".join(words[: dice.randint(2, 4)])
    return " ".join(
        [phrase] * dice.choice([len(words) // 3 + 2, 30, 1000 if dice.random() < 0.1 else 60])
    )


def _mash(verse: str, dice: random.Random) -> str:
    text = ""
    while len(text) < len(verse):
        text += "".join(
            dice.choice(ROW + dice.choice(["", "qwertyuiop", "zxcvbnm,;"]))
            for _ in range(dice.randint(3, 12))
        )
        text += dice.choice(" ;,  ")
    return text


KINDS: dict[str, Callable[[str, random.Random], str]] = {
    "base64": _base64,
    "mojibake": _mojibake,
    "foreign language": _foreign,
    "boilerplate": _boilerplate,
    "a phrase repeated": _repeated,
    "keyboard mash": _mash,
}
"""Function that generates the junk in place of a verse, by kind.

Junk is about as long as the verse, except boilerplate and long repetitions.
"""


def plant(verses: list[str], seed: int) -> tuple[list[str], dict[int, str]]:
    """Replace ``SHARE`` of ``verses`` by junk.

    Returns all texts, and the kind of each replaced one by its index.
    """
    dice = random.Random(seed)
    planted = {}
    texts = list(verses)
    for at, doc in enumerate(sorted(dice.sample(range(len(verses)), round(SHARE * len(verses))))):
        kind = list(KINDS)[at % len(KINDS)]
        texts[doc], planted[doc] = KINDS[kind](verses[doc], dice), kind
    return texts, planted


def measure(store: str, seed: int, on_note: Callable[[str], None]) -> dict[str, Any]:
    """Run MiniLM over the verses with junk, and compare the screening with the planted junk."""
    lines = storage.read_bytes(str(demo.corpus_file())).decode().splitlines()
    texts, planted = plant([json.loads(line)["text"] for line in lines], seed)
    corpus = uris.join(uris.absolute(store), f"junk-{seed}.jsonl")
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if not storage.exists(corpus):
        storage.write_once(corpus, data)
    config = RunConfig(
        corpus=(corpus,),
        model=str(demo.model_folder()),
        store=uris.join(uris.absolute(store), "store"),
        layers="2/3",
        dtype="float32",
        shard_bytes=512 << 10,
    )
    with job.run(config, lambda event: on_note(event.message) if event.message else None) as run:
        return {
            **machine.facts("cpu"),
            "documents": len(texts),
            "planted": len(planted),
            "seed": seed,
            **evaluate(run, planted),
        }


def evaluate(run: Run, planted: dict[int, str]) -> dict[str, Any]:
    """Precision and recall of the run's screening, and of two simpler orders.

    Precision is that of the first k texts, where k is the number of planted texts. Documents with
    the same text count once, as the first of them, because a screening has one of them only.
    """
    (layer,) = run.info["layers"]
    first = {
        h: d
        for d, h in run.sql("SELECT doc, text_sha256 FROM documents ORDER BY doc DESC").fetchall()
    }
    texts = {doc: h for h, doc in first.items()}
    kinds = {doc: kind for doc, kind in planted.items() if doc in texts}
    by_idf = """
        WITH f AS (
            SELECT doc, avg(idf) AS x FROM tokens JOIN vocabulary v USING (token_id)
            WHERE NOT is_special AND v.layer = $layer AND v.class <> 'special' GROUP BY doc
        ) SELECT doc FROM f, (SELECT median(x) AS m FROM f) ORDER BY abs(x - m) DESC, doc
    """
    orders: dict[str, list[Any]] = {
        "screening": ["SELECT doc FROM screened ORDER BY rank"],
        "length alone": [
            "SELECT doc FROM documents, (SELECT median(ln(n_tokens)) AS m FROM documents) "
            "ORDER BY abs(ln(n_tokens) - m) DESC, doc"
        ],
        "idf alone": [by_idf, {"layer": layer}],
    }
    found: dict[str, Any] = {}
    of_text = {h: first[h] for h in texts.values()}
    hashes = dict(run.sql("SELECT doc, text_sha256 FROM documents").fetchall())
    k = len(kinds)
    for name, query in orders.items():
        docs = np.array(
            list(dict.fromkeys(of_text[hashes[doc]] for (doc,) in run.sql(*query).fetchall()))
        )
        right = np.isin(docs, list(kinds))
        hits = np.cumsum(right)
        found[name] = {
            "precision": float(right[:k].mean()),
            "recall_twice": float(hits[min(2 * k, len(docs)) - 1] / k),
            "average_precision": float((hits / np.arange(1, len(docs) + 1))[right].sum() / k),
            "kinds": {
                kind: float(np.isin([d for d in kinds if kinds[d] == kind], docs[:k]).mean())
                for kind in KINDS
            },
        }
    return {"texts": k, "orders": found}


def render(result: dict[str, Any], console: Console) -> None:
    """Print a table with a column for each order, and a row for each figure and kind."""
    machine.print_facts(machine.facts("cpu"), console)
    k = result["texts"]
    console.print(
        "\n"
        f"{result['planted']} of {result['documents']:,} verses replaced by junk (seed "
        f"{result['seed']}), {k} different texts; the first {k} texts of each order",
        markup=False,
    )
    table = Table(box=None, pad_edge=False)
    for heading in ("", *result["orders"]):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    orders = result["orders"].values()
    table.add_row("precision = recall", *(f"{o['precision']:.2f}" for o in orders))
    table.add_row(f"recall in the first {2 * k}", *(f"{o['recall_twice']:.2f}" for o in orders))
    table.add_row("average precision", *(f"{o['average_precision']:.2f}" for o in orders))
    for kind in KINDS:
        table.add_row(f"recall of {kind}", *(f"{o['kinds'][kind]:.2f}" for o in orders))
    console.print(table)
