"""How the controls and the views share the width that a notebook's output has: one style sheet.

What a browser window leaves for an output is known to the browser alone, so the sheet asks for the
panel's own width (container queries) and not for the window's.
"""

from __future__ import annotations

from kit.report.language import BLUE, GRID

__all__ = ["CELL", "SHEET", "headline_sheet"]

CELL = 120  # CSS pixels that a headline figure needs
_SIDE = 312  # of the controls beside the views
_STACK = 900  # narrower than this, the controls go above the views
_PICTURE = 560  # at which a picture's words can still be read; it scrolls where there is less

SHEET = f"""<style>
.farfault-panel {{ container: farfault-panel / inline-size; width: 100%; overflow: visible; }}
.farfault-body {{ display: flex; flex-flow: row nowrap; align-items: stretch; overflow: visible; }}
.farfault-side {{ flex: 0 0 {_SIDE}px; padding: 0 8px 0 0; overflow: visible; }}
.farfault-buttons {{ flex-flow: row wrap; align-items: center; gap: 2px 6px; overflow: visible; }}
.farfault-controls {{ display: block; height: 1000px; overflow: hidden auto; }}
.farfault-controls > * {{ margin-left: 0; margin-right: 0; }}
.farfault-group {{
  font-weight: bold; font-size: 12px; letter-spacing: .06em; text-transform: uppercase; margin: 8px 2px 0;
}}
.farfault-views {{
  container: farfault-views / inline-size; flex: 1 1 0; min-width: 0; padding: 0 0 0 12px;
  border-left: 1px solid {GRID}; overflow: visible;
}}
.farfault-views > * {{ max-width: 100%; }}
.farfault-panel .farfault-check {{ height: auto; }}
.farfault-panel .farfault-check label {{
  display: flex; align-items: flex-start; gap: 6px; white-space: normal; overflow: visible; line-height: 1.35;
}}
.farfault-panel .farfault-check input {{ flex: none; align-self: flex-start; margin-top: 2px; }}
.farfault-overview {{ overflow-x: auto; overflow-y: hidden; }}
.farfault-overview img {{ min-width: {_PICTURE}px; }}
.farfault-views .jupyter-widget-tab > .lm-TabBar .lm-TabBar-content {{ flex-wrap: wrap; gap: 0 14px; }}
.farfault-views .jupyter-widget-tab > .lm-TabBar .lm-TabBar-tab {{
  flex: 0 0 auto; min-width: 0; padding: 0 4px; margin: 0; border: 0; background: none;
}}
.farfault-views .jupyter-widget-tab > .lm-TabBar .lm-TabBar-tab.lm-mod-current {{
  color: {BLUE}; font-weight: bold; border-bottom: 2px solid {BLUE};
}}
.farfault-views .jupyter-widget-tab > .lm-TabBar .lm-TabBar-tab::before {{ display: none; }}
.farfault-views .jupyter-widget-tab > .lm-TabBar .lm-TabBar-tabLabel {{ overflow: visible; }}
.farfault-views .jupyter-widget-tab > .widget-tab-contents {{
  padding: 8px 0 0; border: 0; border-top: 1px solid {GRID}; overflow-x: auto;
}}
.farfault-views .widget-tab-contents .widget-html-content {{ min-width: 0; overflow-x: auto; }}
.farfault-views .widget-tab-contents pre {{ white-space: pre; overflow-x: auto; }}
@container farfault-panel (max-width: {_STACK - 1}px) {{
  .farfault-body {{ flex-flow: column nowrap; }}
  .farfault-side {{ flex: none; width: auto; padding: 0 0 8px; border-bottom: 1px solid {GRID}; }}
  .farfault-controls {{
    display: grid; grid-template-columns: repeat(auto-fill, minmax(256px, 1fr)); align-content: start;
    height: auto; max-height: 320px;
  }}
  .farfault-heading {{ grid-column: 1 / -1; }}
  .farfault-views {{ flex: none; width: auto; padding: 8px 0 0; border-left: 0; }}
}}
</style>"""
"""What the panel's parts look like, by class, in the panel's own widget of no height."""


def headline_sheet(count: int) -> str:
    """Return the sheet that puts `count` headline figures into rows of one length, as few as there is width for."""
    columns = {-(-count // rows) for rows in range(1, count + 1)}
    chosen = "".join(
        f"@container farfault-views (min-width: {each * CELL}px) {{ "
        f".farfault-headline > .widget-html-content > div {{ --columns: {each}; }} }}\n"
        for each in sorted(columns - {1})
    )
    return f"""<style>
.farfault-headline > .widget-html-content > div {{
  grid-template-columns: repeat(var(--columns, 1), minmax(0, 1fr)) !important; overflow: hidden;
}}
.farfault-headline > .widget-html-content > div > div {{ border-bottom: 1px solid {GRID}; margin-bottom: -1px; }}
{chosen}</style>"""
