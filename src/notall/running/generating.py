"""Continue a prompt with the skipped model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..plan import Plan
from .skipping import skip


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
    """The continuation of `prompt`; greedy at temperature 0. `streamer` is transformers' own. Raises as `skip` does."""
    if chat:
        message = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    encoded = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat).to(model.device)
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}  # some tokenizers give more
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    torch.manual_seed(seed)
    skipping = skip(model, plan) if plan else nullcontext()  # without a plan any model runs, an export too
    with skipping, torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, **sampling)
    new = tokens[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True))


def continue_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    prompts: Sequence[str],
    new_tokens: int,
) -> list[str]:
    """What the skipped model says after each of `prompts`, greedy, all at once. Raises as `skip` does."""
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    width = max(map(len, encoded))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in encoded], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded], device=model.device)
    ends = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    padding = next(token for token in ends if token is not None)
    with skip(model, plan), torch.inference_mode():
        tokens = model.generate(
            ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=padding
        )
    return [str(tokenizer.decode(row[width:], skip_special_tokens=True)) for row in tokens]
