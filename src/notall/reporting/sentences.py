"""What a plan comes to, in one sentence: what is left out, what that brings, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..records.columns import Row, is_number
from .rows import in_words, shorten
from .usable import is_usable
from .verdict import in_nats, nats_lost, perplexity_factor

TIMED = {"speedup_decode": "decodes", "speedup": "runs"}  # which verb tells of a speedup
BYTES = {"weight_bytes": "weights", "kv_bytes_per_token": "a KV cache"}
LEAST_SAVED = 0.005  # what rounds to 0% is no saving


def sentence(model: str, record: Row, dense: Row | None = None, layers: int = 0, named: str = "") -> str:
    """`record` holds the plan and what is known of it, `dense` the bytes of the dense model; `named`: what it is."""
    among = (f" of its {layers} layers" if layers else "") + (f" ({shorten(named)})" if named else "")
    state = f"the {record['model']} " if record.get("model") in ("repaired", "healed") else ""
    does = " with ".join(filter(None, (_speed(record), joined([*_smaller(record, dense)]))))
    if does and not _speed(record):
        does = f"has {does}"
    return f"Without {in_words(record['plan'])}{among}, {state}{shorten(model)} {_outcome(does, record)}."


def loss_of(record: Row) -> str:
    """Such as `+0.39 ± 0.02 nats a token (perplexity × 1.48; 70% of its first choices stay)`."""
    error, agreement = record.get("delta_nll_se"), record.get("top1_agreement")
    nats = in_nats(record, 3 if is_number(error) and error < 0.005 else 2)
    stays = "" if agreement is None else f"; {agreement:.0%} of its first choices stay"
    return f"{nats} nats a token (perplexity × {perplexity_factor(nats_lost(record)):.3g}{stays})"


def joined(parts: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *most, last = parts or ("",)
    return f"{', '.join(most)} and {last}" if most else last


def _outcome(does: str, record: Row) -> str:
    if record.get("delta_nll") is None:
        return f"{does or 'is smaller'}; what that costs was not measured"
    if is_usable(record):
        return f"{does or 'is still usable'}, at {loss_of(record)}"
    return f"{f'{does}, but ' if does else ''}is no longer usable: {loss_of(record)}"


def _speed(record: Row) -> str:
    for name, verb in TIMED.items():
        if record.get(name) is not None:
            low, middle, high = (record[f"{name}{end}"] for end in ("_low", "", "_high"))
            spread = f"quartiles {low:.2f} to {high:.2f}"
            if low <= 1 <= high:
                return f"{verb} about as fast ({middle:.2f}×, {spread})"
            return f"{verb} {middle:.2f}× as fast ({spread})"
    return ""


def _smaller(record: Row, dense: Row | None) -> Iterator[str]:
    for name, what in BYTES.items():
        if dense and dense.get(name):
            saved = 1 - record[name] / dense[name]
            if saved >= LEAST_SAVED:
                yield f"{what} smaller by {saved:.0%}"
