"""Commands at work on one run folder, each known to the others by a file that a dead one loses.

A command that comes to work writes a file of its own beside the stages, then looks at the others':

- one that shards other data, or the same with other settings, is not let by: it is told who works
- one that makes the same in the same folder waits until the other has ended, and finds it done
- others go on side by side, as trainings of two models do

So nothing has to be exclusive that an object store cannot make so. Who is alive is seen on the same
machine by the process and its start, elsewhere by a file that goes on changing: no two machines'
clocks are compared.
"""

import contextlib
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jobs.cluster.polling import meanwhile
from pipeline.errors import InputError
from pipeline.storage import store

PREFIX = "running-"
BEAT = 10.0  # seconds between two signs of life
PATIENCE = 60.0  # seconds without one until a command of another machine counts as dead
LOOK = 1.0  # seconds between looks at those that are waited for
PROC = Path("/proc")  # of this machine, where it has one
CAME, WAITS, WORKS = "came", "waits", "works"


class Sight(NamedTuple):
    """What was seen of another command."""

    beat: int  # its sign of life
    since: float  # when that one was new here, by this machine's own clock
    looked: float  # when it was last looked at
    lives: bool  # whether it was seen to give another one


class Presence:
    """This command among those that work on a run folder."""

    def __init__(self, root: str, data: str, say: Callable[[str], None]):
        """`data` is a fingerprint of the settings that decide what is in the shards."""
        self.root, self.say = root, say
        self.name = f"{PREFIX}{uuid.uuid4().hex}.json"
        self.about: dict[str, Any] = {"data": data, "state": CAME, "beat": 0}
        self.about |= {"machine": _machine(), "host": socket.gethostname(), "pid": os.getpid()}
        self.about |= {"start": _start(os.getpid()), "begun": time.strftime("%F %T %Z")}
        self.seen: dict[str, Sight] = {}

    @contextlib.contextmanager
    def working(self, folder: str, of: str) -> Iterator[bool]:
        """While it is entered this command makes what has the fingerprint `of`, in a folder.

        Whether another one was waited for: what it made is there now.
        """
        self.about |= {"folder": folder, "of": of, "state": CAME}
        try:
            self._write()
            with meanwhile(self._beat, BEAT):
                yield self._settle()
        finally:
            with contextlib.suppress(OSError, InputError):  # without its process it counts as dead
                store.remove(store.join(self.root, self.name))

    def _settle(self) -> bool:
        """Come to terms with the others; whether one that makes the same was waited for."""
        told: set[str] = set()
        while True:
            first, others = self._first()
            for name, other in first.items():
                same = self._same(other)
                if not same and self.seen[name].lives:
                    raise InputError(self._refusal(other))
                if name not in told:
                    told.add(name)
                    waits = "makes the same; this command waits until it ends"
                    sees = f"may be dead; this command looks for {PATIENCE:.0f} s whether it is"
                    self.say(f"  {_who(other)} {waits if same else sees}")
            if not first and all(other["state"] == WAITS for other in others.values()):
                self._become(WORKS)
                # Of two that do so at once the later sees the other now, and steps back.
                if not self._first()[0]:
                    return bool(told)
            self._become(WAITS)
            time.sleep(LOOK)

    def _first(self) -> tuple[dict[str, dict], dict[str, dict]]:
        """Of those whom this command would disturb, who goes first; and all of them."""
        others = {name: other for name, other in self._others() if self._meet(other)}
        first = {n: o for n, o in others.items() if o["state"] == WORKS or n < self.name}
        return first, others

    def _become(self, state: str) -> None:
        if self.about["state"] != state:
            self.about["state"] = state
            self._write()

    def _meet(self, other: dict) -> bool:
        """Whether another's work and this would disturb each other."""
        return other["data"] != self.about["data"] or other["folder"] == self.about["folder"]

    def _same(self, other: dict) -> bool:
        return all(other[key] == self.about[key] for key in ("data", "folder", "of"))

    def _refusal(self, other: dict) -> str:
        what = "of other data or shards" if other["data"] != self.about["data"] else "otherwise"
        return (
            f"{_who(other)} is at work in {other['folder']}, {what}; wait until it has ended, or "
            "give this one a folder of its own with --root"
        )

    def _others(self) -> Iterator[tuple[str, dict]]:
        """Names and contents of the files of others; those of the dead are removed."""
        names = [n for n in store.list_files(self.root) if n.startswith(PREFIX) and n != self.name]
        for name in sorted(names):
            uri = store.join(self.root, name)
            try:
                other = json.loads(store.read_bytes(uri))
            except (FileNotFoundError, ValueError):  # it has ended meanwhile
                continue
            if self._is_alive(name, other):
                yield name, other
            else:
                store.remove(uri)

    def _is_alive(self, name: str, other: dict) -> bool:
        """Whether a command works still, as far as can be seen from here."""
        now, beat = time.monotonic(), other["beat"]
        if other["machine"] == self.about["machine"]:
            self.seen[name] = Sight(beat, now, now, lives=True)
            return _start(other["pid"]) == other["start"]
        before = self.seen.get(name, Sight(beat, now, now, lives=False))
        if beat != before.beat:
            self.seen[name] = Sight(beat, now, now, lives=True)
        else:  # time in which nobody looked, as where storage was away, does not count
            since = now if now - before.looked > BEAT else before.since
            self.seen[name] = before._replace(since=since, looked=now)
        return now - self.seen[name].since < PATIENCE

    def _beat(self) -> None:
        self.about["beat"] += 1
        with contextlib.suppress(
            OSError, InputError
        ):  # storage that is away is away for others too
            self._write()

    def _write(self) -> None:
        data = json.dumps(self.about, sort_keys=True).encode()
        store.write_bytes(store.join(self.root, self.name), data)


def _who(other: dict) -> str:
    return f"another command (process {other['pid']} on {other['host']}, since {other['begun']})"


def _machine() -> str:
    """What tells one machine, one boot of it and one container on it from others."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append((PROC / "sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink(PROC / "self/ns/pid"))
    return " ".join(parts)


def _start(pid: int) -> str:
    """When a process of this machine began; "" where there is none. A number is given twice."""
    if not (PROC / "self").exists():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, 0)
            return "alive"
        return ""
    try:
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]  # a zombie works no more
