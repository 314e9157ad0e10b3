"""Comments on the columns of a run's views: those of the stored tables,
and of what views derive.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from afn_ray import schema
from afn_ray.columns import comments_of
from afn_ray.query.contents import SMALL

OF_TABLES = {
    **SMALL,
    "labels": schema.THRESHOLDS_SCHEMA,
    "history": schema.HISTORY_SCHEMA,
    "word_vocabulary": schema.WORD_VOCABULARY_SCHEMA,
    "neuron_types": schema.NEURON_TYPES_SCHEMA,
    "mean_vectors": schema.MEAN_VECTORS_SCHEMA,
    "word_salience": schema.SALIENCE_SCHEMA,
    "movers": schema.MOVERS_SCHEMA,
    "word_movers": schema.WORD_MOVERS_SCHEMA,
    "drift": schema.DRIFT_SCHEMA,
    "class_drift": schema.CLASS_DRIFT_SCHEMA,
    "group_drift": schema.GROUP_DRIFT_SCHEMA,
    "group_class_drift": schema.GROUP_CLASS_DRIFT_SCHEMA,
    "group_movers": schema.GROUP_MOVERS_SCHEMA,
}
"""Schemas of the views that show a stored table, whose comments are theirs."""
_DOC = {"doc": "number of the document in the run, from 0; it joins the run's tables"}
_POSITION = {"position": "number of the token in its document, from 0"}
_CHARACTERS = {
    "start": "first character in the text of the document",
    "end": "character after the last",
}
_HIGH = {"high_<k>": "HIGH: at or above Q3 of the run's labels at layer <k>; null: a special token"}
DERIVED_COLUMNS = {
    "tokens": _DOC
    | _POSITION
    | {
        "doc_id": schema.DOCUMENT_COMMENTS["doc_id"],
        "source": schema.DOCUMENT_COMMENTS["source"],
        "token_id": "number of the type in the model's vocabulary",
        "tag": "tag of the token in the corpus",
        "token": "the type in the tokenizer's notation",
        "text": "the type as plain text",
        "surface": "text of the token in the document, where it differs from that of the type",
        "is_special": "the tokenizer's template added the token, which has no text",
        "is_word_start": "the token starts a word",
        "is_replaced": "the token covers a U+FFFD that replaced invalid UTF-8 in the corpus",
        "strength_<k>": "L2 norm of the token's hidden state at layer <k>",
        "quartile_<k>": "1 to 4 by the quartiles of the run's labels at layer <k>; 4 is HIGH; "
        "null: a special token",
        "sink_<k>": "strength_<k> is over sink_factor medians; null: a special token",
        "high_own_<k>": "HIGH by Q3 of the document's own group at layer <k>",
    }
    | _CHARACTERS
    | _HIGH,
    "words": _DOC
    | {
        "position": "position of its first token",
        "word": "number of the word in its document, from 0",
        "text": "the word as it is written",
        "class": "class of the word",
        "n_tokens": "number of its tokens",
        "tag": "tag of its first token in the corpus",
        "max_strength_<k>": "strength of its strongest token at layer <k>",
        "mean_strength_<k>": "mean strength of its tokens at layer <k>",
        "first_strength_<k>": "strength of its first token at layer <k>",
        "last_strength_<k>": "strength of its last token at layer <k>",
    }
    | _CHARACTERS
    | _HIGH,
    "documents": schema.DOCUMENT_COMMENTS
    | _DOC
    | {
        "duplicate_of": "doc of the document of the same text that is counted; null: this one is",
        "near_duplicate_of": "doc of the first document that this one is near to",
        "mean_strength_<k>": "mean strength of its tokens at layer <k>, special ones apart",
        schema.NOT_KEPT: "values of the kept columns that were left out, and why",
    },
    "token_neurons": _DOC
    | _POSITION
    | {
        "neurons_<k>": "neurons of the MLP of layer <k> that are furthest from 0, with their values"
    },
}
"""Comments of the views that are computed from the shards' files; <k> stands for a layer."""


def column_comments(view: str, columns: Sequence[str]) -> dict[str, str]:
    """Comments of ``columns`` of ``view``, by name; those that their name explains are left out."""
    known = DERIVED_COLUMNS.get(view, {})
    if view in OF_TABLES:
        known = comments_of(OF_TABLES[view])
    found = {}
    for column in columns:
        name, layer = column, ""
        if column not in known and (match := re.fullmatch(r"(.*_)(\d+)", column)):
            name, layer = f"{match[1]}<k>", match[2]
        if name in known:
            found[column] = known[name].replace("<k>", layer)
    return found
