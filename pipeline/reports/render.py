"""Pages: one self-contained HTML file each, everything escaped, nothing loaded from anywhere."""

import functools
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jinja2

from pipeline.storage import store

LOADER = jinja2.PackageLoader("pipeline.reports", "templates")
TEMPLATES = jinja2.Environment(loader=LOADER, autoescape=True, trim_blocks=True, lstrip_blocks=True)


def render(template: str, **values) -> str:
    """The page of a template in templates/; `version` says what it was made from."""
    return TEMPLATES.get_template(template).render(**values)


@dataclass(frozen=True)
class Figure:
    """A drawing, what it shows, and its numbers as a table (columns, rows)."""

    name: str
    svg: str
    caption: str
    numbers: tuple[list[str], list[list[str]]] = ([], [])


@dataclass(frozen=True)
class Made:
    """A page that was made, and what was made with it."""

    html: str
    figures: Sequence[Figure] = ()  # that are drawn on it
    files: dict[str, str] = field(default_factory=dict)  # that lie beside it, by name
    metrics: dict[str, float] = field(default_factory=dict)  # that it tells


@dataclass(frozen=True)
class Page:
    """A page as what it is made from; it is made where it is not there already."""

    uri: str
    layout: int  # counts up when the page changes, so that it is made again
    depends: Sequence  # all else that it is made from
    render: Callable[[str], Made]  # given its version
    artifact: str | None = None  # its name in MLflow; None: it is not kept there

    @functools.cached_property
    def version(self) -> str:
        return store.fingerprint(store.name_of(self.uri), self.layout, self.depends)

    @property
    def is_current(self) -> bool:
        """Whether it is there, made from the same."""
        mark = f'content="halftone {self.version}"'
        return store.exists(self.uri) and mark in store.read_text(self.uri)

    def make(self) -> Made:
        """Write the page, after what lies beside it."""
        made = self.render(self.version)
        beside = {store.join(self.uri.rpartition("/")[0], n): t for n, t in made.files.items()}
        for uri, text in {**beside, self.uri: made.html}.items():
            store.write_bytes(uri, text.encode())
        return made


def figure(
    draw,
    *,
    width: float = 6.0,
    height: float = 3.0,
    panels: int = 0,
    heights: Sequence[float] | None = None,
) -> str:
    """SVG of what `draw(axes)` draws, in the page's own text colour, light or dark.

    With `panels` it is given so many axes, one below the other, that share their x; `heights` are
    those of the panels, to each other. What has a `gid` is of that class: `model-0`, ….
    """
    import matplotlib

    ink = "#010203"  # stands for currentColor until the picture is made
    style: dict = {
        "svg.fonttype": "none",
        "svg.hashsalt": "halftone",  # same figure, same bytes
        "font.size": 9,
        "font.family": "sans-serif",
        "axes.edgecolor": ink,
        "axes.labelcolor": ink,
        "text.color": ink,
        "xtick.color": ink,
        "ytick.color": ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(style):
        from matplotlib.figure import Figure

        tall = height * (1 + 0.55 * max(0, panels - 1)) if heights is None else height * 1.2
        picture = Figure(figsize=(width, tall), layout="constrained")
        shape = {"sharex": True, "squeeze": False, "height_ratios": heights}
        several = picture.subplots(max(1, panels), 1, **shape)[:, 0]  # type: ignore[call-overload]
        draw(several if panels else several[0])
        buffer = io.StringIO()
        picture.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(ink, "currentColor")
    return re.sub(r'<g id="(model-\d+)"', r'<g class="\1"', svg)
