"""What every picture function returns: an image with a caption and words that say the same."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING

from kit.report.language import INK, MUTED

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["WIDTH", "Figure", "canvas", "finish", "nothing"]

WIDTH = 1040  # CSS pixels: fills a notebook's output area on a 1400 pixel screen
_SCALE = 2  # pixels of the PNG to a CSS pixel, for sharp text on dense screens


@dataclass(frozen=True)
class Figure:
    """A picture, or the sentence that takes its place when there is nothing to show.

    Attributes
    ----------
    name : str
        Short identifier, good as a file name.
    caption : str
        What one is looking at; shown under the picture.
    alt : str
        What the picture shows, figures included, for those who cannot see it.
    png : bytes or None
        The image; None when there is nothing to draw.
    html : str
        Markup shown in place of the image in a browser (trees that unfold).
    svg : str
        The image as vectors, where asked for.
    width : int
        CSS pixels.
    """

    name: str
    caption: str
    alt: str
    png: bytes | None = None
    html: str = ""
    svg: str = ""
    width: int = WIDTH

    def _repr_html_(self) -> str:
        caption = (
            f'<figcaption style="color:{MUTED};font-size:13px;line-height:1.4">{escape(self.caption)}</figcaption>'
        )
        if self.html:
            body = self.html
        elif self.png is not None:
            body = (
                f'<img alt="{escape(self.alt)}" src="data:image/png;base64,{b64encode(self.png).decode()}" '
                f'width="{self.width}" style="max-width:100%;height:auto;background:white">'
            )
        else:
            body = f'<p style="color:{INK};background:#f4f5fa;padding:8px 12px;margin:0">{escape(self.alt)}</p>'
        inside = f"{body}{caption}" if self.caption else body
        return f'<figure data-picture="{self.name}" style="margin:4px 0 12px 0">{inside}</figure>'

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        """Give front ends the HTML with its alt text, and the bare PNG and text beside it."""
        bundle = {"text/html": self._repr_html_(), "text/plain": str(self)}
        if self.png is not None:
            bundle["image/png"] = b64encode(self.png).decode()
        return bundle

    def __str__(self) -> str:
        return f"{self.caption}\n{self.alt}" if self.caption else self.alt


def nothing(name: str, words: str) -> Figure:
    """Return the figure that says in words why there is no picture."""
    return Figure(name, "", words)


def canvas(height: float, width: int = WIDTH) -> Canvas:
    """Return an empty matplotlib figure, `width` by `height` CSS pixels, that no global state knows of."""
    from matplotlib.figure import Figure as Canvas

    return Canvas(figsize=(width / 96, height / 96), dpi=96, layout="constrained")


def finish(drawn: Canvas, name: str, caption: str, alt: str, html: str = "") -> Figure:
    """Render `drawn` to PNG bytes that depend on nothing but what was drawn."""
    buffer = BytesIO()
    drawn.savefig(buffer, format="png", dpi=96 * _SCALE, metadata={"Software": None})
    return Figure(name, caption, alt, buffer.getvalue(), html, width=round(drawn.get_figwidth() * 96))
