"""Bytes at http(s) addresses, fetched as if every server were slow, broken or lying."""

import random
import re
import time
from http.cookiejar import DefaultCookiePolicy
from urllib.parse import urljoin

import requests
import urllib3

from schemas.settings import SourceSettings

CHUNK = 1 << 16  # bytes asked for at once; the limits are checked in between
REDIRECTS = 5  # followed for one address
BACKOFF, LONGEST_WAIT = 0.5, 30.0  # before the first try again, and before any (seconds)
HEADERS = {"Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"}


class FetchFailed(OSError):
    """An address whose bytes were not got; the words before the first colon say why."""


class _Passing(FetchFailed):
    """A failure that the next try may not see."""

    wait = 0.0  # what the server asked for (seconds)


class _Session(requests.Session):
    def get_redirect_target(self, response: requests.Response) -> None:
        """None: it would read the body of a redirect to its end, which it may not have."""


_SESSION = _Session()  # one for all threads, so that they share its connections
_SESSION.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))  # they would only pile up
for scheme in ("http://", "https://"):
    _SESSION.mount(scheme, requests.adapters.HTTPAdapter(pool_connections=64, pool_maxsize=64))


def is_address(uri: str) -> bool:
    return uri.lower().startswith(("http://", "https://"))


def fetch(url: str, settings: SourceSettings) -> bytes:
    """The whole body at the address, or `FetchFailed`; what may pass is tried again."""
    for tried in range(settings.fetch_retries):
        try:
            return _try(url, settings)
        except _Passing as failure:
            backoff = BACKOFF * 2**tried * random.uniform(0.5, 1.5)
            time.sleep(min(max(failure.wait, backoff), LONGEST_WAIT))
    return _try(url, settings)


def _try(url: str, settings: SourceSettings) -> bytes:
    deadline = time.monotonic() + settings.fetch_timeout
    try:
        with _response(url, settings, deadline) as response:
            status = response.status_code
            if status == 429 or status >= 500:
                failure = _Passing(f"fetch failed ({status}): {url}")
                failure.wait = _retry_after(response)
                raise failure
            if status != 200:
                raise FetchFailed(f"fetch failed ({status}): {url}")
            _check_robots(url, response, settings)
            return _body(response, url, settings.fetch_max_bytes, deadline)
    except (requests.Timeout, urllib3.exceptions.TimeoutError):
        raise _Passing(f"fetch timed out: {url}") from None
    except urllib3.exceptions.HTTPError:  # of the body: requests wraps those before it
        raise _Passing(f"fetch cut short: {url}") from None
    except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema):
        raise FetchFailed(f"fetch failed (not an http address): {url}") from None
    except requests.RequestException:
        raise _Passing(f"fetch failed (no connection): {url}") from None


def _check_robots(url: str, response: requests.Response, settings: SourceSettings) -> None:
    """Keeps to what a server asks of those who collect images for training."""
    said = re.split(r"[,:;\s]+", response.headers.get("x-robots-tag", "").lower())
    if asked := [word for word in settings.fetch_respects if word.lower() in said]:
        raise FetchFailed(f"fetch refused (X-Robots-Tag {asked[0]}): {url}")


def _response(url: str, settings: SourceSettings, deadline: float) -> requests.Response:
    """The response after at most `REDIRECTS` redirects, its body unread."""
    there = url
    for _ in range(REDIRECTS + 1):
        response = _SESSION.get(
            there,
            headers={**HEADERS, "User-Agent": settings.fetch_agent},
            timeout=settings.fetch_timeout,
            stream=True,
            allow_redirects=False,
        )
        if not response.is_redirect:
            return response
        response.close()
        there = urljoin(there, response.headers["location"])
        _in_time(url, deadline)
    raise FetchFailed(f"fetch failed (redirected over {REDIRECTS} times): {url}")


def _retry_after(response: requests.Response) -> float:
    try:
        return urllib3.Retry().get_retry_after(response.raw) or 0.0
    except urllib3.exceptions.InvalidHeader:
        return 0.0


def _body(response: requests.Response, url: str, most: int, deadline: float) -> bytes:
    too_large = FetchFailed(f"fetch failed (over {most} bytes): {url}")
    if int(response.raw.length_remaining or 0) > most:
        raise too_large
    body = bytearray()
    while chunk := response.raw.read1(CHUNK, decode_content=True):
        body += chunk
        if len(body) > most:
            raise too_large
        _in_time(url, deadline)
    if response.headers.get("content-type", "").startswith("text/html") and body[:1] in b"<\n\r ":
        raise FetchFailed(f"fetch failed (a web page): {url}")
    return bytes(body)


def _in_time(url: str, deadline: float) -> None:
    if time.monotonic() > deadline:
        raise _Passing(f"fetch timed out: {url}")
