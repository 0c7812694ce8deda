"""How long a model takes: prefill apart from decode, variants interleaved, each compared
with the original model.

Shapes: a prompt is (B, P), B sequences of P tokens.
"""

import inspect
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UsageError
from ..options import WORKLOAD, Workload
from ..plan import Plan
from ..progress import Progress, silent
from ..results.facts import Times
from ..results.record import Quartiles
from ..running.prefill import prompt as declared_prompt
from ..running.skipping import skip
from ..strict_json import Settings
from ..structure.model_structure import inputs_device
from ..version import __version__
from .quality import check_prompt

Sampled = TypeVar("Sampled")


@dataclass(frozen=True)
class RoundTimes:
    """What one variant took, a sample per round; `Times` is what is recorded of it."""

    prefill_samples_ms: tuple[float, ...]
    decode_samples_ms: tuple[float, ...]  # per token
    peak_bytes: int | None  # the most CUDA memory of a round; None without CUDA

    def compared_with(self, dense: "RoundTimes") -> Times:
        """Its quartiles, and the speedups over the original model of the same rounds."""
        return Times(
            prefill_ms=Quartiles.of(self.prefill_samples_ms),
            decode_ms_per_token=Quartiles.of(self.decode_samples_ms),
            speedup_prefill=speedup(dense.prefill_samples_ms, self.prefill_samples_ms),
            speedup_decode=speedup(dense.decode_samples_ms, self.decode_samples_ms),
            peak_bytes=self.peak_bytes,
        )


def time_once(model: PreTrainedModel, prompt: Tensor, new: int) -> tuple[float, float]:
    """Prefill `prompt` (B, P), then take `new` greedy steps: the milliseconds of the
    prefill, and of a step on average, each for all B sequences.

    Inside a `skip` whose plan skips in the prompt alone, `prompt` is declared as such.
    """
    devices = _accelerators(model)
    # as `generate` does: logits of the whole prompt would dominate small models
    last_only = last_logits(model, 1)
    with torch.inference_mode():
        start = _now(devices)
        with declared_prompt(model, prompt.shape[1]):
            output = model(input_ids=prompt, use_cache=True, **last_only)
        token = output.logits[:, -1:].argmax(-1)  # (B, 1)
        prefilled = _now(devices)
        prefill_ms = 1e3 * (prefilled - start)
        name = cache_name(output)
        for _ in range(new):
            cache = {name: output[name]}
            output = model(input_ids=token, use_cache=True, **cache, **last_only)
            token = output.logits[:, -1:].argmax(-1)  # (B, 1)
        decode_ms = 1e3 * (_now(devices) - prefilled)
        return prefill_ms, decode_ms / new


def last_logits(model: PreTrainedModel, tokens: int) -> dict[str, int]:
    """The argument of the model's forward that has it make the logits of so many last
    tokens alone, if it takes one.
    """
    name = "logits_to_keep"
    takes_it = name in inspect.signature(model.forward).parameters
    return {name: tokens} if takes_it else {}


def step_ms(model: PreTrainedModel, tokens: Tensor, prompt: int, width: int) -> float:
    """Mean milliseconds of a forward of `width` tokens, as checks of drafts, over
    `tokens` (B, P) behind a `prompt`.
    """
    devices = _accelerators(model)
    last_only = last_logits(model, 1)
    all_of_them = last_logits(model, width)
    steps = (tokens.shape[1] - prompt) // width
    with torch.inference_mode():
        output = model(input_ids=tokens[:, :prompt], use_cache=True, **last_only)
        name = cache_name(output)
        checked = tokens[:, prompt : prompt + steps * width]  # (B, steps x width)
        start = _now(devices)
        for step in checked.split(width, dim=1):
            cache = {name: output[name]}
            output = model(input_ids=step, use_cache=True, **cache, **all_of_them)
            output.logits.argmax(-1)
        all_ms = 1e3 * (_now(devices) - start)
        return all_ms / steps


def interleaved(
    measures: Mapping[str, Callable[[], Sampled]],
    rounds: int,
    progress: Progress = silent,
) -> dict[str, list[Sampled]]:
    """What each of `measures` answers, once a round behind one to warm up, in an order
    that turns: drift cancels.
    """
    samples: dict[str, list[Sampled]] = {name: [] for name in measures}
    total = (1 + rounds) * len(measures)
    for index in range(1 + rounds):
        in_turn = list(measures)
        if index % 2:
            in_turn.reverse()
        for place, name in enumerate(in_turn):
            done = index * len(measures) + place
            progress(done, total, f"timing {name}")
            samples[name].append(measures[name]())
    return {name: found[1:] for name, found in samples.items()}


def compare_speeds(
    model: PreTrainedModel,
    variants: Mapping[str, Callable[[], AbstractContextManager[object]]],
    workload: Workload = WORKLOAD,
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, RoundTimes]:
    """Time each variant, entered and left outside of the timed region, once a round,
    `interleaved`, on one prompt.
    """
    workload.check(model)
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    shape = workload.concurrency, workload.prompt_tokens  # (B, P)
    prompt = torch.randint(vocabulary, shape, generator=generator)
    prompt = prompt.to(inputs_device(model))
    accelerators = _accelerators(model)
    gpus = [device for device in accelerators if device.type == "cuda"]

    def measured(name: str) -> tuple[float, float, int]:
        with variants[name]():
            for gpu in gpus:
                torch.cuda.reset_peak_memory_stats(gpu)
            times = time_once(model, prompt, workload.generation_tokens)
            peak = sum(map(torch.cuda.max_memory_allocated, gpus))
            return *times, peak

    measures = {name: partial(measured, name) for name in variants}
    samples = interleaved(measures, workload.rounds, progress)
    found: dict[str, RoundTimes] = {}
    for name, rows in samples.items():
        prefill, decode, peaks = zip(*rows)
        peak = max(peaks) if gpus else None
        found[name] = RoundTimes(prefill, decode, peak)
    return found


def time_plans(
    model: PreTrainedModel,
    plans: Mapping[str, Plan],
    workload: Workload = WORKLOAD,
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Times]:
    """The times of the original and of each of `plans` by name, `dense` first. Raises
    as `skip` and `compare_speeds` do.
    """
    prompt = workload.prompt_tokens
    check_prompt([*plans.values()], prompt + 1, prompt)
    every = {"dense": Plan(), **plans}
    variants = {name: partial(skip, model, plan) for name, plan in every.items()}
    timings = compare_speeds(model, variants, workload, seed=seed, progress=progress)
    dense = timings["dense"]
    return {name: one.compared_with(dense) for name, one in timings.items()}


def speedup(baseline: Sequence[float], other: Sequence[float]) -> Quartiles:
    """How many times faster `other` is than `baseline` (above 1: faster), by samples of
    the same rounds, paired.
    """
    pairs = zip(baseline, other, strict=True)
    return Quartiles.of([slow / fast for slow, fast in pairs])


def machine(*devices: torch.device | str) -> Settings:
    """What a timing depends on: the CPU, our cores, torch's threads, versions, the
    devices (or the CPU).
    """
    cpu = _cpu_model()
    used = devices or ("cpu",)
    names = {str(device): _name_of(device, cpu) for device in used}
    versions = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "notall": __version__,
    }
    return {
        "cpu": cpu,
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "device": ", ".join(names),
        "device_name": ", ".join(dict.fromkeys(names.values())),
        "versions": versions,
    }


def _name_of(device: torch.device | str, cpu: str) -> str:
    is_cuda = torch.device(device).type == "cuda"
    return torch.cuda.get_device_name(device) if is_cuda else cpu


def _now(devices: Iterable[torch.device]) -> float:
    for device in devices:
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def devices_of(model: PreTrainedModel) -> list[torch.device]:
    """Where its weights are, by name: those that accelerate fetches are on the CPU."""
    cpu = torch.device("cpu")
    found = {weight.device for weight in model.parameters()}
    computing = {cpu if one.type == "meta" else one for one in found}
    return sorted(computing, key=str)


def _accelerators(model: PreTrainedModel) -> list[torch.device]:
    return [device for device in devices_of(model) if device.type != "cpu"]


def cache_name(output: Mapping[str, object]) -> str:
    """By which name a model that answers this takes its cache. Raises `UsageError`
    where it keeps none.
    """
    # transformers renamed it in 5.24; a model returns its cache under the name by which
    # it takes it.
    for name in ("cache", "past_key_values"):
        if output.get(name) is not None:
            return name
    raise UsageError(
        "the model returned no KV cache, so its decoding can't be timed; choose one"
        " that keeps a cache"
    )


def cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux: what a container or taskset leaves us
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        return answer.stdout.strip()
    cpuinfo = Path("/proc/cpuinfo")
    known = cpuinfo.read_text() if cpuinfo.exists() else ""
    for line in known.splitlines():
        if line.startswith("model name"):
            _, _, name = line.partition(":")
            return name.strip()
    return platform.processor() or platform.machine()
