"""Which tokens of one forward of vLLM skip, and an attention's metadata without them."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass
class RowsOfStep:
    """Which tokens of the forward that runs skip, and which are whole: their rows in
    the batch.
    """

    last_tokens: int
    # those that are skipped, by vLLM's names
    attentions: list[str] = field(default_factory=list)
    # whole tokens of each request, (requests,); None: all are whole
    counts: NDArray[np.int64] | None = None
    early: Tensor | None = None  # the rows that skip, (early,)
    whole: Tensor | None = None  # the others, in order, (whole,)
    # places of the early tokens in the cache, (early,), by attention
    slots: dict[str, Tensor] = field(default_factory=dict)

    def enter(
        self, computed: NDArray[Any], scheduled: NDArray[Any], prompts: NDArray[Any]
    ) -> None:
        """A forward begins, of requests with so many tokens in the cache, to run, and
        of a prompt.
        """
        self.leave()
        skipping = np.clip(prompts - self.last_tokens - computed, 0, scheduled)
        if not skipping.any():
            return
        starts = np.cumsum(scheduled) - scheduled  # (requests,)
        # the place of each token among its request's, (tokens,)
        places = np.arange(scheduled.sum()) - np.repeat(starts, scheduled)
        skips = torch.from_numpy(places < np.repeat(skipping, scheduled))
        self.counts = scheduled - skipping
        self.early, self.whole = skips.nonzero()[:, 0], (~skips).nonzero()[:, 0]

    def leave(self) -> None:
        """All tokens of a forward run whole, until one is entered."""
        self.counts = self.early = self.whole = None
        self.slots = {}

    @property
    def splits(self) -> bool:
        """Whether the forward that runs has tokens that skip."""
        return self.counts is not None

    def part(self, context: Any, device: torch.device) -> None:
        """Have a forward's context tell the skipped attentions the whole tokens' places
        in the cache alone.
        """
        assert self.early is not None
        assert self.whole is not None
        self.early, self.whole = self.early.to(device), self.whole.to(device)
        self.slots = {
            name: context.slot_mapping[name][self.early] for name in self.attentions
        }
        own = {name: context.slot_mapping[name][self.whole] for name in self.attentions}
        context.slot_mapping = context.slot_mapping | own

    def of_whole(self, common: Any) -> Any:
        """An attention's metadata, of the requests that have whole tokens, with these
        as their queries.
        """
        assert self.counts is not None
        assert self.whole is not None
        requests = np.flatnonzero(self.counts)
        counts = self.counts[requests]
        chosen, device = torch.from_numpy(requests), common.seq_lens.device
        starts = torch.zeros(len(requests) + 1, dtype=common.query_start_loc.dtype)
        starts[1:] = torch.from_numpy(counts).cumsum(0)
        there, whole = chosen.to(device), self.whole.to(device)
        on_cpu = {
            name: getattr(common, name)
            for name in ("seq_lens_cpu_upper_bound", "is_prefilling")
        }
        return type(common)(
            query_start_loc=starts.to(device),
            query_start_loc_cpu=starts,
            seq_lens=common.seq_lens[there],
            num_reqs=len(requests),
            num_actual_tokens=int(counts.sum()),
            max_query_len=int(counts.max()),
            max_seq_len=common.max_seq_len,
            block_table_tensor=common.block_table_tensor[there],
            slot_mapping=common.slot_mapping[whole],
            causal=common.causal,
            positions=None if common.positions is None else common.positions[whole],
            **{
                name: None if value is None else value[chosen]
                for name, value in on_cpu.items()
            },
        )
