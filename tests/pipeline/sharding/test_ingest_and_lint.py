"""Ingest and lint read tars alike: the same samples and captions, or the same fault and place."""

import gzip
import io
import json
import tarfile

import pytest

from pipeline import sources
from pipeline.errors import InputError
from pipeline.sharding.checks import lint
from pipeline.sources.splits import Splits
from schemas.settings import SourceSettings

GOOD = [("a.jpg", b"one"), ("a.txt", "a dog"), ("b.jpg", b"two"), ("b.txt", "a cat")]
LINES = "\n".join(f"line {k}" for k in range(5))


def tar(members, **options) -> bytes:
    """A tar of (name, bytes, text, JSON-able or a link's target as `TarInfo`) members."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", **options) as archive:
        for name, data in members:
            if isinstance(data, tarfile.TarInfo):
                archive.addfile(data.replace(name=name))
                continue
            if not isinstance(data, bytes):
                data = data.encode() if isinstance(data, str) else json.dumps(data).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def special(kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, target
    return info


def more(*members, **options) -> bytes:
    return tar([*GOOD, *members], **options)


def changed(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def sparse() -> bytes:
    """A member that stands for more bytes than it has."""
    header = special(tarfile.GNUTYPE_SPARSE)
    return more(("c.jpg", header), ("c.txt", "a cow"), format=tarfile.GNU_FORMAT)


def negative() -> bytes:
    """A member's size that leads back to its own header, and a reader round and round."""
    data = bytearray(tar(GOOD))
    data[512 * 2 + 124 : 512 * 2 + 136] = (2**96 - 1024).to_bytes(12, "big")
    header = bytes(data[1024:1536])
    data[1024 + 148 : 1024 + 156] = b"%06o\0 " % tarfile.calc_chksums(header)[0]
    return bytes(data)


def caption(**about) -> list:
    return [("c.jpg", b"three"), ("c.json", about)]


END = 8 * 512  # of the members of GOOD
LONG = "x" * 300
TARS = {
    "good": tar(GOOD),
    "no member": tar([]),
    "zeros": bytes(1024),
    "no byte": b"",
    "cut in a header": tar(GOOD)[:300],
    "cut in a later header": tar(GOOD)[: 4 * 512 + 100],
    "cut in a member": tar(GOOD)[: 5 * 512 + 2],
    "cut between members": tar(GOOD)[: 4 * 512],
    "cut before the end": tar(GOOD)[:END],
    "cut within the end": tar(GOOD)[: END + 100],
    "half an end": tar(GOOD)[: END + 512],
    "a broken first header": changed(tar(GOOD), 3),
    "a broken later header": changed(tar(GOOD), 4 * 512 + 3),
    "a negative size": negative(),
    "a web page": b"<html>" + b"not found" * 100,
    "gzip": gzip.compress(tar(GOOD), mtime=0),
    "joined": tar(GOOD) + tar([("c.jpg", b"x"), ("c.txt", "a cow")]),
    "appended behind the end": tar(GOOD)[: END + 1024] + tar([("c.jpg", b"x"), ("c.txt", "cow")]),
    "a byte behind the end": tar(GOOD) + bytes(3 << 20) + b"x",
    "zeros behind the end": tar(GOOD) + bytes(5000),
    "not adjacent": more(("a.json", {"caption": "late"})),
    "twice": more(("c.jpg", b"x"), ("c.JPG", b"y"), ("c.txt", "a cow")),
    "a link": more(("c.jpg", special(tarfile.SYMTYPE, "a.jpg")), ("c.txt", "a cow")),
    "a hard link": more(("c.jpg", special(tarfile.LNKTYPE, "a.jpg")), ("c.txt", "a cow")),
    "a link of no use": more(("b.cls", special(tarfile.SYMTYPE, "a.cls"))),
    "a device": more(("c.jpg", special(tarfile.CHRTYPE)), ("c.txt", "a cow")),
    "sparse": sparse(),
    "folders": more(("x", special(tarfile.DIRTYPE)), ("x/c.jpg", b"x"), ("x/c.txt", "a cow")),
    "packed from a dot": tar([("./" + name, data) for name, data in GOOD]),
    "names that lead out": more(("../../c.jpg", b"x"), ("../../c.txt", "a cow")),
    "PAX": more(("ü" * 200 + ".jpg", b"x"), ("ü" * 200 + ".txt", "a"), format=tarfile.PAX_FORMAT),
    "long names": more((LONG + ".jpg", b"x"), (LONG + ".txt", "a"), format=tarfile.GNU_FORMAT),
    "names of other bytes": more(
        ("caf\udce9.jpg", b"x"), ("caf\udce9.txt", "a"),
        format=tarfile.GNU_FORMAT, errors="surrogateescape",
    ),
    "a Mac's": more(
        ("._a.jpg", b"x"), ("._c.txt", "x"), ("__MACOSX/c.jpg", b"x"), (".DS_Store", "x")
    ),
    "no sample at all": tar([("README", "x"), ("._a.jpg", b"x")]),
    "no sample among samples": more(("README", "x")),
    "a dot in the key": more(("c.1.jpg", b"x"), ("c.1.txt", "a cow")),
    "dotted endings": more(("c.depth.png", b"x"), ("c.jpg", b"x"), ("c.txt", "a cow")),
    "two pictures": more(("c.png", b"x"), ("c.jpg", b"x"), ("c.txt", "a cow")),
    "picture and features": more(("c.npy", b"x"), ("c.jpg", b"x"), ("c.txt", "a cow")),
    "upper case": tar([
        ("A.JPG", b"x"), ("A.TXT", "a"), ("B.Jpeg", b"x"), ("B.JSON", {"caption": "b"})
    ]),
    "other endings": more(("c.cls", "7"), ("c.jpg", b"x"), ("c.caption", "a cow"), ("d.cls", "1")),
    "no picture": more(("c.txt", "a cow")),
    "no caption": more(("c.jpg", b"x")),
    "a blank caption": more(("c.jpg", b"x"), ("c.txt", " \n")),
    "a byte order mark": more(("c.jpg", b"x"), ("c.txt", "\ufeffa cow")),
    "marks in JSON": more(("c.jpg", b"x"), ("c.json", '\ufeff{"caption": "a cow"}')),
    "UTF-16": more(("c.jpg", b"x"), ("c.txt", "a cow".encode("utf-16"))),
    "UTF-16 alone": tar([("c.jpg", b"x"), ("c.txt", "a cow".encode("utf-16"))]),
    "Latin 1": more(("c.jpg", b"x"), ("c.txt", b"caf\xe9")),
    "torn JSON": more(("c.jpg", b"x"), ("c.txt", "a cow"), ("c.json", b"{")),
    "deep JSON": more(("c.jpg", b"x"), ("c.txt", "a cow"), ("c.json", b"[" * 100_000)),
    "JSON list": more(("c.jpg", b"x"), ("c.txt", "a cow"), ("c.json", b"[]")),
    "null id and split": more(*caption(image_id=None, split=None, caption="a cow")),
    "a number for an id": more(*caption(image_id=7, caption="a cow")),
    "a number of a table": more(*caption(image_id=7.0, caption="a cow")),
    "a list for an id": more(*caption(image_id=[7], caption="a cow")),
    "true for an id": more(*caption(image_id=True, caption="a cow")),
    "a number for a split": more(*caption(split=0, caption="a cow")),
    "a list for a split": more(*caption(split=["train"], caption="a cow")),
    "one bad caption": more(*caption(captions=["a cow", {"en": "a cow"}, 7])),
    "half a character": more(*caption(caption="a \ud83d cow")),
    "half a character in the id": more(*caption(image_id="\ud83d", caption="a cow")),
    "null caption": more(*caption(caption=None)),
    "no captions": more(*caption(captions=[])),
    "NaN": more(("c.jpg", b"x"), ("c.json", b'{"caption": NaN}')),
    "a record without text": more(*caption(captions=[{"en": "a cow"}])),
    "numbered captions": more(
        *caption(captions=[{"caption_id": k, "text": f"{k}"} for k in (0, 1)])
    ),
    "a list for a caption's id": more(*caption(captions=[{"caption_id": [0], "text": "a cow"}])),
    "several lines": more(("c.jpg", b"x"), ("c.txt", LINES)),
    "several lines in all": tar([(f"{k}.{e}", LINES) for k in (1, 2) for e in ("jpg", "txt")]),
    "a sample a caption": tar([
        (f"{k}.{end}", data) for k in range(4)
        for end, data in (("jpg", b"x"), ("json", {"image_id": k % 2, "caption": f"said {k}"}))
    ]),
    "one id, two pictures": tar([
        (f"{k}.{end}", data) for k in range(3)
        for end, data in (("jpg", b"x" * (k + 1)), ("json", {"image_id": k // 2, "caption": "A"}))
    ]),
    "own numbers of captions": tar([
        (f"{k}.{end}", data) for k in range(2)
        for end, data in (("jpg", b"x"), ("json", {
            "image_id": f"im{k}", "captions": [{"caption_id": c, "text": "A"} for c in range(2)]}))
    ]),
}  # fmt: skip


def of_ingest(uri: str) -> tuple[dict, list[str]]:
    """Ids of captions by image id, and what is wrong where."""
    settings = SourceSettings(kind="webdataset", path=uri)
    try:
        rows = [
            row
            for part in sources.parts(settings)
            for row in sources.rows(settings, part, Splits(settings, part.split))
        ]
    except InputError as error:
        return {}, [str(error)]
    wrong = [row["problem"] for row in rows if row["problem"]]
    good = [row for row in rows if not row["problem"]]
    wrong += [c["problem"] for row in good for c in row["captions"] if c["problem"]]
    return {r["image_id"]: [c["caption_id"] for c in r["captions"]] for r in good}, wrong


def of_lint(uri: str) -> tuple[dict, list[str]]:
    (piece,), found = lint.plan(uri, decode=False)
    checked = lint.check(piece)
    rows = checked["ids"].to_pylist()
    findings = [*found, *checked["findings"], *lint.across({piece.name: checked})]
    assert all(finding.do and finding.file == uri for finding in findings)
    return {r["image_id"]: r["caption_ids"] for r in rows}, [f.what for f in findings]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", TARS)
def test_both_have_one_verdict(name, tmp_path):
    (file := tmp_path / "00000.tar").write_bytes(TARS[name])
    (images, wrong), (linted, findings) = of_ingest(str(file)), of_lint(str(file))
    assert bool(wrong) == bool(findings), (wrong, findings)
    if wrong:  # the first is the one that a row or the tar is refused for
        told = [what.split(" (and ")[0] for what in findings]
        assert any(what in wrong[0] or wrong[0] in what for what in told), (wrong, findings)
    assert images.items() <= linted.items()
    if not wrong:
        assert images == linted


FAULTS = {
    "joined": "data behind the end: at byte 10,240; the tar ends at 4,096",
    "a byte behind the end": "data behind the end: at byte 3,155,968; the tar ends at 4,096",
    "cut in a member": "torn tar: after 'a.txt': it ends at byte 2,562, inside 'b.jpg'",
    "cut before the end": "it ends at byte 4,096 without the blocks that close a tar",
    "a broken later header": "no member's header where one should be, at byte 2,048",
    "a negative size": "torn tar: after 'a.jpg': at byte 1,024, 'a.txt' has -1024 bytes",
    "a web page": "no tar: it begins with b'<html>",
    "gzip": "compressed tar: it is of gzip",
    "not adjacent": "'a.json' at byte 4,608; others of 'a' begin at byte 512",
    "twice": "a member that is there twice: 'c.JPG', again at byte 5,632",
    "a hard link": "a member that is no plain file: 'c.jpg' is a link to 'a.jpg'",
    "UTF-16": "a member that cannot be used: 'c.txt': not UTF-8 text but UTF-16",
    "torn JSON": "a member that cannot be used: 'c.json': not JSON (",
    "a list for an id": "'c.json': its image_id [7] is no name: list, expected a text or number",
    "half a character": "'c' has .jpg, .json: no caption: 'a \\ud83d cow' holds half a character",
    "several lines in all": "every .txt holds several lines: in each of 2 samples",
    "no sample at all": "nothing to use: none of its 2 members is called KEY.ending",
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_fault_and_its_place_are_named(name, tmp_path):
    (file := tmp_path / "00000.tar").write_bytes(TARS[name])
    for _, wrong in (of_ingest(str(file)), of_lint(str(file))):
        assert any(FAULTS[name] in sentence for sentence in wrong), wrong


CLEAN = {
    **{"good": 2, "half an end": 2, "zeros behind the end": 2, "no member": 0, "zeros": 0},
    **{"folders": 3, "packed from a dot": 2, "PAX": 3, "long names": 3, "a Mac's": 2},
    **{"upper case": 2, "a byte order mark": 3, "marks in JSON": 3, "dotted endings": 3},
    **{"null id and split": 3, "a sample a caption": 2, "numbered captions": 3},
    **{"own numbers of captions": 2, "picture and features": 3, "several lines": 3},
}


@pytest.mark.parametrize("name", CLEAN)
def test_what_is_well_is_read_whole(name, tmp_path):
    (file := tmp_path / "00000.tar").write_bytes(TARS[name])
    for images, wrong in (of_ingest(str(file)), of_lint(str(file))):
        assert (len(images), wrong) == (CLEAN[name], [])
