"""A plan as a draft model: table, sentence and page."""

from __future__ import annotations

import math
from typing import get_args

from ..experiments.draft import Drafted, DraftRecord
from ..plan import several
from ..results.facts import SIGNIFICANT, Decoding
from ..results.lines import finite
from ..results.table import Column, number, table, with_error, with_quartiles, words
from ..strict_json import Settings
from .folder import Folder
from .parts import PageParts, Section

NOTE = (
    "The plan's model drafts tokens, and the original checks them in one step: the text"
    " is the original model's. Below 1, drafting is slower. Predicted: what a round"
    " gives over what its steps take. Measured: transformers' own generate, greedy, at"
    " the number of tokens that is best."
)


COLUMNS: tuple[Column[DraftRecord], ...] = (
    words("decoding", lambda one: one.decoding),
    number("drafted", lambda one: one.drafted, "d", unit="tokens a round"),
    with_quartiles("predicted speedup", lambda one: one.predicted, ".2f"),
    with_quartiles("measured speedup", lambda one: one.measured, ".2f"),
    with_error(
        "tokens a round",
        lambda one: (one.tokens_per_round, one.tokens_per_round_se),
        ".2f",
    ),
    with_error(
        "the last accepted", lambda one: (one.acceptance, one.acceptance_se), ".2f"
    ),
    number("draft ms", lambda one: one.draft_ms, ".1f"),
    number("check ms", lambda one: one.check_ms, ".1f"),
    number("dense ms", lambda one: one.dense_ms, ".1f"),
    words(
        "same texts",
        lambda one: (
            "" if one.same_texts is None else f"{one.same_texts} of {one.texts}"
        ),
    ),
    words("model", lambda one: one.model),
    words("skipped", lambda one: one.plan.in_words()),
)


def verdict(found: Drafted) -> Settings:
    """If it makes decoding faster, at how many tokens a round it is best, and what
    transformers made of it.

    `said` is that in words; `best` has the figures by the way to decode, those at the
    best speedup that is predicted.
    """
    figures, phrases = dict[str, Settings](), list[str]()
    for decoding in get_args(Decoding):
        some = [one for one in found.records if one.decoding == decoding]
        if not some:
            continue
        best = max(some, key=lambda one: one.predicted.median)
        figures[decoding] = {
            "drafted": best.drafted,
            "predicted": best.predicted.median,
            "measured": best.measured.median if best.measured else math.nan,
            "tokens_per_round": best.tokens_per_round,
        }
        phrases.append(f"{_pace(best, len(some))} {decoding} ({_speedups(best)})")
    sentence = f"Drafting with it would be {', and '.join(phrases)}."
    if found.refused:
        sentence += f" Nothing was measured: {found.refused}."
    refused = found.refused or None
    return finite({"said": sentence, "best": figures, "refused": refused})


def _speedups(best: DraftRecord) -> str:
    """What was predicted, and what was measured if it was."""
    drafted = f"with {several(best.drafted, 'token')} a round"
    predicted = f"at best {best.predicted.median:.2f}x predicted, {drafted}"
    if not best.measured:
        return predicted
    return f"{predicted}; measured in transformers: {best.measured.median:.2f}x"


def _pace(best: DraftRecord, tried: int) -> str:
    """Whether drafting is faster, by the best of so many numbers of tokens that were
    `tried`.

    By the 95 % interval of what is predicted, of the rounds and of the texts, made
    wider as the best of several is looked at (Bonferroni); and slower where what was
    measured says so.
    """
    from ..measuring.statistics import Estimate, combined, of_rounds

    share = best.tokens_per_round_se / best.tokens_per_round
    of_texts = Estimate(0.0, share * best.predicted.median, best.texts - 1)
    speedup = combined([(1.0, of_rounds(best.predicted)), (1.0, of_texts)])
    low, high = speedup.ends(1 - SIGNIFICANT / tried)
    if high < 1 or (best.measured and of_rounds(best.measured).ends()[1] < 1):
        return "slower"
    return "faster" if low > 1 else "inconclusive"


def page_parts(folder: Folder) -> PageParts:
    """A table of all numbers of drafted tokens that were tried."""
    rows = table("drafts", COLUMNS, folder.of(DraftRecord))
    section = Section("drafts", "As a draft model", table=rows, note=NOTE)
    return PageParts(sections=(section,))
