"""What is particular to sets that a prompt alone skips: compared after a repair, and
how many last tokens run whole.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UsageError
from ..measuring.quality import evaluate, score
from ..measuring.statistics import mean_and_error
from ..plan import Plan
from ..repairing.refitting import repair
from .objective import Objective, kl

LAST_TOKENS = (1, 8, 32)  # of a prompt, to try to run whole
# times as long as these the prompt is to be, so that it still saves what was asked for,
# about
LEAST_EARLY = 4
# as many nats as a limit are looked at, since a refit leaves a third of the KL or less
WIDER = 3.0


@dataclass(frozen=True)
class PromptRepair:
    """Plans after keys and values were refit to the sequences `fitted`, judged by the
    KL behind a prompt on others.
    """

    model: PreTrainedModel
    fitted: Sequence[Tensor]  # token ids, (batch, tokens) each
    judged: Sequence[Tensor]
    prompt_tokens: int | None  # None is refused as soon as a set is evaluated

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        batches: Sequence[Tensor],
        prompt_tokens: int | None,
    ) -> "PromptRepair":
        """Every second sequence is fitted to. Raises `UsageError` for fewer than
        four.
        """
        rows = [row for batch in batches for row in batch.split(1)]
        if len(rows) < 4:
            raise UsageError(
                "a search for what is best after a repair takes four sequences or more;"
                " give more text"
            )
        return cls(model, rows[::2], rows[1::2], prompt_tokens)

    @property
    def objective(self) -> Objective:
        """The KL behind the prompt on the sequences that are not fitted to."""
        return kl(self.judged, prompt_tokens=self.prompt_tokens)

    def repaired(self, plan: Plan) -> Plan:
        """A plan with refit keys and values; an empty one as it is."""
        return repair(self.model, plan, self.fitted) if plan else plan

    def kept(self, plan: Plan) -> float:
        """Minus the KL, so that more is better."""
        (quality,) = evaluate(
            self.model, [self.repaired(plan)], self.judged, self.prompt_tokens
        )
        return -quality.kl


def fitting(last_tokens: Sequence[int], prompt_tokens: int) -> list[int]:
    """Those that leave most of a prompt to skip in, the fewest first."""
    return sorted(one for one in last_tokens if one * LEAST_EARLY <= prompt_tokens)


@torch.no_grad()
def with_last_tokens(
    model: PreTrainedModel,
    plan: Plan,
    last_tokens: Sequence[int],
    windows: Sequence[Tensor],
    prompt_tokens: int,
    reached: Callable[[Plan], bool] = lambda _: True,
) -> Plan:
    """`plan` with as few last tokens run whole as `windows`, (batch, tokens) ids each,
    ask for.

    More are taken where they lower the KL behind the prompt by more than the error of
    that, and `reached` still holds.
    """
    plans = [running_last(plan, count) for count in last_tokens]
    scored = [score(model, plans, tokens, prompt_tokens) for tokens in windows]
    _, *found = (
        reduce(add, some).kl for some in zip(*scored)
    )  # KLs of the sequences, of the original first
    best = 0
    for place in range(1, len(plans)):
        falls, error = mean_and_error(
            [before - after for before, after in zip(found[best], found[place])]
        )
        if falls > error and reached(plans[place]):
            best = place
    return plans[best]


def running_last(plan: Plan, last_tokens: int) -> Plan:
    """`plan` of which so many last tokens of the prompt run whole."""
    return plan.model_copy(
        update={"prefill": plan.prefill.model_copy(update={"last_tokens": last_tokens})}
    )
