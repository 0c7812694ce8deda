"""What commands make of their options: models, token batches, plans, provenance."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import UsageError
from .options import Skippable

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..plan import Plan
    from ..spreading import Workers


def loading_of(
    spec: str,
    dtype: str,
    device: str,
    device_map: str | None,
    attn_implementation: str | None,
    revision: str | None,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """The arguments of `load` that the options say."""
    return {
        "spec": spec,
        "dtype": dtype,
        "device": device,
        "device_map": device_map,
        "attn_implementation": attn_implementation,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
    }


def load_model(*options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and the tokenizer that the options, as those of `loading_of`, say."""
    from ..models import load

    return load(**loading_of(*options))


def empty_model(spec: str, revision: str | None, trust_remote_code: bool) -> PreTrainedModel:
    from ..models import build_empty, load_config

    return build_empty(load_config(spec, revision=revision, trust_remote_code=trust_remote_code))


def dummy_model(
    spec: str,
    dummy_weights: bool,
    dtype: str,
    device: str,
    revision: str | None,
    trust_remote_code: bool,
    seed: int,
) -> PreTrainedModel:
    from ..models import build_random, load_config, resolve_device, resolve_dtype

    if not dummy_weights:
        raise UsageError("--shape has no weights of its own: add --dummy-weights")
    place = resolve_device(device)
    config = load_config(spec, revision=revision, trust_remote_code=trust_remote_code)
    return build_random(config, dtype=resolve_dtype(dtype, place), device=place, seed=seed)


def text_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    sequences: int,
    length: int,
    batch_size: int,
    seed: int,
) -> tuple[list[Tensor], dict[str, Any]]:
    """Token batches on the model's device, and what they are, for the record."""
    from ..texts import read_text, token_batches

    text = read_text(source)
    batches = token_batches(tokenizer, text, sequences=sequences, length=length, batch_size=batch_size, seed=seed)
    described = {"text": text.name, "text_sha256": text.sha256, "sequences": sequences, "length": length}
    return [batch.to(model.device) for batch in batches], described


def provenance_of(model: PreTrainedModel, spec: str, revision: str | None) -> dict[str, Any]:
    from ..models import identify
    from ..speed import machine

    about = machine(model.device)
    return identify(spec, revision=revision) | {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": about["device"],
        "threads": about["threads"],
        "versions": about["versions"],
        "machine": about,
    }


def read_plan(path: Path | None) -> Plan:
    from ..plan import Plan

    return Plan.load(path) if path else Plan()


def deepest_plan(model: PreTrainedModel, skip: Skippable, fraction: float, keep_last: bool) -> Plan:
    from ..anatomy import locate
    from ..criteria import deepest

    return deepest(locate(model), skip.value, fraction, keep_last=keep_last)


def workers_on(
    address: str | None, count: int | None, gpus: int, model: PreTrainedModel, **load_options: Any
) -> AbstractContextManager[Workers | None]:
    """The workers of `--ray`, each with its own copy of the model; None without."""
    if address is None:
        return nullcontext()
    from ..anatomy import locate
    from ..spreading import Workers

    return Workers(load_options, locate(model), address, count=count, gpus=gpus)


def batch_size_of(word: str) -> int | Literal["auto"]:
    """What `--batch-size` says. Raises `UsageError` for anything but a number and auto."""
    if word == "auto":
        return "auto"
    if not word.isdecimal():
        raise UsageError(f"--batch-size {word} is neither a number nor auto; give one of them")
    return int(word)


def words_of(values: list[str] | None) -> list[str]:
    """The words of an option that may be repeated, or hold several with commas between them."""
    return [word for value in values or () for word in value.split(",") if word]
