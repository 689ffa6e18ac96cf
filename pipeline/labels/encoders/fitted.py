"""Encoders that are fitted on the train captions and need no weights.

A fitted encoder is a table of terms, the most frequent of the captions: words of two letters or
more, or (`trigrams`) the three-letter pieces of words, which also match `dog` with `dogs`. `lsa`
turns the words' tf-idf into its leading singular directions. The last dimension is left to captions
of no known term: they are like each other and unlike all others.
"""

import re

import numpy as np
import pyarrow as pa

from pipeline.errors import InputError
from pipeline.storage.vector_columns import vector_column, vector_matrix
from schemas.embedding import terms_schema

WORDS = {"analyzer": "word"}
TRIGRAMS = {"analyzer": "char_wb", "ngram_range": (3, 3)}
KINDS: dict = {"tfidf": (WORDS, 1024), "trigrams": (TRIGRAMS, 1024), "lsa": (WORDS, 256)}
LSA_TERMS = 50_000  # words whose tf-idf is decomposed, at most
NAME = re.compile(rf"({'|'.join(KINDS)})(?:-([1-9]\d*))?")


def is_fitted(encoder: str) -> bool:
    """Whether an encoder of this name must be fitted before it encodes."""
    return NAME.fullmatch(encoder) is not None


def fit(encoder: str, texts: list[str]) -> pa.Table:
    """The table of terms of an encoder such as `lsa-256`, fitted on N texts."""
    from sklearn.decomposition import TruncatedSVD

    kind, dim = _kind(encoder)
    vectorizer = _vectorizer(kind, max_features=LSA_TERMS if kind == "lsa" else dim - 1)
    try:
        weights_NT = vectorizer.fit_transform(texts)
    except ValueError as error:  # scikit-learn's "empty vocabulary"
        raise InputError(
            f"encoder {encoder} found no word in {len(texts)} train captions; fit it on captions "
            "of a train split, or choose an encoder that is not fitted"
        ) from error
    columns = [pa.array(vectorizer.get_feature_names_out(), pa.string()), vectorizer.idf_]
    if kind != "lsa":
        return pa.table(columns, schema=terms_schema(None))
    directions = min(dim - 1, *weights_NT.shape)
    svd = TruncatedSVD(directions, n_iter=7, random_state=0).fit(weights_NT)
    columns.append(vector_column(svd.components_.T.astype(np.float32)))
    return pa.table(columns, schema=terms_schema(directions))


def encode(texts: list[str], encoder: str, terms: pa.Table) -> np.ndarray:
    """Unit vectors (N, D) float32 of N texts by the encoder that was fitted to these terms."""
    kind, _ = _kind(encoder)
    vectorizer = _vectorizer(kind, vocabulary=terms["term"].to_pylist())
    vectorizer.idf_ = terms["idf"].to_numpy()
    weights_NT = vectorizer.transform(texts or [""])[: len(texts)]  # none: the width is kept
    is_lsa = kind == "lsa"
    vectors = weights_NT @ vector_matrix(terms["vector"]) if is_lsa else weights_NT.toarray()
    unknown = np.linalg.norm(vectors, axis=1, keepdims=True) < 1e-6
    vectors = np.hstack([vectors * ~unknown, unknown]).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _kind(encoder: str) -> tuple[str, int]:
    """A name's kind and dimensions: ("lsa", 256)."""
    kind, dim = NAME.fullmatch(encoder).groups()
    dim = int(dim or KINDS[kind][1])
    if dim < 2:
        raise InputError(f"encoder {encoder} has {dim} dimensions; give it at least 2")
    return kind, dim


def _vectorizer(kind: str, **settings):
    from sklearn.feature_extraction.text import TfidfVectorizer

    from pipeline.texts import words

    pieces = KINDS[kind][0]
    if pieces is WORDS:
        settings |= {"tokenizer": words.long_terms, "token_pattern": None, "lowercase": False}
    return TfidfVectorizer(**pieces, sublinear_tf=True, **settings)
