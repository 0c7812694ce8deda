"""What the model and the machine are, and about how long all of it takes here."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ...engines import ENGINES, engine_named
from ...models.names import USAGE_MIX
from ...options import Workload
from ...plan import Phase, Plan
from ...progress import Progress, generation_work, reading
from ...repairing.fit_texts import LENGTH, SEQUENCES
from ...results.provenance import place_of
from ...results.table import in_bytes
from ..search.options import SpaceOptions
from ..search.run import Search

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..options.tasks import TaskChoice

logger = logging.getLogger(__name__)
# a refit reads its text about so often: for two streams, and for sums of products
PASSES = 4
# a search passes over its text about so often for a set of each phase
SEARCHING = 100
TIMED = 512  # tokens of the prompt by whose time that of the rest is estimated


def announce(
    search: Search, workload: Workload, tasks: TaskChoice, progress: Progress
) -> None:
    """Log what the model and the machine are, and about how long a search takes here,
    with the tasks, the repairs and the times that follow.
    """
    from ...measuring.speed import devices_of, machine
    from ...models.loading import dtype_name
    from ...running.skipping import footprint

    net, tokenizer = search.model.load()
    whole = footprint(net, Plan())
    logger.info(
        "%s: %s parameters, %s in %s; on %s; engines here: %s",
        search.model.model,
        f"{whole.params:,}",
        in_bytes(whole.weight_bytes),
        dtype_name(net),
        place_of(machine(*devices_of(net)), versions=False),
        ", ".join(engines_here()),
    )
    progress(0, 1, "timing a prompt, to say how long all of it takes")
    minute = 60 / _seconds_per_token(net)  # in tokens
    rest = (workload.steps + search_steps(search, net, tokenizer, tasks)) / minute
    looking = (
        SEARCHING
        * len(spaces_of(search.space))
        * reading(search.text.sequences * search.text.length)
    )
    looking = min(looking / minute, search.by.max_minutes or math.inf)
    logger.info(
        "about %.0f to %.0f minutes here: %.0f to %.0f to look for sets, the others to"
        " ask the model, repair, time and export",
        max(1, (looking + rest) / 2),
        max(2, 2 * (looking + rest)),
        looking / 2,
        2 * looking,
    )


def engines_here() -> list[str]:
    """The engines whose packages are installed."""
    return [name for name in ENGINES if find_spec(engine_named(name).package)]


def search_steps(
    search: Search,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: TaskChoice,
) -> float:
    """What a search takes apart from looking for sets, about, in tokens that are read:
    writing the mix, trying sets on tasks, and judging and repairing the chosen ones.
    """
    from ...models.mix import ANSWERS, BEHIND, COMPLETIONS, NEW_TOKENS, kept_texts

    steps = 0.0
    repair = search.repair
    texts = {search.text.text, *(repair.sources if repair else ())}
    if USAGE_MIX in texts and not any(kept_texts(model, tokenizer, USAGE_MIX)):
        steps += generation_work(ANSWERS * NEW_TOKENS + COMPLETIONS * BEHIND)
    windows = repair.repair_sequences or SEQUENCES
    repairing = PASSES * reading(windows * LENGTH) if repair else 0.0
    trying = repairing + sum(job.steps(1) for job in tasks.choosing())
    judging = repairing + sum(job.steps(2) for job in tasks.jobs())
    for space in spaces_of(search.space):
        looks = math.ceil(math.log2(1 + len(space.of(model).units)))
        steps += looks * trying + judging
    return steps


def spaces_of(space: SpaceOptions) -> list[SpaceOptions]:
    """What is chosen among, of each phase."""
    phases: list[Phase] = [space.phase] if space.phase else ["all", "prefill"]
    return [replace(space, phase=phase) for phase in phases]


def _seconds_per_token(model: PreTrainedModel) -> float:
    """Of a prompt, by a pass behind one to warm up."""
    import torch

    from ...measuring.speed import time_once
    from ...structure.model_structure import inputs_device, positions_of

    length = int(min(TIMED, positions_of(model) - 1))
    prompt = torch.zeros(1, length, dtype=torch.long, device=inputs_device(model))
    *_, (ms, _) = [time_once(model, prompt, 1) for _ in range(2)]
    return ms / 1000 / length
