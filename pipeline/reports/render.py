"""Pages: one self-contained HTML file each, everything escaped, nothing loaded from anywhere."""

import functools
import io

import jinja2

from pipeline.storage import store


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.reports", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, **values) -> str:
    """The page of a template in pipeline/pages; `version` says what it was made from."""
    return _environment().get_template(template).render(**values)


def is_current(uri: str, version: str) -> bool:
    """Whether the page at a URI was made from this version."""
    return store.exists(uri) and f'content="halftone {version}"' in store.read_text(uri)


def figure(draw, *, width: float = 6.0, height: float = 3.0) -> str:
    """SVG of what `draw(axes)` draws, in the page's own text colour, light or dark."""
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

        picture = Figure(figsize=(width, height), layout="constrained")
        draw(picture.subplots())
        buffer = io.StringIO()
        picture.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(ink, "currentColor")
