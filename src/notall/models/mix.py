"""Text that resembles what a model is used for: its own answers, episodes of retrieval, and prose, in equal parts.

Source of text that the model writes itself: Williams et al. 2024, arXiv 2410.17170.
"""

from __future__ import annotations

import hashlib
import json
import random

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..digests import digest_of
from ..files import cache_folder, keep
from ..plan import Plan
from ..progress import Progress, silent, tracked
from ..running.generating import as_asked, greedy_each, prompt_tokens
from ..running.skipping import skip
from .names import USE
from .prompts import prompts
from .retrieval import FITTED, episode
from .texts import MIX, Text, read_text

ANSWERS, NEW_TOKENS, AT_ONCE = 160, 128, 32  # prompts, the most tokens of an answer, prompts that run together
EPISODES = 160
SHORTEST, LONGEST = 96, 448  # tokens of an episode, about: windows that are read have 512


def text_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str, progress: Progress = silent
) -> Text:
    """As `read_text`, or what the model made: `answers`, `episodes`, or `mix`, which holds as much prose, too.

    What it wrote is kept in the cache, and not written again by the same weights. Raises `UsageError` as `read_text`
    does, and where the cache can't be written.
    """
    if source == "answers":
        content = own_answers(model, tokenizer, progress)
    elif source == "episodes":
        content = episodes()
    elif source == USE:
        parts = [text_of(model, tokenizer, part, progress).content for part in MIX]
        content = "\n\n".join(part[: min(map(len, parts))] for part in parts)
    else:
        return read_text(source)
    return Text(source, digest_of([content]), content)


def own_answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: Progress = silent) -> str:
    """The dense model's greedy answers behind their prompts, in its chat template where it has one."""
    asked = [as_asked(tokenizer, prompt) for prompt in prompts(ANSWERS)]
    name = digest_of([origin(model, tokenizer), *asked, str(NEW_TOKENS)])[:24]
    path = cache_folder() / "answers" / f"{name}.txt"
    if not path.is_file():
        parts = [asked[start : start + AT_ONCE] for start in range(0, len(asked), AT_ONCE)]
        said = [one for some in tracked(parts, "answering prompts", progress) for one in _said(model, tokenizer, some)]
        path.parent.mkdir(exist_ok=True)
        content = "\n".join(said).replace("\r\n", "\n").replace("\r", "\n")  # as a file of text is read
        keep(path, content)
        return content
    return path.read_text(encoding="utf-8")


def _said(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: list[str]) -> list[str]:
    rows = [prompt_tokens(tokenizer, prompt, add_special_tokens=not tokenizer.chat_template) for prompt in asked]
    with skip(model, Plan()):
        answers = greedy_each(model, rows, NEW_TOKENS)
    return [prompt + str(tokenizer.decode(answer)) for prompt, answer in zip(asked, answers)]


def episodes() -> str:
    """Episodes of the forms that are fitted to, of many lengths."""
    draw = random.Random(0)
    made = [episode(FITTED[n % len(FITTED)], draw.randint(SHORTEST, LONGEST), draw) for n in range(EPISODES)]
    return "\n\n".join(one.text + one.answer for one in made)


def origin(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of what an answer depends on beside request and plan: config, weights (a sample of each), tokenizer."""
    digest = hashlib.sha256()
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in model.named_parameters():
        if type(weight.data) is Tensor and weight.device.type != "meta":
            flat = weight.detach().flatten()
            sample = flat[:: max(1, len(flat) // 16)].float().cpu().numpy()
            digest.update(f"{name} {weight.dtype}".encode() + sample.tobytes())
    known = [*sorted(tokenizer.get_vocab().items()), tokenizer.encode("A probe, of 1 line.\n")]
    digest.update(json.dumps(known).encode())
    return digest.hexdigest()
