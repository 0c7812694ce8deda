"""What `notall paper` writes down: the grid on benchmarks, what accuracy hides, and times by prompt and batch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .bench import BATCH, PROMPT
from .columns import number, plain, probability, with_error
from .record import (
    CONFIGURED,
    PEAK,
    SIZE,
    TIMES,
    Configured,
    Count,
    Number,
    Record,
    Share,
    SizeFields,
    TimeFields,
    Unsigned,
)

METRICS = {
    "acc": "accuracy",
    "acc_norm": "normalized accuracy",
    "exact_match": "exact match",
    "f1": "F1",
    "bleu": "BLEU",
    "perplexity": "perplexity",
    "word_perplexity": "perplexity a word",
    "byte_perplexity": "perplexity a byte",
    "bits_per_byte": "bits a byte",
}


def usual_metric(metric: str) -> str:
    """The harness's `metric,filter` by its usual name: acc_norm,none is normalized accuracy."""
    name, _, kind = metric.partition(",")
    said = METRICS.get(name, name.replace("_", " "))
    return said if kind in ("", "none") else f"{said} ({kind.replace('-', ' ')})"


TASK = (plain("task"), plain("metric", write=usual_metric))
DIFFERENCE = with_error("delta", "difference")
WORSE = plain("worse", write=lambda worse: "worse" if worse else "")
P = probability("p_value", "p")
VALUE = with_error("value", "value")
DOCUMENTS = (number("num_fewshot", "shots", "d"), number("documents", "documents", "d"))


class BenchmarkRecord(Record, Configured):
    """One configuration on one task, beside the dense model on the same documents."""

    file = "benchmarks.jsonl"
    commands = ("paper",)
    key_fields = ("task", "metric", "variant", "fraction", "keep_last")
    columns = (*TASK, *CONFIGURED, DIFFERENCE, P, VALUE, *DOCUMENTS)

    record: Literal["benchmark"] = "benchmark"
    task: str = Field(description="as the harness names it")
    metric: str = Field(description="metric,filter of the harness")
    num_fewshot: Count = Field(description="examples shown before a question")
    documents: Count = Field(description="how many were evaluated")
    value: Number = Field(description="the harness's own figure")
    value_se: Unsigned = Field(description="its standard error over documents, as the harness has it")
    delta: Number = Field(description="value less the dense model's")
    delta_se: Unsigned = Field(description="standard error of delta, paired by document")
    p_value: Share = Field(description="of no difference: McNemar's exact test for accuracies, else normal")
    higher_is_better: bool | None
    values: tuple[Number, ...] | None = Field(description="the metric of each document, where it is a number")


class BatteryRecord(Record, Configured):
    """One check of one configuration beside the dense model."""

    file = "battery.jsonl"
    commands = ("paper",)
    key_fields = ("part", "check", "variant", "fraction", "keep_last")
    columns = (plain("check"), *CONFIGURED, DIFFERENCE, WORSE, P, VALUE)

    record: Literal["battery"] = "battery"
    part: str = Field(description="of the battery")
    check: str
    value: Number
    value_se: Unsigned
    delta: Number = Field(description="value less the dense model's")
    delta_se: Unsigned
    p_value: Share
    better: Literal["higher", "lower"] | None
    worse: bool = Field(description="worse beyond its error: p < 0.05, not corrected for the number of checks")


class TimesRecord(Record, SizeFields, TimeFields, Configured):
    """One configuration at one prompt length and batch size."""

    file = "times.jsonl"
    commands = ("paper",)
    key_fields = ("prompt_tokens", "asked_batch_size", "variant", "fraction", "keep_last")
    columns = (*CONFIGURED, PROMPT, BATCH, *TIMES, *SIZE, PEAK)

    record: Literal["times"] = "times"
    prompt_tokens: Count
    batch_size: Count = Field(description="sequences at once, as many as memory held")
    asked_batch_size: Count
    peak_bytes: Count | None = Field(description="most CUDA memory allocated while timing; None without CUDA")
