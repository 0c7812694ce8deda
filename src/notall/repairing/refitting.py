"""Refit what a plan keeps, sublayer by sublayer, so that the skipped model's stream
comes near the original model's.

At a kept sublayer with features z and output projection W, the least change C is sought
for which S + (W + C) z is near D: S is the skipped model's stream, with all that was
refit before, D the original's behind the gap that follows. A ridge on C is chosen on
sequences that it was not fitted to. Nothing is trained, and no tensor is added.
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..digests import digest_of
from ..errors import UsageError, expect
from ..models.loading import dtype_name
from ..models.quantisation import quantisation_name, quantisation_of
from ..models.texts import all_checked
from ..plan import Plan
from ..progress import Progress, silent
from ..results.ledger import working_in
from ..results.provenance import Provenance
from ..results.repairs import RefitRecord
from ..running import repair_folder, weight_swaps
from ..running.repair_folder import refit_file
from ..running.repaired import RepairedPlan
from ..running.skipping import refuse_skipping
from ..structure.locating import locate
from ..structure.model_structure import base_model
from .kept import Kept
from .projections import READERS, OutputProjection, features_of, reading_gains
from .prompt_refit import PromptRefit
from .solving import Fit, NormedFit
from .streams import DenseStream, LiveStep, steps_of

RIDGES = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
REFIT_COST = 6  # of a step, about, in runs of one: it is what a bar goes by
AHEAD = 0.5  # the share of the next gap's change that is aimed at already


@torch.no_grad()
def repair(
    model: PreTrainedModel,
    plan: Plan,
    batches: Sequence[Tensor],
    *,
    ridges: Sequence[float] = RIDGES,
    ahead: float = AHEAD,
    offload: Path | None = None,
    out: str | os.PathLike[str] | None = None,
    provenance: Provenance | Mapping[str, object] | None = None,
    progress: Progress = silent,
) -> RepairedPlan:
    """`plan`, with weights of what it keeps that make up for what it skips; the model
    itself stays as it is.

    Of a plan that skips in the prompt alone, the prompt's tokens get weights of their
    own (`PromptRefit`): keys and values of attentions, and maps that stand in for
    MLPs; all weights that an answer is made with stay as they are.

    `batches` are token ids, (batch, tokens) each: some ten thousand tokens of texts of
    several kinds. One sequence in eight is held out. `ridges` are the strengths to try,
    relative to each feature's mean square; `math.inf` leaves a sublayer unchanged.
    `ahead` is the share of the next gap's change that a sublayer aims at already.
    Streams and features of the text are in memory, or in files of the folder `offload`.
    `refits` of the result says what became of each sublayer. With a folder `out`,
    repeating the call resumes an interrupted run, which `provenance` identifies.

    Raises `UsageError` for fewer than two sequences, a plan that does not fit, skips
    nothing or is repaired, a model of which all that is kept is quantised, a folder
    that holds other work or is in use, and a full disk, and `UnsupportedModel` as
    `locate` does.
    """
    batches, inner = all_checked(batches, model), base_model(model)
    _check(inner, plan, sum(len(batch) for batch in batches))
    how = {
        "calibration": digest_of(batches)[:16],
        "ridges": list(ridges),
        "ahead": ahead,
    }
    about = about_weights(provenance or {}, inner, plan, **how)
    folder = Path(out) if out else None
    with working_in(folder, "repair"):
        kept = Kept(folder, plan, about) if folder else None
        if kept and kept.finished:
            found = RepairedPlan.load(kept.folder)
            found.check_replaced(inner)
        else:
            text = DenseStream(inner, batches, offload=offload)
            if plan.prefill:
                prompt = PromptRefit(text, plan, ridges=ridges, kept=kept)
                refit = prompt.run(progress)
            else:
                whole = Refitting(text, plan, ridges=ridges, ahead=ahead, kept=kept)
                refit = whole.run(progress)
            found = refit.knowing(inner)
    quantisation = quantisation_of(inner.config)
    if quantisation and all(refit.why for refit in found.refits):
        raise UsageError(
            f"what this plan keeps is quantised ({quantisation_name(quantisation)}),"
            " and a refit weight cannot be stored in this format: repair the plan on the model"
            " that was quantised, export that, and quantise the export"
        )
    return found.model_copy(
        update={"history": (repair_folder.step_of("repair", about),)}
    )


def about_weights(
    settings: Provenance | Mapping[str, object],
    model: PreTrainedModel,
    plan: Plan,
    **how: object,
) -> Provenance:
    """The settings of a run, with the plan, the model and `how` its weights are made."""
    facts = {
        "plan": plan.indices,
        "fingerprint": locate(model).fingerprint,
        "dtype": dtype_name(model),
    }
    return Provenance.of(settings, **facts, **how)


def _check(model: PreTrainedModel, plan: Plan, sequences: int) -> None:
    expect(plan, Plan, "a plan, such as notall.Plan(attention=[3])")
    if sequences < 2:
        raise UsageError(
            "a repair takes sequences to fit and others to choose the ridge by;"
            f" {sequences} is too few: give 2 or more"
        )
    structure = locate(model)
    plan.check(structure)
    if plan.prefill and len(plan):
        raise UsageError(
            "a repair is of what is skipped for every token, or in the prompt alone,"
            " and this plan does both: repair a plan of each part"
        )
    structure.refuse_stubs("a repair")
    refuse_skipping(model, "repairing a plan")
    if not plan:
        raise UsageError("the plan skips nothing, so there is nothing to make up for")
    if isinstance(plan, RepairedPlan):
        raise UsageError(
            "the plan is repaired already: heal it, or repair the plan.json that it"
            " holds"
        )


@dataclass(eq=False)
class Refitting:
    """One plan's repair: two streams on their way through the model. `states` end as
    what the last layer answers.
    """

    text: DenseStream
    plan: Plan
    ridges: Sequence[float] = RIDGES
    ahead: float = AHEAD
    near: bool = False  # leaves what stands before no gap as it is
    kept: Kept | None = None
    keep_all: bool = False  # keeps the stream behind each step, for others

    def __post_init__(self) -> None:
        text = self.text
        self.steps = steps_of(text.structure, self.plan)
        gains = reading_gains(
            text.model, text.layers, [step.parts for step in self.steps]
        )
        self.metrics = {step.names: gain for step, gain in zip(self.steps, gains)}
        # the gap behind the following step, part of which a step aims at already
        following = self.steps[1:] if self.ahead else []
        self.gaps_ahead = [step if step.gap else None for step in following]
        self.gaps_ahead += [None] * (len(self.steps) - len(following))
        near_gaps = [
            step.gap or gap is not None
            for step, gap in zip(self.steps, self.gaps_ahead)
        ]
        # whether the two streams differ before a step
        self.apart = [
            self.steps[0].line > 0 or any(near_gaps[:number])
            for number in range(len(self.steps))
        ]
        self.is_refit = [
            is_near or (apart and not self.near)
            for is_near, apart in zip(near_gaps, self.apart)
        ]
        # a step, and where it is refit those that read it, by whose gains it is weighed
        self.hangs_on = [
            self.steps[at : at + 1 + (READERS if is_refit else 0)]
            for at, is_refit in enumerate(self.is_refit)
        ]
        self.made: list[tuple[RefitRecord, dict[str, Tensor]]] = []
        self.states: list[Tensor] = []
        # the stream behind each step, and how many were refit by then
        self.passed: list[tuple[list[Tensor], int]] = []
        self.ran = 0  # sublayers of the skipped model run so far

    def run(
        self, progress: Progress = silent, *, others: "Sequence[Refitting]" = ()
    ) -> RepairedPlan:
        """The repaired plan; it goes on from that of the `others` that it shares most
        with.
        """
        (self.states,) = self.text.before(0)
        # itself, which has passed none yet, where there are no others
        other = max(others, key=self.shared_with, default=self)
        self.passed = other.passed[: self.shared_with(other)]
        if self.passed:
            self.states, made = self.passed[-1]
            self.made = other.made[:made]
        costs = [REFIT_COST if is_refit else 1 for is_refit in self.is_refit]
        for number in range(len(self.passed), len(self.steps)):
            step = self.steps[number]
            doing = f"refitting {' '.join(step.names)}"
            progress(sum(costs[:number]), sum(costs), doing)
            if self.is_refit[number]:
                target = self._target(step, self.gaps_ahead[number])
                self.states = self._refit(step, target)
            elif self.apart[number]:
                self.states = self._run(step)
            else:
                (self.states,) = self.text.before(step.behind)
            if self.keep_all:
                self.passed.append((self.states, len(self.made)))
        refits = tuple(refit for refit, _ in self.made)
        count = sum(one.ridge is not None for one in refits)
        progress(sum(costs), sum(costs), f"refit {count}")
        if self.kept:
            return self.kept.sealed(self.plan)
        weights = {
            path: weight for _, made in self.made for path, weight in made.items()
        }
        return RepairedPlan.of(self.plan, weights=weights, refits=refits)

    def shared_with(self, other: "Refitting") -> int:
        """How many of the first steps another repair went past in the same way."""
        both = list(zip(self.hangs_on, other.hangs_on[: len(other.passed)]))
        return next(
            (number for number, (ours, theirs) in enumerate(both) if ours != theirs),
            len(both),
        )

    def _target(self, step: LiveStep, ahead: LiveStep | None) -> list[Tensor]:
        """Where the stream is to be behind a step: where the dense one is, and some way
        on over the gap `ahead`.
        """
        if not ahead:
            return self.text.before(step.behind)[0]
        # the dense stream in front of the step `ahead`, behind it, and behind its gap
        streams = self.text.before(step.behind, step.behind + 1, ahead.behind)
        to_end, to_start = ahead.scale, ahead.own_scale
        # `end / to_end - start / to_start` is what the gap adds, before scales
        return [
            self.text.keep(here + self.ahead * (end / to_end - start / to_start))
            for here, start, end in zip(*streams)
        ]

    def _refit(self, step: LiveStep, target: list[Tensor]) -> list[Tensor]:
        """The stream behind a step, (batch, tokens, hidden) a batch, with new weights
        that bring it near `target`.
        """
        if self.kept is None:
            refit, weights = self._solve(step, target)
            self.made.append((refit, weights))
        else:
            weights = self._refit_in_folder(self.kept, step, target)
        with weight_swaps.with_weights(self.text.model, weights):
            return self._run(step)

    def _refit_in_folder(
        self, kept: Kept, step: LiveStep, target: list[Tensor]
    ) -> dict[str, Tensor]:
        """The new weights of a step, which are in a file, so that those of all steps
        are never in memory together.
        """
        key = (step.names,)  # of the record, whose one field that is
        if key not in kept.refits:
            refit, weights = self._solve(step, target)
            kept.add(refit, RepairedPlan(weights=weights), self.text.model)
        refit = kept.refits[key]
        self.made.append((refit, {}))
        if refit.ridge is None:
            return {}
        file = refit_file(refit)
        return repair_folder.read_weights(kept.folder, file, refit.sha256).weights

    def _solve(
        self, step: LiveStep, target: list[Tensor]
    ) -> tuple[RefitRecord, dict[str, Tensor]]:
        """What became of a step, and its new weights by their paths in the model."""
        start = time.process_time()
        projections = self._projections_of(step)
        ridge, left, weights = None, 1.0, dict[str, Tensor]()
        why = "no matrix of its own is the last before the stream"
        if projections:
            ridge, left, weights = self._fit(step, projections, target)
            why = ""
        record = RefitRecord(
            sublayers=step.names,
            ridge=ridge,
            left=left,
            seconds=time.process_time() - start,
            why=why,
        )
        return record, self.text.placed(step, weights)

    def _projections_of(self, step: LiveStep) -> tuple[OutputProjection, ...]:
        """The output projections of a step's sublayers, with the step's scale; none
        where one has a norm behind it, and another is added to that.
        """
        found = [self.text.projections.of(part, own=True) for part in step.parts]
        projections = tuple(
            replace(one, scale=one.scale * step.scale)
            for one in found
            if one is not None
        )
        if len(projections) > 1 and any(one.norm for one in projections):
            return ()
        return projections

    def _fit(
        self,
        step: LiveStep,
        projections: tuple[OutputProjection, ...],
        target: list[Tensor],
    ) -> tuple[float | None, float, dict[str, Tensor]]:
        """The ridge, the share of the error that is left on what is held out, and new
        weights, by their paths in the layer.
        """
        layer = self.text.layers[step.block.index]
        keep = self.text.keep
        with features_of(layer, projections, keep) as features:
            behind = self._run(step)
        before = self.states
        if step.scale != 1:
            before = [keep(step.scale * hidden) for hidden in self.states]
        kind = NormedFit if projections[0].norm else Fit
        fit = kind(
            layer,
            projections,
            before,
            behind,
            target,
            features(),
            self.text.held,
            self.metrics[step.names],
        )
        return fit.best(self.ridges)

    def _run(self, step: LiveStep) -> list[Tensor]:
        self.ran += len(step.parts)
        return self.text.run([step], self.states)
