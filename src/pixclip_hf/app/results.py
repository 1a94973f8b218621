"""The demo's results as HTML: every text is escaped, colors follow the page's theme."""

from collections.abc import Sequence
from html import escape

from ..visualization import REGION_COLORS
from .drawing import HEAT
from .predictions import Found, Region, TextPlace, TextScore

MOST_TEXTS = 3  # of a region that are shown
STYLE = """
.regions {display: grid; gap: 14px}
.region {display: grid; grid-template-columns: auto 1fr; gap: 4px 10px; align-items: start}
.region .chip {padding: 1px 9px; border-radius: 4px; font-weight: 700}
.region .texts {display: grid; gap: 6px}
.region .text {position: relative; padding: 3px 8px; border-radius: 4px; overflow-wrap: anywhere;
  display: grid; grid-template-columns: 1fr auto auto; gap: 12px; background: var(--background-fill-secondary)}
.region .text .bar {position: absolute; inset: 0 auto 0 0; border-radius: 4px; opacity: .28}
.region .text > span {position: relative; color: var(--body-text-color)}
.region .best {font-weight: 600}
.region .number, .note .number {font-variant-numeric: tabular-nums; white-space: nowrap}
.note {color: var(--body-text-color-subdued)}
.heat {height: 10px; border-radius: 5px; background: linear-gradient(90deg, COLORS)}
.scale {display: grid; grid-template-columns: auto 1fr auto; gap: 10px; align-items: center}
""".replace("COLORS", ", ".join(HEAT))
KIND_NAMES = {"box": "box", "mask": "mask", "point": "points"}


def scores_html(regions: Sequence[Region], scores: Sequence[Sequence[TextScore]], cut: int = 0) -> str:
    """The texts of each region, best first, with their shares as bars and their cosines.

    Args:
        regions: as they were drawn.
        scores: for each region its texts.
        cut: how many texts the model read the beginning of.
    """
    rows = [_row(number, region, best) for number, (region, best) in enumerate(zip(regions, scores, strict=True))]
    return f'<div class="regions">{"".join(rows)}</div>{_note(cut)}'


def _row(number: int, region: Region, best: Sequence[TextScore]) -> str:
    color, ink = REGION_COLORS[number % len(REGION_COLORS)]
    texts = "".join(
        f'<div class="text{" best" * (rank == 0)}">'
        f'<div class="bar" style="width: {100 * score.share:.1f}%; background: {color}"></div>'
        f"<span>{escape(score.text)}</span>"
        f'<span class="number">{100 * score.share:.0f} %</span><span class="number">{score.cosine:.2f}</span></div>'
        for rank, score in enumerate(best[:MOST_TEXTS])
    )
    chip = f'<span class="chip" style="background: {color}; color: {ink}">{number + 1}</span>'
    return f'<div class="region" title="{KIND_NAMES[region.kind]}">{chip}<div class="texts">{texts}</div></div>'


def place_html(place: TextPlace, cut: int = 0) -> str:
    """The scale of a heat map, and what is known about the box."""
    low, high = float(place.values.min()), float(place.values.max())
    scale = (
        f'<div class="scale note"><span class="number">{low:.2f}</span><div class="heat"></div>'
        f'<span class="number">{high:.2f}</span></div>'
    )
    if place.box is None:
        box = "This model finds no boxes; the map shows where the text is most similar."
    else:
        edges = ", ".join(f"{edge:.0f}" for edge in place.box)
        score = f'<span class="number">{place.score:.2f}</span>'
        box = f'Box <span class="number">[{edges}]</span>, similarity of what lies in it {score}.'
    return f'{scale}<p class="note">{box}</p>{_note(cut)}'


def caption(found: Found) -> str:
    """What stands below a hit."""
    return " · ".join(filter(None, [f"{found.cosine:.2f}", found.category, found.id]))


def _note(cut: int) -> str:
    if not cut:
        return ""
    many = "1 text is" if cut == 1 else f"{cut} texts are"
    return f'<p class="note">{many} longer than the model reads: only the beginning counts.</p>'
