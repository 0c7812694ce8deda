"""Continue a prompt with the skipped model."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    TextStreamer,
)

from ..errors import UsageError, expect, raised_by, shortened
from ..plan import Plan, several
from ..progress import Progress
from ..structure.locating import has_missing
from ..structure.model_structure import base_model, inputs_device, positions_of
from ..structure.undoing import Undo
from .skipping import skip

# What transformers cannot do with the model's own settings is a `UsageError`.
_settings_explained = partial(
    raised_by,
    "transformers",
    "cannot generate",
    "check the model's generation_config.json",
)


class Streamer(TextStreamer):
    """Hands the text on as it comes, some words at a time."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, take: Callable[[str], None]
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.take = take

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand `text` on."""
        self.take(text)


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    chat: bool = False,
    seed: int = 0,
    streamer: Any = None,
) -> str:
    """The continuation of `prompt`; greedy at temperature 0. `streamer` is
    transformers' own.

    Raises `UsageError` for a prompt without tokens, counts and temperatures that make
    no text, more tokens than the model has positions, a plan that does not fit, and
    `chat` where the tokenizer has no chat template.
    """
    expect(
        plan, Plan, "a plan, such as notall.Plan(attention=[3]), behind the tokenizer"
    )
    expect(prompt, str, "the prompt, a string, behind the plan")
    if not (temperature == 0 or 0.001 <= temperature < math.inf):
        raise UsageError(f"temperature is {temperature}: give 0, or from 0.001")
    if chat:
        prompt = in_chat_template(tokenizer, prompt)
    ids = torch.tensor([prompt_tokens(tokenizer, prompt, add_special_tokens=not chat)])
    check_positions(model, ids.shape[1], max_new_tokens)
    # without a plan any model runs
    skipping = skip(model, plan) if plan or has_missing(model) else nullcontext()
    with skipping, _settings_explained():
        if temperature == 0:
            (new,) = greedy(model, ids, max_new_tokens, streamer=streamer)
        else:  # as the checkpoint's own settings say, but for the temperature and beams
            how = {
                "do_sample": True,
                "temperature": temperature,
                "num_beams": 1,
                "max_new_tokens": max_new_tokens,
            }
            with seeded(seed):
                rows = _generate(model, ids, None, streamer=streamer, **how)
            new = rows[0, ids.shape[1] :].tolist()
    return str(tokenizer.decode(new, skip_special_tokens=True))


def continue_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    prompts: Sequence[str],
    new_tokens: int,
) -> list[str]:
    """What the skipped model says after each of `prompts`, greedy, all at once. Raises
    as `skip` does.
    """
    encoded = [prompt_tokens(tokenizer, prompt) for prompt in prompts]
    with skip(model, plan), _settings_explained():
        rows = greedy_each(model, encoded, new_tokens)
    return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in rows]


def reporting(progress: Progress, doing: str, new: int) -> dict[str, Any]:
    """An option of `greedy_each` and `sample`, which reports at each step how many of
    the new tokens there are.
    """
    steps = count(1)

    def look(ids: Tensor, *_: object, **__: object) -> Tensor:
        progress(next(steps), new, doing)
        return ids.new_zeros(len(ids), dtype=torch.bool)

    return {"stopping_criteria": StoppingCriteriaList([look])}


def greedy_each(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], new: int, **options: Any
) -> list[list[int]]:
    """As `greedy`, behind token ids of any lengths, all at once."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(row)) + [*row] for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    return greedy(model, ids, new, mask=mask, **options)


def greedy(
    model: PreTrainedModel,
    ids: Tensor,
    new_tokens: int,
    *,
    mask: Tensor | None = None,
    **options: Any,
) -> list[list[int]]:
    """The `new_tokens` likeliest tokens behind each row of `ids`, (rows, tokens), up to
    the one that ends it.

    `mask` is 0 where rows are padded, on the left; `options` are more of `generate`,
    such as a streamer.
    """
    with greedily(model):
        rows = _generate(model, ids, mask, max_new_tokens=new_tokens, **options)
    new = rows[:, ids.shape[1] :]  # (rows, new tokens)
    return [up_to_end(model, row) for row in new.tolist()]


@contextmanager
def greedily(model: PreTrainedModel) -> Iterator[None]:
    """For the time of the `with`, `model` generates the likeliest token each time.

    Of the checkpoint's own settings, which may penalise repetition, sample or search
    with beams, the tokens that end a text stay. All that notall generates goes this
    way, but for texts that are drawn (`sample`, `generate_text` at a temperature) and
    tasks of lm-evaluation-harness, which take the checkpoint's.
    """
    ends = ends_of(model)
    settings = GenerationConfig(do_sample=False, num_beams=1, repetition_penalty=1.0)
    settings.eos_token_id, settings.pad_token_id = ends or None, next(iter(ends), 0)
    with Undo() as undo, _generating_by(settings, model, undo):
        yield


def generation_settings(model: PreTrainedModel) -> dict[str, Any]:
    """The checkpoint's own settings of generation, as JSON has them: what else decides
    an answer than weights.
    """
    known = model.generation_config.to_diff_dict() if model.can_generate() else {}
    return {
        name: value
        for name, value in sorted(known.items())
        if name != "transformers_version"
    }


def up_to_end(model: PreTrainedModel, row: list[int]) -> list[int]:
    """The tokens of a text up to the one that ends it, if one does."""
    ends = ends_of(model)
    for place, token in enumerate(row):
        if token in ends:
            return row[: place + 1]
    return row


def sample(
    model: PreTrainedModel,
    prompts: Tensor,
    new_tokens: int,
    *,
    seed: int = 0,
    **options: Any,
) -> Tensor:
    """`prompts`, (rows, tokens), and `new_tokens` behind each, drawn from the model's
    distributions, past any end.
    """
    check_positions(model, prompts.shape[1], new_tokens)
    whole = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        max_new_tokens=new_tokens,
        pad_token_id=0,
    )
    with (
        seeded(seed),
        Undo() as undo,
        _generating_by(whole, model, undo),
        _settings_explained(),
    ):
        return _generate(model, prompts, **options)


def check_positions(model: PreTrainedModel, prompt: int, new: int) -> None:
    """Raise `UsageError` unless a prompt of so many tokens and so many new ones fit the
    model.
    """
    if new < 1:
        raise UsageError(f"{shortened(new)} new tokens make no text: give 1 or more")
    if prompt + new > (limit := positions_of(model)):
        asked = f"{several(prompt, 'prompt token')} and {shortened(new)} to generate"
        raise UsageError(
            f"{asked} exceed the model's {limit} positions; lower them to {limit}"
            " together"
        )


def ends_of(model: PreTrainedModel) -> list[int]:
    """The tokens that end a text, as the checkpoint's own settings say."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        return []
    return list(ends) if isinstance(ends, list | tuple) else [ends]


def _generate(
    model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, **options: Any
) -> Tensor:
    """What `generate` makes of `ids`, (rows, tokens): (rows, tokens and new ones), padded
    where rows end.
    """
    mask = torch.ones_like(ids) if mask is None else mask
    here = inputs_device(model)
    generating: Any = model
    rows: Tensor = generating.generate(
        ids.to(here), attention_mask=mask.to(here), **options
    )
    return rows


def _generating_by(
    settings: GenerationConfig, model: PreTrainedModel, undo: Undo
) -> Undo:
    """Have `model` generate by `settings` alone, until `undo` is left, and not by those
    of its checkpoint.
    """
    for one in {model, base_model(model)}:
        undo.put(one.__dict__, "generation_config", settings)
    return undo


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from `seed` on, for the time of the `with`; then those that would
    have come.
    """
    # a seed is every device's; where CUDA was not used yet, there is nothing to go on
    # with
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: str, *, add_special_tokens: bool = True
) -> list[int]:
    """The token ids of a prompt, with BOS where the tokenizer puts it. Raises
    UsageError where there are none.
    """
    try:
        prompt.encode()
    except (
        UnicodeEncodeError
    ):  # half a surrogate pair, or bytes of another encoding on the command line
        raise UsageError(
            f"the prompt {shortened(repr(prompt))} is not UTF-8: give one that is"
        ) from None
    ids = list(
        tokenizer(prompt, add_special_tokens=add_special_tokens, verbose=False)[
            "input_ids"
        ]
    )
    if not ids:
        raise UsageError(
            f"the prompt {shortened(repr(prompt))} has no tokens: give a word to begin"
            " with"
        )
    return ids


def as_asked(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The prompt as what a user says: in the model's chat template, or where it has
    none before an empty line.
    """
    return (
        in_chat_template(tokenizer, prompt)
        if tokenizer.chat_template
        else f"{prompt}\n\n"
    )


def in_chat_template(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The prompt as what a user says, up to where the model answers. Raises
    `UsageError` where no template says it.
    """
    if not tokenizer.chat_template:
        raise UsageError("this model has no chat template: leave chat out")
    message = [{"role": "user", "content": prompt}]
    try:
        return str(
            tokenizer.apply_chat_template(
                message, tokenize=False, add_generation_prompt=True
            )
        )
    # a template is a program that comes with the model, and may raise anything
    except Exception as error:
        reason = shortened(str(error) or type(error).__name__)
        raise UsageError(
            f"the model's chat template fails ({reason}): leave chat out, or mend the"
            " template"
        ) from error
