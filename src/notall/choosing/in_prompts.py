"""What is particular to sets that a prompt alone skips: compared after a repair, and
how many last tokens run whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UsageError
from ..measuring.quality import evaluate
from ..plan import Plan
from ..repairing.refitting import repair
from .objective import Objective, kl

LAST_TOKENS = 64  # of a prompt that run whole: a question has about as many
LEAST_EARLY = 4  # times as long as these the prompt is to be, so that skipping saves
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


def last_tokens_of(prompt_tokens: int) -> int:
    """How many last tokens of a prompt run whole where nobody names a number.

    Loss on text does not show what fewer cost: a question at the end of a prompt needs
    them (`benchmarks/prefill`).
    """
    return max(1, min(LAST_TOKENS, prompt_tokens // LEAST_EARLY))
