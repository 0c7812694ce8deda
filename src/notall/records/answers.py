"""What plans answered to the requests of benchmarks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from .record import Number, Record

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
