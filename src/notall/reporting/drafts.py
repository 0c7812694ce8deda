"""What a plan comes to as a draft model, in a sentence."""

from __future__ import annotations

from collections.abc import Sequence

from ..records.columns import Row
from ..records.drafting import DraftRecord


def best_of(records: Sequence[DraftRecord]) -> dict[str, DraftRecord]:
    """For each way to decode, how many tokens are best drafted, by the speedup that is predicted."""
    best: dict[str, DraftRecord] = {}
    for record in records:
        held = best.get(record.decoding)
        if held is None or record.predicted > held.predicted:
            best[record.decoding] = record
    return best


def said_of(records: Sequence[DraftRecord], refused: str = "") -> str:
    """If it makes decoding faster, at how many tokens a round it is best, and what transformers made of it."""
    said = f"Drafting with it would be {', and '.join(map(_phrase, best_of(records).values()))}."
    return f"{said} Nothing was measured: {refused}." if refused else said


def row_of(records: Sequence[DraftRecord], refused: str) -> Row:
    """For programs."""
    fields = ("drafted", "predicted", "measured", "tokens_per_round")
    best = {name: {field: getattr(one, field) for field in fields} for name, one in best_of(records).items()}
    return {"said": said_of(records, refused), "best": best, "refused": refused or None}


def _phrase(best: DraftRecord) -> str:
    pace = "faster" if best.predicted_low > 1 else "slower" if best.predicted_high < 1 else "about as fast"
    tokens = f"{best.drafted} token{'s' if best.drafted > 1 else ''} a round"
    if best.measured and best.measured < 1 < best.predicted_low:
        foretold = f"where {best.predicted:.2f}x was predicted at best, with {tokens}"
        return f"slower {best.decoding} in transformers (measured {best.measured:.2f}x, {foretold})"
    measured = f"; transformers measured {best.measured:.2f}x" if best.measured else ""
    return f"{pace} {best.decoding} (at best {best.predicted:.2f}x, with {tokens}{measured})"
