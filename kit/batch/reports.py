"""Reports of executed notebooks: HTML that needs no network, and a picture for the index."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from typing import Any

__all__ = ["html_report", "network_references", "thumbnail"]

# nbconvert's page without the four scripts that it would load from a content network.
# On a narrow page long lines of code and text wrap, between words where they can, and wide outputs scroll.
_TEMPLATE = """{% extends 'lab/index.html.j2' %}
{% block notebook_css %}
{{ super() }}
<style>
body.jp-Notebook .highlight pre, body.jp-Notebook .jp-RenderedText pre, body.jp-Notebook .jp-RenderedMarkdown pre {
  white-space: pre-wrap; word-break: normal; overflow-wrap: anywhere; }
body.jp-Notebook .jp-OutputArea-output, body.jp-Notebook .jp-RenderedMarkdown { overflow-x: auto; }
body.jp-Notebook .jp-InputArea-editor { overflow-x: auto; }
</style>
{% endblock %}
{% block html_head_js %}{% endblock %}
{% block jupyter_widgets %}{% endblock %}
{% block html_head_js_mathjax %}{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}
"""
_LOADED = re.compile(
    r"""<(?:script|img|iframe|video|audio|source|embed|link|object)\b[^>]*?\b(?:src|href|data)\s*=\s*["']?\s*"""
    r"""((?:https?:)?//[^"'\s>]+)|@import\s+(?:url\()?["']?\s*((?:https?:)?//[^"')\s]+)"""
    r"""|\burl\(\s*["']?\s*((?:https?:)?//[^"')\s]+)|\b(?:import\s*\(?|from)\s*["'](https?://[^"']+)""",
    re.IGNORECASE,
)
_SHOWN = re.compile(r"<img\b[^>]*>")
_INLINE_PNG = re.compile(r'src="data:image/png;base64,([A-Za-z0-9+/=\s]+)"')
_ALT = re.compile(r'\balt="([^"]*)"')
_NAME = re.compile(r'<figure data-picture="(\w+)"')
_TELLING = ("overview", "timeline", "residency_map")  # what a flow is about, in the order of preference
_WIDGET = "application/vnd.jupyter.widget-view+json"


def network_references(html: str) -> list[str]:
    """Return the addresses that a browser would fetch by itself when it shows `html`."""
    return [next(filter(None, groups)) for groups in _LOADED.findall(html)]


def html_report(notebook: Any, title: str) -> str:
    """Return an executed notebook as one HTML page that loads nothing.

    Parameters
    ----------
    notebook : nbformat.NotebookNode
        The executed notebook; its widgets are shown as the text that stands in for them.
    title : str
        Title of the page.
    """
    from copy import deepcopy

    from nbconvert.exporters.html import HTMLExporter

    shown = deepcopy(notebook)
    shown.metadata.pop("widgets", None)
    shown.metadata["title"] = title
    for output in _outputs(shown):
        output.get("data", {}).pop(_WIDGET, None)
    make: Any = HTMLExporter  # its constructor is not typed
    page, _resources = make(raw_template=_TEMPLATE, embed_images=True).from_notebook_node(shown)
    return str(page)


def _outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def _pictures(notebook: Any) -> Iterator[tuple[bytes, str, str]]:
    """Yield the pictures that a page shows as PNG, each with its text alternative and its name, if it has one.

    Where an output has HTML, a page shows that: a PNG beside it is not seen unless the HTML holds it.
    """
    for output in _outputs(notebook):
        html = "".join(output.get("data", {}).get("text/html", ""))
        shown = _SHOWN.search(html)
        inline = _INLINE_PNG.search(shown[0]) if shown else None
        alt = _ALT.search(shown[0]) if shown else None
        if inline and alt and alt[1]:
            name = _NAME.search(html)
            yield base64.b64decode(inline[1]), alt[1], name[1] if name else ""


def _pixels(png: bytes) -> int:
    """Return width times height, which every PNG says in its first chunk."""
    return int.from_bytes(png[16:20], "big") * int.from_bytes(png[20:24], "big")


def thumbnail(notebook: Any, width: int = 480) -> tuple[str, str] | None:
    """Return the most telling picture that an executed notebook shows, made small.

    That is the last of the first kind in `_TELLING` that it has, which shows most of the run; with none of these,
    the largest picture, of equals the last.

    Returns
    -------
    tuple of str, or None
        A ``data:`` address and the text alternative (as HTML); None when there is no picture.
    """
    found = list(_pictures(notebook))
    if not found:
        return None
    from PIL import Image

    named = [[picture for picture in found if picture[2] == name] for name in _TELLING]
    png, alt, _name = next((kind[-1] for kind in named if kind), None) or max(
        reversed(found), key=lambda picture: _pixels(picture[0])
    )
    small = io.BytesIO()
    with Image.open(io.BytesIO(png)) as picture:
        picture.thumbnail((width, 4 * width))
        picture.save(small, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(small.getvalue()).decode("ascii"), alt
