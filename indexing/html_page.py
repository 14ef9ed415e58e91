"""One self-contained HTML page out of sections of text, tables and figures: what reports for people
are written with. All text is escaped; figures are inside the page; it fits a phone.

jinja2 and matplotlib are imported by the page alone, so who only measures needs neither.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
  body { font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #1c2430; max-width: 60rem;
         margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
  h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem; }
  .table { overflow-x: auto; } table { border-collapse: collapse; min-width: 60%; }
  th, td { padding: .35rem .7rem; text-align: left; vertical-align: top; max-width: 34rem;
           border-bottom: 1px solid #d8dee6; overflow-wrap: normal; }
  td { overflow-wrap: break-word; }
  .number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
  img { display: block; max-width: 100%; height: auto; margin: .8rem 0; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for section in sections %}<section>
<h2>{{ section.title }}</h2>
{% for paragraph in section.text.split("\\n\\n") if paragraph %}<p>{{ paragraph }}</p>
{% endfor %}
{% if section.rows is not none %}<div class="table"><table>
{% if section.columns %}<tr>{% for name in section.columns -%}
<th{% if section.is_number(loop.index0) %} class="number"{% endif %}>{{ name }}</th>
{%- endfor %}</tr>{% endif %}
{% for row in section.rows %}<tr>{% for cell in row -%}
<td{% if section.is_number(loop.index0) %} class="number"{% endif %}>{{ cell | readable }}</td>
{%- endfor %}</tr>
{% endfor %}</table></div>{% endif %}
{% if section.figure is not none -%}
<img alt="{{ section.title }}" src="data:image/svg+xml;base64,{{ section.figure | svg }}">
{%- endif %}
</section>
{% endfor %}
</body>
</html>
"""


@dataclass(frozen=True)
class Section:
    """A heading with what belongs to it.

    Attributes:
        text: Paragraphs, with an empty line between them; may be "".
        columns: Names of the table's columns; None for a table without a head.
        rows: Cells as strings, numbers (shown with thousands separators or four digits) or None.
        figure: A matplotlib figure made without pyplot.
    """

    title: str
    text: str
    columns: Sequence[str] | None = None
    rows: Sequence[Sequence[Any]] | None = None
    figure: "Figure | None" = None

    def is_number(self, column: int) -> bool:
        """Whether a column holds numbers only, which are set to the right."""
        cells = [row[column] for row in self.rows or () if row[column] is not None]
        return bool(cells) and all(_is_number(cell) for cell in cells)


def html_page(title: str, sections: Sequence[Section]) -> str:
    """The page as text; the same sections give the same page."""
    from jinja2 import Environment

    environment = Environment(autoescape=True)
    environment.filters |= {"readable": _readable, "svg": _svg}
    return environment.from_string(_TEMPLATE).render(title=title, sections=sections)


def percent(share: float) -> str:
    """A share with enough digits to tell it from all and from none."""
    shown = f"{100 * share:.2f}"
    if shown == "0.00" and share > 0:
        shown = f"{100 * share:.4g}"
    if shown == "100.00" and share < 1:
        shown = f"{100 * share:.7g}"
    return f"{shown} %"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _readable(value: Any) -> str:
    if value is None:
        return "–"
    if not _is_number(value):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _svg(figure: "Figure") -> str:
    """Base64 of the figure as SVG: as an image of its own, its ids and text cannot touch the
    page."""
    from matplotlib import rc_context

    data = io.BytesIO()
    with rc_context({"svg.hashsalt": "retromill"}):
        figure.savefig(data, format="svg", metadata={"Date": None})
    return base64.b64encode(data.getvalue()).decode()
