"""Every decoder type of transformers is accounted for: proved, refused with its reason,
or not tried, with one too.
"""

from __future__ import annotations

import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from families import FAMILIES, TRANSFORMERS_5, Family
from hybrid_families import HYBRIDS
from plain_families import NORMED_AFTER, OTHERS
from test_refusals import REFUSED
from verdicts import LINE, compare_or_record, read

WRAPPER = "what sees and hears around {}, which is tried itself"
NOT_TRIED = {
    "dots3_note": WRAPPER.format("dots3_note_text"),
    "gemma3n": WRAPPER.format("gemma3n_text"),
    "gemma4_unified": WRAPPER.format("gemma4_unified_text"),
    "llama4": WRAPPER.format("llama4_text"),
    "qwen4_exp": WRAPPER.format("qwen4_exp_text"),
    "got_ocr2": "reads pictures; its text decoder is Qwen2, which is tried itself",
    "moss_transcribe_diarize": (
        "transcribes sound; its text decoder cannot be made small"
    ),
    "musicgen": (
        "makes sound; which of its parts is the text decoder cannot be told from its"
        " config"
    ),
    "musicgen_melody": (
        "makes sound; which of its parts is the text decoder cannot be told from its"
        " config"
    ),
    "gemma4_assistant": "a draft model, which runs on another model's states",
    "gemma4_unified_assistant": "a draft model, which runs on another model's states",
    "blt": "several models in one",
    "hrm_text": "two stacks of layers in a loop, no single list",
    "dory": "its stream is interpolated, so that adding nothing is not leaving out",
    "cpmant": "attends both ways, and says other things with a cache than without",
    "prophetnet": (
        "predicts n-grams in streams of their own, and says other things with a cache"
        " than without"
    ),
    "xlm": "has a list for each part of a layer, no list of layers",
    "xlnet": "has no cache of keys and values; looks both ways",
    "reformer": "reversible layers in two streams, and a cache of its own",
    "xlstm": "keeps its state in a cache of its own, which the model hands on",
}

pytestmark = pytest.mark.skipif(
    not TRANSFORMERS_5, reason="of the types that transformers 5 has"
)


def tried() -> list[Family]:
    return [*FAMILIES, *HYBRIDS, *OTHERS, *NORMED_AFTER]


def release(version: str) -> tuple[int, ...]:
    """Such as (5, 25) of 5.25.1, which adds no type."""
    return tuple(map(int, version.split(".")[:2]))


def test_every_type_is_tried_or_it_is_said_why_not() -> None:
    recorded = max(map(release, (line["transformers"] for line in read())))
    if release(transformers.__version__) > recorded:
        pytest.skip(f"transformers {transformers.__version__}: make architectures")
    known = {family.model_type for family in tried()} | REFUSED.keys()
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - known == NOT_TRIED.keys()
    for name, reason in NOT_TRIED.items():
        named = (
            f"{name} (whole)" if reason.startswith("what sees") else name
        )  # beside its text part
        compare_or_record(named, verdict="not tried", reason=reason)


def test_most_types_are_proved_by_halves() -> None:
    exact = {
        line["family"]
        for line in read()
        if line["line"] == LINE and line["verdict"] == "exact"
    }
    proved = [family for family in tried() if family.name in exact]
    types = {family.model_type for family in proved}.intersection(
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    )
    whole = {
        family.model_type
        for family in proved
        if family.only_mlp or family.only_attention
    }
    assert len(types) >= 130
    assert len(types - whole) >= 125
