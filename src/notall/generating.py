"""Continue a prompt with the skipped model."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .plan import Plan
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
    with skip(model, plan), torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, **sampling)
    new = tokens[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True))
