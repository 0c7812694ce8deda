"""The paper's time tables: prefill and decode of the whole grid over prompt lengths and batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers import PreTrainedModel

from ...errors import UsageError
from ...measuring.plan_times import timing_fields
from ...measuring.speed import Timing, compare
from ...progress import Progress, Stages, silent
from ...records.benchmarks import TimesRecord
from ...records.ledger import Ledger, working_in
from ...records.provenance import Provenance
from ...records.record import Key
from ...running.skipping import skip
from ...structure.anatomy import base_model
from ...structure.locating import locate
from .grid import Configuration


def time_grid(
    model: PreTrainedModel,
    rows: Sequence[Configuration],
    out: Path,
    provenance: Provenance | Mapping[str, Any],
    *,
    prompts: Sequence[int] = (128, 512),
    batch_sizes: Sequence[int] = (1,),
    new_tokens: int = 16,
    rounds: int = 5,
    seed: int = 0,
    compiled: bool = False,
    progress: Progress = silent,
) -> list[TimesRecord]:
    """Time all `rows` (the dense one first) in turn, for each prompt length and batch size; one record each.

    Writes to `out` when a prompt length and batch size is done, and takes what is there. Where a batch
    does not fit into memory half of it is timed, and the record's `batch_size` says so beside `asked_batch_size`.
    `compiled`: each decoder layer by torch.compile, compiled in the round that is thrown away, one configuration after
    the other.
    Raises as `compare` does, and `UsageError` when not even one sequence fits, and when another process works in `out`.
    """
    about = Provenance.of(provenance, new_tokens=new_tokens, rounds=rounds, seed=seed)
    with working_in(out, "paper"):
        held = Ledger(out, TimesRecord, about)
        sizes = list(dict.fromkeys((prompt, batch) for prompt in prompts for batch in batch_sizes))
        stages = Stages(progress, len(sizes))
        for prompt, batch in sizes:
            telling = stages.stage(1)
            telling(0, 1, f"timing {len(rows)} configurations at {prompt} prompt tokens, batch {batch}")
            known = [
                held[key] for row in rows if (key := _key(prompt, batch, row)) in held and row.describes(held[key])
            ]
            if len(known) == len(rows) and len({record.batch_size for record in known}) == 1:
                continue
            how = {"prompt_tokens": prompt, "new_tokens": new_tokens, "rounds": rounds, "seed": seed}
            run = partial(_compare, model, rows, compiled, **how, progress=telling)
            fitted, timings = _fitting(run, batch)
            dense = timings[rows[0].name]
            held.add(
                *(
                    TimesRecord(
                        prompt_tokens=prompt,
                        batch_size=fitted,
                        asked_batch_size=batch,
                        variant=row.variant,
                        fraction=row.fraction,
                        keep_last=row.keep_last,
                        plan=row.plan,
                        **timing_fields(model, row.plan, dense, timings[row.name]),
                        provenance=about,
                    )
                    for row in rows
                )
            )
        progress(len(sizes), len(sizes), "timed all configurations")
        return [held[_key(prompt, batch, row)] for prompt, batch in sizes for row in rows]


def _key(prompt: int, batch: int, row: Configuration) -> Key:
    return prompt, batch, row.variant, row.fraction, row.keep_last


def _compare(model: PreTrainedModel, rows: Sequence[Configuration], compiled: bool, **how: Any) -> dict[str, Timing]:
    if not compiled:
        return compare(model, {row.name: partial(skip, model, row.plan) for row in rows}, **how)
    found: dict[str, Timing] = {}
    for row in rows:  # not in turn: what is compiled is gone when a plan is left
        with skip(model, row.plan), _compiled_layers(model):
            found |= compare(model, {row.name: nullcontext}, **how)
    return found


@contextmanager
def _compiled_layers(model: PreTrainedModel) -> Iterator[None]:
    """Layers of one form share what is compiled, whatever their number, as long as torch keeps that many variants."""
    inner = base_model(model)
    layers = list(inner.get_submodule(locate(inner).layers).children())
    with torch._dynamo.config.patch(recompile_limit=1024, allow_unspec_int_on_nn_module=True):
        for layer in layers:
            layer.compile(dynamic=True)
        try:
            yield
        finally:
            for layer in layers:
                layer._compiled_call_impl = None


def _fitting(run: Callable[..., dict[str, Timing]], batch: int) -> tuple[int, dict[str, Timing]]:
    """The largest halving of `batch` that memory holds, and its times."""
    while batch:
        try:
            return batch, run(batch_size=batch)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
        clear_device_cache(garbage_collection=True)
        batch //= 2
    raise UsageError("one sequence takes more memory than there is; give a smaller dtype or shorter prompts")
