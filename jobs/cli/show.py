"""What a person sees: a line a stage; a bar on a terminal, plain lines elsewhere."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Literal

import rich.box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from jobs.cli.command import STAGES
from jobs.cluster.polling import meanwhile
from pipeline.errors import Unreachable
from pipeline.storage import store
from pipeline.storage.plan import Piece, Plan
from pipeline.training.loading.limits import limit_of

LEARNED = ("temperature", "scale", "bias", "tau")  # settings of losses, as records end
NUMBER = {name: number for number, name in enumerate(STAGES, 1)}


class Show:
    """Progress to standard error, so that standard output holds results alone."""

    def __init__(self, quiet: bool = False):
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        self.out = Console(highlight=False)
        if not self.out.is_terminal:  # a file or a pipe has no edge
            self.out.width = 140

    def heading(self, text: str, detail: str = "") -> None:
        self.console.print(f"[bold]{text}[/bold]  [dim]{detail}[/dim]" if detail else text)

    def line(self, text: str) -> None:
        self.console.print(text)

    def notes(self, sentences: Sequence[str]) -> None:
        """What a person should know of an answer; their own words are in it, so no markup is."""
        for sentence in sentences:
            self.console.print(f"  note: {sentence}", markup=False)

    def stage(self, name: str, made: int, kept: int, notes: dict, seconds: float) -> None:
        """The stage's line once it is over."""
        named = {name.replace("_", " ").replace(" at ", "@"): v for name, v in notes.items()}
        figures = "  ".join(f"{name} {_figure(value)}" for name, value in named.items())
        work = f"made {made}" + (f", kept {kept}" if kept else "") if made else "nothing to do"
        self.console.print(
            f"[green]{NUMBER.get(name, '-')}[/green] {name:<9}[cyan]{work:<18}[/cyan] {figures}  "
            f"[dim]{seconds:.1f} s[/dim]"
        )

    def failed(self, name: str) -> None:
        self.console.print(f"[red]{NUMBER.get(name, '-')} {name:<9}stopped[/red]")

    def would(self, name: str, plan: Plan, pending: list[Piece]) -> None:
        """A dry run's line."""
        names = ", ".join(piece.name for piece in pending[:3])
        more = f", … {len(pending) - 3} more" if len(pending) > 3 else ""
        work = f"{len(pending)} to make ({names}{more})" if pending else "nothing to do"
        done = len(plan) - len(pending)
        self.console.print(f"{NUMBER.get(name, '-')} {name:<9}{work}, {done} done")

    @contextlib.contextmanager
    def progress(self, name: str, total: int) -> Iterator[Callable[[], None]]:
        """A bar while `total` pieces are made; without a terminal a line at each quarter."""
        if not total:
            yield lambda: None
        elif self.console.is_terminal:
            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
            with Progress(
                *columns, TimeElapsedColumn(), console=self.console, transient=True
            ) as bar:
                task = bar.add_task(f"{NUMBER.get(name, '-')} {name}", total=total)
                yield lambda: bar.advance(task)
        else:
            done = 0

            def advance() -> None:
                nonlocal done
                done += 1
                if total > 8 and done < total and done * 4 // total > (done - 1) * 4 // total:
                    self.console.print(f"  {name}: {done} of {total}")

            yield advance

    def training(self, epochs: int, piece: Piece) -> AbstractContextManager:
        """A line an epoch, read from the checkpoints' records while the training runs elsewhere."""
        records = store.join(piece.output.rsplit("/", 1)[0], "checkpoints", "records.json")
        before, seen = _modified(records), 0

        def watch() -> None:
            nonlocal seen
            if _modified(records) == before:
                return
            with contextlib.suppress(OSError, ValueError, Unreachable):
                ends = [r for r in store.read_json(records) if "epoch" in r]
                for record in ends[seen:]:
                    self.console.print(f"  epoch {_epoch(record, epochs)}")
                seen = max(seen, len(ends))

        return meanwhile(watch, 1.0)

    def table(self, title: str, columns: list[str], rows: list[list[str]], caption: str) -> None:
        """A result, to standard output; the last column of text folds where it must."""
        table = Table(
            title=title or None, caption=caption, caption_justify="left", box=rich.box.SIMPLE_HEAD
        )
        for number, column in enumerate(columns):
            words = any(" " in row[number].strip() for row in rows) and number == len(columns) - 1
            side: Literal["left", "right"] = "left" if number == 0 or words else "right"
            table.add_column(column, justify=side, no_wrap=not words, overflow="fold")
        for row in rows:
            table.add_row(*row)
        self.out.print(table)

    def findings(self, found: list[tuple[str, str, str]]) -> None:
        """What is wrong with which file and what to do, to standard output, never broken."""
        for file, what, do in found:
            self.out.print(f"{file}: {what}; {do}", soft_wrap=True, markup=False)

    def where(self, places: dict[str, str]) -> None:
        """Where to look, a line a place, never broken: they are there to be copied."""
        for name, place in places.items():
            self.out.print(f"{name:<9}{place}", soft_wrap=True)


def _modified(uri: str) -> list | None:
    try:
        return store.stamp(uri)
    except (OSError, Unreachable):  # lines on a screen are not worth a training
        return None


def _epoch(record: dict, epochs: int) -> str:
    parts = [f"{record['epoch']}/{epochs}"]
    if "val/rsum" in record:
        parts.append(f"val rSum {record['val/rsum']:.1f}")
    if (over := record.get("val/rsum_over_zero_shot", 0.0)) < 0:
        parts.append(f"below zero-shot by {-over:.1f}")
    if not record["epoch"]:
        return "  ".join([*parts, "before training"])
    for name, value in record.items():  # what the losses learn
        if (setting := name.rpartition("_")[2]) in LEARNED and name.startswith("train/"):
            parts.append(f"{setting} {value:.4g}")
    parts.append(f"{record['train/samples_per_second']:,.0f} samples/s")
    waits = f"waited for data {100 * record['train/data_wait']:.0f} %"
    worst = record.get("train/data_wait_worst", record["train/data_wait"])
    if worst > record["train/data_wait"] + 0.01:
        waits += f" (one worker {100 * worst:.0f} %)"
    parts += [waits, f"limited by {limit_of(record)}"]
    return "  ".join(parts)


def _figure(value) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 1.5 else f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
