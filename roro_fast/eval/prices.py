"""What an answer costs by a price table, as providers of language models write them."""

from __future__ import annotations

from dataclasses import dataclass

from roro_fast.config import ModelsConfig
from roro_fast.engine.trajectory import Cost

MILLION = 1e6


@dataclass(frozen=True, slots=True)
class Prices:
    """Per model, smallest first: price of a million tokens `generated`, and of a million tokens `read`."""

    generated: tuple[float, ...]
    read: tuple[float, ...]

    def of(self, cost: Cost) -> float:
        """Price of one answer: what every model generated, its discarded drafts included, and what it only read.

        Drafts are the smallest model's. A model reads what is run through it but not its own: the prompt, and the steps
        of others on a switch.
        """
        total = 0.0
        for m, (kept, run) in enumerate(zip(cost.generated_tokens, cost.forward_tokens, strict=True)):
            written = kept + (cost.discarded_tokens if m == 0 else 0)
            total += self.generated[m] * written + self.read[m] * max(run - written, 0)
        return total / MILLION


def price_table(config: ModelsConfig) -> Prices | None:
    """The config's prices; None when it has none."""
    if not config.prices:
        return None
    return Prices(tuple(config.prices), tuple(config.read_prices or [0.0] * len(config.prices)))
