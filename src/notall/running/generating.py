"""Continue a prompt with the skipped model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from ..errors import UsageError, expect, raised_by, shortened
from ..models.chat_template import in_chat_template
from ..models.texts import prompt_tokens
from ..records.plan import Plan
from ..structure.anatomy import positions_of
from ..structure.locating import lacks
from .skipping import skip


class Streamer(TextStreamer):
    """Hands the text on as it comes, some words at a time."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, take: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.take = take

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
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
    """The continuation of `prompt`; greedy at temperature 0. `streamer` is transformers' own.

    Raises `UsageError` for a prompt without tokens, counts and temperatures that make no text, more tokens than the
    model has positions, a plan that does not fit, and `chat` where the tokenizer has no chat template.
    """
    expect(plan, Plan, "a plan, such as notall.Plan(attention=[3]), behind the tokenizer")
    expect(prompt, str, "the prompt, a string, behind the plan")
    if not (temperature == 0 or 0.001 <= temperature < math.inf):
        raise UsageError(f"temperature is {temperature}: give 0, or from 0.001")
    if chat:
        prompt = in_chat_template(tokenizer, prompt)
    ids = torch.tensor([prompt_tokens(tokenizer, prompt, add_special_tokens=not chat)], device=model.device)
    check_positions(model, ids.shape[1], max_new_tokens)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    torch.manual_seed(seed)
    skipping = skip(model, plan) if plan or lacks(model) else nullcontext()  # without a plan any model runs
    with skipping, torch.inference_mode():
        tokens = _generate(
            model,
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            num_beams=1,  # whatever the model's own generation_config.json says
            streamer=streamer,
            **sampling,
        )
    new = tokens[0, ids.shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True))


def _generate(model: PreTrainedModel, ids: Tensor, **options: Any) -> Tensor:
    """Raises `UsageError` for what transformers cannot do with the model's own generation_config.json."""
    with raised_by("transformers", "cannot generate", "check the model's generation_config.json"):
        return model.generate(ids, **options)


def check_positions(model: PreTrainedModel, prompt: int, new: int) -> None:
    """Raise `UsageError` unless a prompt of so many tokens and so many new ones fit the model."""
    if new < 1:
        raise UsageError(f"{shortened(new)} new tokens make no text: give 1 or more")
    if prompt + new > (limit := positions_of(model)):
        raise UsageError(
            f"{prompt} prompt tokens and {shortened(new)} new ones exceed the model's {limit} positions; "
            f"lower them to {limit} together"
        )


def sample(model: PreTrainedModel, prompts: Tensor, new_tokens: int, *, seed: int = 0) -> Tensor:
    """`prompts`, (rows, tokens), and as many tokens behind each as asked for, drawn from the model's distributions.

    Where a text ends another one begins. Raises `UsageError` as `check_positions` does.
    """
    check_positions(model, prompts.shape[1], new_tokens)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode():
        torch.manual_seed(seed)
        return _generate(
            model,
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new_tokens,
            num_beams=1,
            do_sample=True,
            temperature=1.0,  # and nothing cut off, whatever the model's own generation_config.json says
            top_k=0,
            top_p=1.0,
            min_p=0.0,
            typical_p=1.0,
            repetition_penalty=1.0,
            eos_token_id=-1,  # none that is ever drawn
            pad_token_id=0,
        ).clone()


def continue_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    prompts: Sequence[str],
    new_tokens: int,
) -> list[str]:
    """What the skipped model says after each of `prompts`, greedy, all at once. Raises as `skip` does."""
    encoded = [prompt_tokens(tokenizer, prompt) for prompt in prompts]
    width = max(map(len, encoded))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in encoded], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded], device=model.device)
    ends = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    padding = next(token for token in ends if token is not None)
    with skip(model, plan), torch.inference_mode():
        tokens = _generate(
            model, ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=padding
        )
    return [str(tokenizer.decode(row[width:], skip_special_tokens=True)) for row in tokens]
