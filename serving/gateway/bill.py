"""What a request cost, as its client is told: in headers, or at the end of a stream."""

from __future__ import annotations

from dataclasses import dataclass

# Scripts in browsers see these only where CORS exposes them.
COST_HEADERS = (
    "x-rigserve-cost-usd",
    "x-rigserve-cost-energy-usd",
    "x-rigserve-cost-basis",
    "x-rigserve-compare-model",
    "x-rigserve-compare-usd",
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What the tokens of a request would have cost at a commercial model, by its list prices."""

    model: str
    usd: float


@dataclass(frozen=True, slots=True)
class Bill:
    """What a request cost here: all costs, and of these the energy. See docs/cost-model.md.

    ``estimated``: a figure that this rests on was not measured.
    """

    usd: float
    energy_usd: float
    estimated: bool
    elsewhere: Comparison | None

    @property
    def headers(self) -> dict[str, str]:
        """For a whole answer."""
        values = [
            _usd(self.usd),
            _usd(self.energy_usd),
            "estimated" if self.estimated else "measured",
        ]
        if self.elsewhere:
            values += [self.elsewhere.model, _usd(self.elsewhere.usd)]
        return dict(zip(COST_HEADERS, values, strict=False))

    @property
    def comment(self) -> bytes:
        """For a stream, whose headers are sent before its cost is known: SSE clients skip comments."""
        lines = [f": {name}: {value}\n" for name, value in self.headers.items()]
        return "".join(lines).encode() + b"\n"


def _usd(amount: float) -> str:
    # A token of a small model costs less than a millionth: no exponents, which few parsers of headers expect.
    return f"{amount:.12f}"
