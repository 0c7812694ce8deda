"""What loops deep inside write down, so that a killed run goes on: sets that were evaluated, answers to requests."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from .facts import SearchCost
from .record import Count, Number, Record, SublayerName


class EvaluationRecord(Record):
    """One set of sublayers, evaluated; of the whole file the first line says by what."""

    file = "evaluations.jsonl"
    commands = ("search", "compare")
    key_fields = ("skipped", "batches")
    headed = True

    record: Literal["evaluation"] = "evaluation"
    skipped: tuple[SublayerName, ...] = Field(description="names of sublayers, sorted")
    batches: Count | Literal["all"] = Field(description="on how many of the objective's batches")
    cost: Number = Field(description="the objective; None where the model overflows without these")
    spent: SearchCost


Said = tuple[Number, bool] | Number | str  # log-likelihood and whether it is greedy, a log-likelihood, a text


class AnswersRecord(Record):
    """Answers to some requests, by the requests' digests, each in the order of the plans' digests."""

    file = "answers.jsonl"
    commands = ("eval", "paper")
    key_fields = ()

    record: Literal["answers"] = "answers"
    plans: tuple[str, ...]
    answers: dict[str, tuple[Said, ...]] = Field(description="one for each plan")

    @model_validator(mode="after")
    def _of_each_plan(self) -> AnswersRecord:
        if any(len(said) != len(self.plans) for said in self.answers.values()):
            raise ValueError("there is not one answer for each plan")
        return self
