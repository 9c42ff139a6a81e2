"""How figures are written, on the terminal and on the page."""

from collections.abc import Sequence
from statistics import median


def distance(agreement: float | None) -> str:
    """How far a result is from what it should be; a dash where nothing was computed."""
    if agreement is None:
        return "-"
    return "equal" if agreement == 1 else f"{1 - agreement:.0e}"


def spread(ratios: Sequence[float]) -> str:
    """The median, and the lowest and the highest where there are several."""
    return f"{median(ratios):.3f}" + (f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else "")


def held_word(held: bool | None) -> str:
    """Whether a goal was reached; nothing where there is none."""
    return {None: "", True: "held", False: "did not hold"}[held]
