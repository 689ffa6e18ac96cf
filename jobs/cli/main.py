"""The command line: `halftone STAGE …` and `python -m jobs.STAGE …` are the same."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

import pipeline
from jobs.cli.command import COMMANDS, command_of
from pipeline.errors import InputError

OVERVIEW = """\
Halftone: image-text retrieval that knows the shades between match and no match.

usage: halftone COMMAND [--recipe NAME|FILE] [--root URI] [--section.key VALUE …]

{}

`halftone COMMAND --help` shows every setting with its values, default and unit.
`halftone --version` says which this is."""


def main(name: str | None = None, argv: list[str] | None = None) -> None:
    """Run a command; ends the process with 0, 1 (work failed), 2 (bad input) or 130 (stopped)."""
    argv = sys.argv[1:] if argv is None else argv
    if name is None:
        if not argv or argv[0] in ("-h", "--help"):
            lines = [f"  {name:<9} {about}" for name, about in COMMANDS.items()]
            print(OVERVIEW.format("\n".join(lines)))
            raise SystemExit(0)
        if argv[0] == "--version":
            print(f"halftone {pipeline.__version__}")
            raise SystemExit(0)
        name, *argv = argv
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # towers and losses of one's own: a console script lacks it
    from jobs.cli import options
    from jobs.cluster import torchrun
    from jobs.cluster.tasks import WorkFailed

    try:
        command = command_of(name)
        with _ended_by_sigterm():
            given = options.parse(name, command, argv)
            torchrun.check(name, getattr(given[0], "dry_run", False))
            command.scope(command, *given)
    except InputError as error:
        print(f"halftone {name}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except WorkFailed as error:
        kept = "What was finished is kept; the same command goes on."
        print(f"halftone {name}: {error}\n{kept}", file=sys.stderr)
        raise SystemExit(1) from error
    except KeyboardInterrupt:
        print(f"\nhalftone {name}: stopped; the same command goes on.", file=sys.stderr)
        raise SystemExit(130) from None


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the process as Ctrl-C does, through whatever is to be put in order."""

    def end(signum, frame) -> None:
        raise SystemExit(128 + signum)

    first = threading.current_thread() is threading.main_thread()
    if not first or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is end:  # Ray puts its own there
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


if __name__ == "__main__":
    main()
