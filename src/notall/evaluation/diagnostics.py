"""What accuracy hides: long texts, finding a fact far back, calibration, and what the
model says when left to write.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UsageError
from ..measuring.quality import check_prompt
from ..measuring.recovery import recovery_interval
from ..measuring.statistics import (
    jackknife_error,
    mean_and_error,
    sign_flip_p_value,
    student_p_value,
    too_few,
)
from ..measuring.token_scores import TokenScorer
from ..models.retrieval import CONTEXTS, Episode, episode
from ..plan import Plan, several
from ..progress import Progress, Stages, generation_work, reading, silent
from ..results.facts import Check, Recovery
from ..running.generating import ends_of, greedy
from ..running.recording import record
from ..running.replay import Replay
from ..running.skipping import skip
from .scoring import Request, Scorer, common

BINS = 15  # of confidence, as in Guo et al.
KEYS = 8  # of passkeys, a length: six that are lost are more than chance
PARTS = ("long texts", "passkey", "writing")
WINDOWS, WINDOW_TOKENS = (
    8,
    1024,
)  # of text, that commands read: a test of signs takes six at least
BEGINNING, NEW_TOKENS = (
    64,
    64,
)  # tokens of a window that are continued, and that continue it
NGRAM = 4

Known = tuple[float, float]  # a figure and its standard error


def run_diagnostics(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plans: Sequence[Plan],
    windows: Sequence[Tensor],
    *,
    parts: Sequence[str] = PARTS,
    contexts: Sequence[int] = CONTEXTS,
    new_tokens: int = NEW_TOKENS,
    seed: int = 0,
    progress: Progress = silent,
) -> list[list[Check]]:
    """Of each of `plans` its checks, beside the original model: all, or some `parts` of
    them.

    `windows` are token ids, (1, tokens) each, the longer the better: they give NLL by
    position and calibration, their beginnings the prompts to continue. Passkeys are
    asked for at `contexts` tokens. Raises `UsageError` when a plan does not fit, and
    where there is no window.
    """
    checks: dict[str, Callable[[], list[list[Check]]]] = {
        "long texts": lambda: text_checks(model, plans, windows),
        "passkey": lambda: check_passkey(model, tokenizer, plans, contexts, seed=seed),
        "writing": lambda: check_writing(model, plans, windows, new_tokens),
    }
    found: list[list[Check]] = []
    steps = progress_steps(
        windows, len(plans) + 1, contexts=contexts, new_tokens=new_tokens
    )
    stages = Stages(progress, sum(steps[part] for part in parts))
    for part in parts:
        stages.stage(steps[part])(0, 1, f"{part}, {several(len(plans), 'plan')}")
        found += checks[part]()
    return [list(of_plan) for of_plan in zip(*found)]


def progress_steps(
    windows: Sequence[Tensor],
    plans: int,
    *,
    contexts: Sequence[int] = CONTEXTS,
    new_tokens: int = NEW_TOKENS,
) -> dict[str, float]:
    """What each part takes so many plans, the original one among them, in tokens that
    are read.
    """
    texts = sum(window.numel() for window in windows)
    prompts = plans * reading(BEGINNING * len(windows))
    return {
        "long texts": reading(texts, plans),
        "passkey": reading(KEYS * sum(contexts), plans),
        "writing": prompts + generation_work(new_tokens, plans),  # all prompts at once
    }


@dataclass(frozen=True)
class _Read:
    """Of one window under one plan, token by token."""

    nll: Tensor  # nats
    confidence: Tensor  # the probability of the first choice
    correct: Tensor  # whether it came


def text_checks(
    model: PreTrainedModel, plans: Sequence[Plan], windows: Sequence[Tensor]
) -> list[list[Check]]:
    """NLL by position, in octaves of tokens, and the expected calibration error of the
    next token.

    Where a plan skips in the prompt alone, the first half of each window is the prompt,
    and the rest is judged.

    Source of the latter: Guo et al. 2017, arXiv 1706.04599, equation 3, with 15 bins of
    equal width; its error by leaving out one window at a time, and its test Student's t
    with a degree of freedom less than windows.
    """
    by_prompt = any(plan.prefill for plan in plans)
    prompts = [window.shape[1] // 2 if by_prompt else 1 for window in windows]
    reads = [_reads(model, [Plan(), *plans], *each) for each in zip(windows, prompts)]
    if not reads:
        raise UsageError("the diagnostics needs text; give at least one window")
    dense, *others = zip(*reads)
    found: list[list[Check]] = []
    low, high, shortest = 0, 64, min(len(read.nll) for read in dense)
    while low < shortest:
        end = min(high, shortest)
        columns = [
            [float(read.nll[low:end].mean()) for read in some]
            for some in (dense, *others)
        ]
        behind = min(prompts) - 1  # positions that are not judged
        found.append(
            _checks(
                f"NLL at {behind + low} to {behind + end - 1}",
                columns,
                higher_is_better=False,
            )
        )
        low, high = high, 2 * high

    calibration = []
    for some in others:
        pairs = list(zip(some, dense))
        value = calibration_error(some), jackknife_error(calibration_error, some)
        delta = gained(pairs), jackknife_error(gained, pairs)
        tested = (
            student_p_value(*delta, len(pairs) - 1),
            too_few(len(pairs), len(pairs)),
        )
        calibration.append(_check("calibration error", value, delta, False, tested))
    return [*found, calibration]


def gained(pairs: Sequence[tuple[_Read, _Read]]) -> float:
    """The calibration error of the first of each pair less that of the second."""
    ours, theirs = zip(*pairs)
    return calibration_error(ours) - calibration_error(theirs)


def calibration_error(reads: Sequence[_Read]) -> float:
    """Mean distance of confidence and accuracy over bins of confidence, weighted by
    tokens: 0 is calibrated.
    """
    confidence = torch.cat([read.confidence for read in reads]).double()
    correct = torch.cat([read.correct for read in reads]).double()
    bins = (confidence * BINS).long().clamp_(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(
        0, bins, correct - confidence
    )
    return float(gaps.abs().sum() / len(confidence))


def _reads(
    model: PreTrainedModel, plans: Sequence[Plan], window: Tensor, prompt: int
) -> Iterable[_Read]:
    """Of the tokens behind the first `prompt` ones."""
    check_prompt(plans, window.shape[1], prompt)
    replay, scorer = Replay(model, plans), TokenScorer(model)
    targets = window[0, prompt:].cpu()
    found: dict[int, _Read] = {}
    with torch.inference_mode():
        for numbers, hidden in replay.hidden_states(
            record(replay.model, prompt, input_ids=window)
        ):
            scores = scorer.score(hidden[0, prompt - 1 : -1], targets, likeliest=True)
            read = _Read(
                scores.nll.cpu(),
                scores.confidence.cpu(),
                scores.likeliest.cpu() == targets,
            )
            found |= dict.fromkeys(numbers, read)
    return [found[number] for number in range(len(plans))]


def check_passkey(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plans: Sequence[Plan],
    contexts: Sequence[int],
    *,
    seed: int = 0,
) -> list[list[Check]]:
    """Whether greedy decoding repeats a number that stands far back in texts of about so many
    tokens: `KEYS` a length.
    """
    found: list[list[Check]] = []
    for context in contexts:
        draw = random.Random(f"{seed} {context}")
        requests = [
            _asked(tokenizer, episode("passkey", context, draw)) for _ in range(KEYS)
        ]
        greedy: dict[int, Tensor] = {}
        for scores in Scorer(model).score([Plan(), *plans], requests):
            greedy |= dict(zip(scores.requests, scores.greedy.T))
        columns = (
            torch.stack([greedy[number] for number in range(len(requests))])
            .T.double()
            .tolist()
        )
        found.append(
            _checks(
                f"passkey at {context}",
                columns,
                higher_is_better=True,
                right_or_wrong=True,
            )
        )
    return found


def _asked(tokenizer: PreTrainedTokenizerBase, asked: Episode) -> Request:
    before, both = (
        list(tokenizer(text)["input_ids"])
        for text in (asked.text, asked.text + asked.answer)
    )
    return Request(tuple(both[:-1]), tuple(both[len(before) :]))


def check_writing(
    model: PreTrainedModel,
    plans: Sequence[Plan],
    windows: Sequence[Tensor],
    new_tokens: int,
) -> list[list[Check]]:
    """Greedy continuations of the windows' beginnings: where they leave the original
    model's, repetition, length.

    Repetition is the share of 4-grams that were there before (Welleck et al. 2020,
    arXiv 1908.04319, seq-rep-4); a continuation that never leaves the original model's
    counts as leaving it behind its last token.
    """
    prompts, ends = (
        torch.cat([window[:, :BEGINNING] for window in windows]),
        ends_of(model),
    )
    texts = []
    for plan in (Plan(), *plans):
        with skip(model, plan):  # without the token that ends a text
            texts.append(
                [
                    row[:-1] if row[-1] in ends else row
                    for row in greedy(model, prompts, new_tokens)
                ]
            )
    leaving = [
        [float(common(text, dense)) for text, dense in zip(some, texts[0])]
        for some in texts
    ]
    return [
        _checks("tokens as dense", leaving, higher_is_better=True),
        _checks(
            "repetition",
            [[repetition(text) for text in some] for some in texts],
            higher_is_better=False,
        ),
        _checks(
            "length written",
            [[float(len(text)) for text in some] for some in texts],
            higher_is_better=None,
        ),
    ]


def repetition(text: Sequence[int]) -> float:
    """The share of runs of NGRAM tokens that came before in a text, 0 to 1."""
    grams = [
        tuple(text[start : start + NGRAM]) for start in range(len(text) - NGRAM + 1)
    ]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _checks(
    name: str,
    columns: Sequence[Sequence[float]],
    *,
    higher_is_better: bool | None,
    right_or_wrong: bool = False,
) -> list[Check]:
    """From one column of values a plan, the dense one first."""
    dense, *rest = columns
    items = len(dense)
    few = too_few(
        round(sum(dense)) if right_or_wrong else items, items
    )  # what is wrong already gets no worse
    found = []
    for values in rest:
        differences = [ours - theirs for ours, theirs in zip(values, dense)]
        tested = sign_flip_p_value(differences), few
        kept = (
            Recovery.of(recovery_interval(values, dense), items)
            if higher_is_better
            else None
        )
        delta = mean_and_error(differences)
        found.append(
            _check(name, mean_and_error(values), delta, higher_is_better, tested, kept)
        )
    return found


def _check(
    name: str,
    value: Known,
    delta: Known,
    better: bool | None,
    tested: tuple[float, int | None],
    kept: Recovery | None = None,
) -> Check:
    """`value`, and `delta`, what it has more than the original model's; `tested`: the p
    value, and `too_few`.
    """
    return Check(
        check=name,
        value=value[0],
        value_se=value[1],
        delta=delta[0],
        delta_se=delta[1],
        p_value=tested[0],
        too_few=tested[1],
        higher_is_better=better,
        recovery=kept,
    )
