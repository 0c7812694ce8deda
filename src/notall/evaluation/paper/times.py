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
from ...plan import Configuration
from ...progress import Progress, silent
from ...records import ledger
from ...running.skipping import skip
from ...structure.anatomy import base_model, locate

TIMES = "times.jsonl"


def time_grid(
    model: PreTrainedModel,
    rows: Sequence[Configuration],
    out: Path,
    provenance: Mapping[str, Any],
    *,
    prompts: Sequence[int] = (128, 512),
    batch_sizes: Sequence[int] = (1,),
    new_tokens: int = 16,
    rounds: int = 3,
    seed: int = 0,
    compiled: bool = False,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Time all `rows` (the dense one first) in turn, for each prompt length and batch size; one record each.

    Appends to `out/times.jsonl` when a prompt length and batch size is done, and takes what is there. Where a batch
    does not fit into memory half of it is timed, and the record's `batch_size` says so beside `asked_batch_size`.
    `compiled`: each decoder layer by torch.compile, compiled in the round that is thrown away, one configuration after
    the other.
    Raises as `compare` does, and `UsageError` when not even one sequence fits, and when another process works in `out`.
    """
    with ledger.lock(out):
        settings = dict(provenance) | {"new_tokens": new_tokens, "rounds": rounds, "seed": seed}
        held = {_key(record): record for record in ledger.read(out / TIMES)}
        for record in held.values():
            ledger.check_same(record["provenance"], settings, out)
        sizes = [(prompt, batch) for prompt in prompts for batch in batch_sizes]
        for number, (prompt, batch) in enumerate(sizes):
            progress(number, len(sizes), f"timing {len(rows)} configurations at {prompt} prompt tokens, batch {batch}")
            wanted = [(prompt, batch, row.variant, row.fraction, row.keep_last) for row in rows]
            if held.keys() >= set(wanted):
                continue
            how = {"prompt_tokens": prompt, "new_tokens": new_tokens, "rounds": rounds, "seed": seed}
            run = partial(_compare, model, rows, compiled, **how)
            fitted, timings = _fitting(run, batch)
            dense = timings[rows[0].name]
            fresh = [
                {
                    "prompt_tokens": prompt,
                    "batch_size": fitted,
                    "asked_batch_size": batch,
                    "variant": row.variant,
                    "fraction": row.fraction,
                    "keep_last": row.keep_last,
                    "plan": row.plan.indices,
                    **timing_fields(model, row.plan, dense, timings[row.name]),
                    "provenance": settings,
                }
                for row in rows
            ]
            ledger.append(out / TIMES, *fresh)
            held |= {_key(record): record for record in fresh}
        return [record for record in held.values() if _key(record)[:2] in sizes]


def _key(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(record[name] for name in ("prompt_tokens", "asked_batch_size", "variant", "fraction", "keep_last"))


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
