"""What an error of MLflow's means for what was to be written: the one place that tells."""

import errno
import re
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

LONGEST = 400  # characters of another program's words
PASSING_CODES = {"TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED"} | {
    *("RESOURCE_EXHAUSTED", "ABORTED", "RESOURCE_CONFLICT", "CANCELLED", "INTERNAL_ERROR"),
}
GONE_CODES = {"RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"}
PASSING_STATUS = {408, 429, 500, 502, 503, 504}
# By name, and of any library: an answer that does not come or breaks off.
NO_ANSWER = {"ConnectionError", "Timeout", "TimeoutError", "HTTPClientError", "EndpointError"} | {
    *("EndpointConnectionError", "ConnectTimeoutError", "ServiceRequestError"),
}
PASSING_ERRNO = {errno.ENOSPC, errno.EDQUOT, errno.EBUSY, errno.EIO, errno.ESTALE, errno.EAGAIN}
ELSEWHERE = (
    "set MLFLOW_TRACKING_URI to http://HOST:5000, or to a database, sqlite:////ABSOLUTE/mlflow.db"
)
# What no waiting mends, for all that is to be written: words of the error; why, where those do not
# say it shortly; what to do. {0} is the database's path, {1} the URI.
LASTING = (
    (
        r"filesystem tracking backend|file store",
        "MLflow no longer writes to folders of files",
        f"{ELSEWHERE}, or set MLFLOW_ALLOW_FILE_STORE=true as well",
    ),
    (
        r"image is malformed|not a database|_alembic_tmp_",
        "",
        "put a copy in its place, or move it away ({0}): a new one is made",
    ),
    (
        r"[Oo]ut-of-date database schema",
        "its tables are of another MLflow than the one here",
        "copy it, then run `mlflow db upgrade {1}`, or install the MLflow that made it",
    ),
    (
        r"Can't locate revision",
        "its tables are of a newer MLflow than the one here",
        "install that one, or take another database",
    ),
    (
        r"readonly database|unable to open database|Errno (2|13|30)\b",
        "",
        "let this user write {0} and its folder",
    ),
    (
        r"unsupported URI|No such scheme|Could not parse|Invalid url|Can't load plugin"
        r"|No connection adapters|Unity Catalog",
        "MLflow knows no such URI",
        ELSEWHERE,
    ),
    (r"not in a valid JSON format", "what answers there is no MLflow server", ELSEWHERE),
    (
        r"CERTIFICATE_VERIFY_FAILED|certificate verify failed|WRONG_VERSION_NUMBER",
        "",
        "set MLFLOW_TRACKING_SERVER_CERT_PATH to the server's certificate, or correct "
        "MLFLOW_TRACKING_URI",
    ),
    (r"No module named", "", "install that package beside mlflow"),
    (r"DNS rebinding|Invalid Host header", "", "name the host in the server's --allowed-hosts"),
)
CREDENTIALS = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
REFUSED = {  # by MLflow's code: why, what to do
    "UNAUTHENTICATED": ("it does not know who asks (401)", CREDENTIALS),
    "CUSTOMER_UNAUTHORIZED": ("it does not know who asks (401)", CREDENTIALS),
    "PERMISSION_DENIED": ("it does not allow that (403)", f"ask whoever runs it, or {CREDENTIALS}"),
    "ENDPOINT_NOT_FOUND": ("there is no MLflow server, or an older one (404)", ELSEWHERE),
    "NOT_IMPLEMENTED": ("it cannot do that (501)", "take a newer server"),
}


class Kind(Enum):
    """What an error says of what could not be written."""

    PASSING = "another try may do better"
    GONE = "its run or experiment is there no more"
    REFUSED = "nothing can be written until somebody mends it"
    UNWRITABLE = "this can never be written; the rest can"


@dataclass(frozen=True)
class Verdict:
    """A kind of error in words: why, and what to do where something can be done."""

    kind: Kind
    why: str
    do: str = ""
    answered: bool = False  # it passes, and a server said so: perhaps of this alone


class RunGone(Exception):
    """A run that was deleted."""


def told_apart(error: BaseException, uri: str, *, files: bool = False) -> Verdict:
    """What an error means; `files` were to be written, artifacts that may lie elsewhere."""
    why = reason(error)
    if isinstance(error, RunGone):
        return Verdict(Kind.GONE, why)
    path = uri.removeprefix("sqlite:///")
    code = getattr(error, "error_code", None)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if not files:
        for words, shortly, do in LASTING:
            if re.search(words, str(error)):
                where = "on the server, its database" if uri.startswith("http") else path
                return Verdict(Kind.REFUSED, shortly or why, do.format(where, uri))
    if code in REFUSED:
        return Verdict(Kind.UNWRITABLE if files else Kind.REFUSED, *REFUSED[code])
    if code in GONE_CODES:
        return Verdict(Kind.GONE, why)
    if _passes(error, code, status, files):
        answered = status in PASSING_STATUS or "error responses" in str(error)
        return Verdict(Kind.PASSING, why, answered=answered)
    return Verdict(Kind.UNWRITABLE, why)


def _passes(error: BaseException, code: str | None, status: int | None, files: bool) -> bool:
    if code == "INTERNAL_ERROR" and files:  # also what MLflow says of all else
        return "API request to" in str(error)
    if code is not None:
        return code in PASSING_CODES
    for one in _chain(error):
        names = {kind.__name__ for kind in type(one).__mro__}
        if status in PASSING_STATUS or getattr(one, "errno", None) in PASSING_ERRNO:
            return True
        if NO_ANSWER & names:
            return status is None
        if isinstance(one, sqlite3.OperationalError) or names >= {"OperationalError", "DBAPIError"}:
            return True
    return bool(re.search(r"SlowDown|ServiceUnavailable|InternalError|RequestTimeout", str(error)))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def reason(error: BaseException) -> str:
    """An error in a line: its first sentence, or what kept a server from answering."""
    text = str(error).strip()
    if "HTTP" in text or "Connection" in text:  # what lies at the bottom of it
        told = r"\[Errno -?\d+\] ([^'\")\\]+)|Error\(\d+, '([^']+)'\)|Caused by \w+\('([^']+)'\)"
        if found := re.search(told, text):
            return next(words for words in found.groups() if words).strip()
    line = re.sub(r"^(<[^>]+>|\w+Connection\([^)]*\)): ", "", text.splitlines()[0]) if text else ""
    if len(line) > LONGEST:  # a page of HTML, or a whole request
        line = line[:LONGEST].rpartition(" ")[0] + " …"
    return line.rstrip(".") or type(error).__name__
