"""Measures as a markdown table."""

import math
from collections.abc import Iterable, Mapping


def standard_error(share: float, count: int) -> float:
    """Standard error of a share of `count` independent decisions."""
    return math.sqrt(share * (1 - share) / count) if count else float("nan")


def share(metrics: Mapping[str, float], name: str, count: str) -> str:
    """`82.1 ± 0.9 % of 1812`: the measure `name`, of as many decisions as `metrics[count]` says."""
    value, number = metrics[name], int(metrics[count])
    return f"{100 * value:.1f} ± {100 * standard_error(value, number):.1f} % of {number}"


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A markdown table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
