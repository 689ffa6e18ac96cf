"""Property tests of files: how many examples, and what befalls a file between two programs.

`HALFTONE_EXAMPLES=10000` for a long run, of other examples every time.
"""

import codecs
import gzip
import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

LONG = os.environ.get("HALFTONE_EXAMPLES")
fuzzed = settings(  # a decorator
    max_examples=int(LONG or 200),
    deadline=None,
    derandomize=LONG is None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
ENCODINGS = {
    "utf-8": b"",
    "utf-8-sig": b"",  # writes its own mark
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
}


@st.composite
def resaved(draw, text: str) -> bytes:
    """A text of lines as another program saves it: nothing is to be read otherwise."""
    lines = text.split("\n")
    if draw(st.booleans()):  # empty lines, at the end or between others
        for place in draw(st.lists(st.integers(1, len(lines)), max_size=3)):
            lines.insert(place, "")
    text = draw(st.sampled_from(["\n", "\r\n", "\r"])).join(lines)
    if draw(st.booleans()):
        text = text.rstrip("\r\n")
    encoding = draw(st.sampled_from(list(ENCODINGS)))
    data = ENCODINGS[encoding] + text.encode(encoding)
    return gzip.compress(data, mtime=0) if draw(st.booleans()) else data


@st.composite
def damaged(draw, data: bytes) -> bytes:
    """Bytes of which some were changed, lost, doubled, or cut off: this may mean anything."""
    out = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(out) - 1)))
        match draw(st.sampled_from(["change", "drop", "insert", "double", "cut"])):
            case "change":
                out[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case "drop":
                del out[at : at + draw(st.integers(1, 8))]
            case "insert":
                out[at:at] = draw(st.binary(min_size=1, max_size=4))
            case "double":
                out[at:at] = out[at : at + draw(st.integers(1, 40))]
            case "cut":
                del out[at:]
    return bytes(out)
