"""Text that resembles what a model is used for: its own answers, episodes of retrieval, and text that it goes on with.

Source of text that the model writes itself: Williams et al. 2024, arXiv 2410.17170.
"""

import hashlib
import itertools
import json
import random
import re
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..digests import digest_of
from ..files import cache_folder, contents, keep
from ..integrity import sealed, unsealed
from ..plan import Plan
from ..progress import Progress, silent, tracked
from ..running.generating import as_asked, greedy_each, prompt_tokens, sample
from ..running.skipping import skip
from ..structure.model_structure import positions_of
from .names import USE
from .prompts import openings, prompts
from .retrieval import FITTED, episode
from .texts import MIX, Text, read_text

T = TypeVar("T")
ANSWERS, NEW_TOKENS, AT_ONCE = 160, 128, 32  # prompts, the most tokens of an answer, prompts that run together
COMPLETIONS, FIRST, BEHIND = 96, 2, 256  # texts, the tokens of an opening that each has, tokens that the model adds
EPISODES = 160
SHORTEST, LONGEST = 96, 448  # tokens of an episode, about: windows that are read have 512
SENTENCE = re.compile(r"(?<=[.!?])\s+")  # what is between two


def text_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str, progress: Progress = silent
) -> Text:
    """As `read_text`, or what the model made: a part of `mix`, or `mix`, which holds as much of each.

    What it wrote is kept in the cache, and not written again by the same weights. Raises `UsageError` as `read_text`
    does, and where the cache can't be written.
    """
    if source == "answers":
        content = own_answers(model, tokenizer, progress)
    elif source == "completions":
        content = completions(model, tokenizer, progress)
    elif source == "episodes":
        content = episodes(completions(model, tokenizer, progress))
    elif source == USE:
        parts = [text_of(model, tokenizer, part, progress).content for part in MIX]
        content = "\n\n".join(part[: min(map(len, parts))] for part in parts)
    else:
        return read_text(source)
    return Text(source, digest_of([content]), content)


def own_answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: Progress = silent) -> str:
    """The original model's greedy answers behind their prompts, in its chat template where it has one."""
    asked = [as_asked(tokenizer, prompt) for prompt in prompts(ANSWERS)]

    def write() -> list[str]:
        parts = tracked(_at_once(asked), "answering prompts", progress)
        return [one for some in parts for one in _said(model, tokenizer, some)]

    return _written([origin(model, tokenizer), *asked, str(NEW_TOKENS)], "\n", write)


def completions(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: Progress = silent) -> str:
    """What the original model goes on with from the first words of a text, drawn from its distributions."""
    rows = [prompt_tokens(tokenizer, one, add_special_tokens=False) for one in openings(COMPLETIONS)]
    begun = [(row * FIRST)[:FIRST] for row in rows]  # as many of each: they run together

    def write() -> list[str]:
        parts = enumerate(tracked(_at_once(begun), "writing text", progress))
        with skip(model, Plan()):
            drawn = [sample(model, torch.tensor(some, device=model.device), new, seed=seed) for seed, some in parts]
        return [str(tokenizer.decode(row)) for some in drawn for row in some.tolist()]

    new = int(min(BEHIND, positions_of(model) - FIRST))
    return _written([origin(model, tokenizer), str(begun), str(new)], "\n\n", write)


def _at_once(parts: list[T]) -> list[list[T]]:
    return [parts[start : start + AT_ONCE] for start in range(0, len(parts), AT_ONCE)]


def _written(of: list[str], between: str, write: Callable[[], list[str]]) -> str:
    """What was written `of` this, from the cache, or else now."""
    path = cache_folder() / "answers" / f"{digest_of(of)[:24]}.json"
    if path.is_file() and (table := unsealed(contents(path))):  # else damaged
        return str(json.loads(table)["text"])
    content = between.join(write()).replace("\r\n", "\n").replace("\r", "\n")  # as a file of text is read
    content = content.encode(errors="replace").decode()
    path.parent.mkdir(exist_ok=True)
    keep(path, sealed(json.dumps({"text": content}).encode()))
    return content


def _said(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: list[str]) -> list[str]:
    rows = [prompt_tokens(tokenizer, prompt, add_special_tokens=not tokenizer.chat_template) for prompt in asked]
    with skip(model, Plan()):
        answers = greedy_each(model, rows, NEW_TOKENS)
    return [prompt + str(tokenizer.decode(answer)) for prompt, answer in zip(asked, answers)]


def episodes(hay: str) -> str:
    """Episodes of the forms that are fitted to, of many lengths, told amid the sentences of a text."""
    draw, sentences = random.Random(0), [one for one in SENTENCE.split(hay) if one.strip()] or [hay]
    made = []
    for number in range(EPISODES):
        some = itertools.islice(itertools.cycle(sentences), draw.randrange(len(sentences)), None)
        made.append(episode(FITTED[number % len(FITTED)], draw.randint(SHORTEST, LONGEST), draw, some))
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
