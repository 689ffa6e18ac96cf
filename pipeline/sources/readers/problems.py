"""Rows that are set aside: the uri of such a row says why, in place of where its image is.

A source that meets one bad row among good ones gives it `uri=problems.uri("kind: detail, place")`
and an id of its own. `shard` rejects it with those words, counts its kind, and stops above
`shard.failure_budget`.
"""

SCHEME = "problem:"


def uri(reason: str) -> str:
    """The uri of a row that is set aside; the reason's words before its first colon are its kind.

    >>> reason(uri("not JSON: 'a.json' in 0.tar"))
    "not JSON: 'a.json' in 0.tar"
    """
    return SCHEME + reason


def reason(uri: str) -> str | None:
    """Why a row was set aside; None where it was not."""
    return uri.removeprefix(SCHEME) if uri.startswith(SCHEME) else None
