"""Bars of what a plan saves, and settings as lines of words."""

from collections.abc import Iterable, Iterator, Mapping

from ..charts.layers import Saving
from ..experiments.verdict import NAME_LETTERS
from ..results.table import in_bytes
from .parts import PageStep


def short(text: str, length: int = NAME_LETTERS) -> str:
    """The text, cut after so many letters."""
    return text if len(text) <= length else text[:length] + "…"


def savings_of(number: int, step: PageStep) -> Iterator[Saving]:
    """Shares of the original model's time and bytes; of times as they were paired,
    round by round. `number` is that of the step on the page.
    """

    def bar(measure: str, text: str, share: float, low: float, high: float) -> Saving:
        return Saving(
            plan=number,
            name=short(step.name),
            measure=measure,
            text=f"{measure}: {text}",
            share=share,
            low=low,
            high=high,
        )

    if times := step.times:
        for measure, ms, speedup in (
            ("first token", times.prefill_ms, times.speedup_prefill),
            ("each further token", times.decode_ms_per_token, times.speedup_decode),
        ):
            text = f"{ms.median:,.1f} ms, {speedup.median:.2f}× as fast"
            low, high = 1 / speedup.high, 1 / speedup.low
            yield bar(measure, text, 1 / speedup.median, low, high)
    if (left := step.footprint) and (dense := step.dense):
        for measure, ours, whole in (
            ("weights", left.weight_bytes, dense.weight_bytes),
            ("KV cache a token", left.kv_bytes_per_token, dense.kv_bytes_per_token),
            ("states", left.state_bytes, dense.state_bytes),
        ):
            if whole and ours is not None:
                share, text = ours / whole, f"{in_bytes(ours)} of {in_bytes(whole)}"
                yield bar(measure, text, share, share, share)


def flatten(value: object, name: str = "") -> Iterable[tuple[str, str]]:
    """Nested settings as pairs of a name with dots, and its value in words."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from flatten(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, str(value)
