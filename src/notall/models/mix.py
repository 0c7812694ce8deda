"""Text that resembles what a model is used for: its own answers, episodes of retrieval,
and text that it goes on with.

Source of text that the model writes itself: Williams et al. 2024, arXiv 2410.17170.
"""

import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..cache import cache_folder, write_cached
from ..digests import digest_of
from ..files import contents
from ..integrity import sealed, unsealed
from ..plan import Plan
from ..progress import Progress, Stages, silent
from ..running.generating import (
    as_asked,
    generation_settings,
    greedy_each,
    prompt_tokens,
    reporting,
    sample,
)
from ..running.skipping import skip
from ..structure.model_structure import positions_of
from .names import USAGE_MIX
from .prompts import openings, prompts
from .retrieval import FITTED, episode
from .texts import ANSWERS_TO, MIX, Text, is_made, read_prompts, read_text

ANSWERS, NEW_TOKENS, LONGER, AT_ONCE = (
    160,
    128,
    320,
    32,
)  # prompts, most tokens of answers, to own prompts, at a time
COMPLETIONS, FIRST, BEHIND = (
    96,
    2,
    256,
)  # texts, the tokens of an opening that each has, tokens that the model adds
FEW = (
    2 * AT_ONCE * NEW_TOKENS
)  # tokens: as a rule the first part of each text makes more together
MIX_EPISODES = 160
SHORTEST, LONGEST = (
    96,
    448,
)  # tokens of an episode, about: windows that are read have 512
SENTENCE_BREAK = re.compile(r"(?<=[.!?])\s+")  # what is between two


def text_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    progress: Progress = silent,
    tokens: float = math.inf,
) -> Text:
    """As `read_text`, or what the model made: a part of `mix`, `mix`, which holds as
    much of each, or `answers:FILE`.

    What it wrote is kept in the cache, and written once by the same weights; the first
    of it alone, where that has as many `tokens` as are needed. Raises `UsageError` as
    `read_text` does, and where the cache can't be written.
    """
    if not is_made(source):
        return read_text(source)
    content = (
        _Author(model, tokenizer, progress, 1).text(source) if tokens <= FEW else ""
    )
    if (
        len(tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"])
        < tokens
    ):
        content = _Author(model, tokenizer, progress).text(source)
    return Text(text_name(source), digest_of([content]), content)


def text_name(source: str) -> str:
    """What a text that a model made is called: as it is asked for, but for the folders
    of a file.
    """
    return re.sub(r":.*[/\\]", ":", source)


def kept_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str
) -> Iterator[Text]:
    """Of what the model made under a name, the beginning, which may be all that was
    read, and the whole, if kept.
    """
    for parts in (1, None):
        with suppress(_NotKept):
            content = _Author(model, tokenizer, silent, parts, writes=False).text(
                source
            )
            yield Text(text_name(source), digest_of([content]), content)


class _NotKept(Exception):
    """A part of a text is not in the cache."""


@dataclass(frozen=True)
class _Author:
    """Writes what the original model says: the first `parts` of each text, or all; or
    only reads what it wrote.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    progress: Progress
    parts: int | None = None
    writes: bool = True

    def text(self, source: str) -> str:
        if source == "answers":
            return self.answers(prompts(ANSWERS), NEW_TOKENS)
        if source.startswith(ANSWERS_TO):
            return self.answers(
                read_prompts(Path(source.removeprefix(ANSWERS_TO)))[::2], LONGER
            )
        if source != USAGE_MIX:
            return (
                self.completions()
                if source == "completions"
                else episodes(self.completions())
            )
        made = [self.text(part) for part in MIX]
        return "\n\n".join(part[: min(map(len, made))] for part in made)

    def answers(self, given: list[str], new: int) -> str:
        """Greedy, behind their prompts, in the model's chat template where it has one;
        up to `new` tokens each.
        """
        asked = [as_asked(self.tokenizer, prompt) for prompt in given]
        is_plain = not self.tokenizer.chat_template

        def write(_: int, some: list[str], progress: Progress) -> str:
            rows = [
                prompt_tokens(self.tokenizer, prompt, add_special_tokens=is_plain)
                for prompt in some
            ]
            with skip(self.model, Plan()):
                answers = greedy_each(
                    self.model,
                    rows,
                    new,
                    **reporting(progress, "answering prompts", new),
                )
            return "\n".join(
                prompt + str(self.tokenizer.decode(answer))
                for prompt, answer in zip(some, answers)
            )

        return "\n".join(self._written("answers", asked, new, write))

    def completions(self) -> str:
        """What the model goes on with from the first words of a text, drawn from its
        distributions.
        """
        rows = [
            prompt_tokens(self.tokenizer, one, add_special_tokens=False)
            for one in openings(COMPLETIONS)
        ]
        new = int(min(BEHIND, positions_of(self.model) - FIRST))

        def write(number: int, begun: list[list[int]], progress: Progress) -> str:
            with skip(self.model, Plan()):
                telling = reporting(progress, "writing text", new)
                drawn = sample(
                    self.model, torch.tensor(begun), new, seed=number, **telling
                )
            return "\n\n".join(
                str(self.tokenizer.decode(row)) for row in drawn.tolist()
            )

        begun = [
            (row * FIRST)[:FIRST] for row in rows
        ]  # as many of each: they run together
        return "\n\n".join(self._written("completions", begun, new, write))

    def _written(
        self,
        kind: str,
        given: list[str] | list[list[int]],
        new: int,
        write: Callable[..., str],
    ) -> list[str]:
        """What is written behind some of what is `given` at a time, from the cache, or
        else now.
        """
        some = [
            given[start : start + AT_ONCE] for start in range(0, len(given), AT_ONCE)
        ][: self.parts]
        by, folder = origin(self.model, self.tokenizer), cache_folder("answers")
        paths = [
            folder / f"{digest_of([by, kind, str(part), str(new)])[:24]}.json"
            for part in enumerate(some)
        ]
        kept = [
            unsealed(contents(path)) if path.is_file() else None for path in paths
        ]  # None, too, of damage
        known = {
            number: str(json.loads(table)["text"])
            for number, table in enumerate(kept)
            if table
        }
        if len(known) < len(some) and not self.writes:
            raise _NotKept
        stages = Stages(self.progress, len(some) - len(known))
        for number in (number for number in range(len(some)) if number not in known):
            content = (
                write(number, some[number], stages.stage(1))
                .replace("\r\n", "\n")
                .replace("\r", "\n")
            )
            known[number] = content.encode(errors="replace").decode()
            write_cached(
                paths[number], sealed(json.dumps({"text": known[number]}).encode())
            )
        return [known[number] for number in range(len(some))]


def episodes(hay: str) -> str:
    """Episodes of the forms that are fitted to, of many lengths, amid the
    sentences of a text.
    """
    draw, sentences = (
        random.Random(0),
        [one for one in SENTENCE_BREAK.split(hay) if one.strip()] or [hay],
    )
    made = []
    for number in range(MIX_EPISODES):
        some = itertools.islice(
            itertools.cycle(sentences), draw.randrange(len(sentences)), None
        )
        made.append(
            episode(
                FITTED[number % len(FITTED)],
                draw.randint(SHORTEST, LONGEST),
                draw,
                some,
            )
        )
    return "\n\n".join(one.text + one.answer for one in made)


def origin(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of what an answer depends on, but for request and plan.

    Config, settings of generation, weights (a sample of each), and tokenizer.
    """
    digest = hashlib.sha256()
    config = {
        k: v
        for k, v in model.config.to_dict().items()
        if k not in ("_name_or_path", "transformers_version")
    }
    for settings in (config, generation_settings(model)):
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, weight in model.named_parameters():
        if type(weight.data) is Tensor and weight.device.type != "meta":
            flat = weight.detach().flatten()
            sample = flat[:: max(1, len(flat) // 16)].float().cpu().numpy()
            digest.update(f"{name} {weight.dtype}".encode() + sample.tobytes())
    known = [
        *sorted(tokenizer.get_vocab().items()),
        tokenizer.encode("A probe, of 1 line.\n"),
    ]
    digest.update(json.dumps(known).encode())
    return digest.hexdigest()
