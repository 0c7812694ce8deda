"""transformers: an ordinary checkpoint where the plan is portable, else a regrouped one with its own modeling file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..progress import Progress, silent
from ..records.plan import Plan
from ..records.strict_json import Settings
from ..running.regrouping import Layer
from ..structure.anatomy import Anatomy
from .companions import companions, copy_companions
from .dense import DenseModel
from .layout import build_cut, build_of, check_twins, cut_settings, layers_of
from .manifest import TURNED_OFF, Verdict, WeightBytes, describe, manifest_of
from .moving import moved_modules, moved_tensors
from .quantisation import cut_quantisation, renamed_notes
from .remote_code import FAMILIES, classes_of, load_modeling, model_type_of, modeling_file, write_modeling
from .tensors import Source, total_bytes, write_shards
from .verification import verify
from .writing import check_room

ORDINARY_USE = "An ordinary {base} checkpoint: whatever loads the dense model loads this one, with no code of its own."
REGROUPED_USE = (
    "Every layer has one attention, and MLPs that lost theirs ride along; the modeling file beside the weights says "
    "how. Load it with `trust_remote_code=True`, or after `notall.register()`:\n\n"
    "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    'folder = "."  # where this file lies, or its hub id\n'
    "tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)\n"
    "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\n"
    'tokens = model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=16)\n'
    "print(tokenizer.decode(tokens[0]))\n```"
)


def export_hf(
    dense: DenseModel,
    plan: Plan,
    folder: Path,
    *,
    shard_bytes: int,
    measured: Mapping[str, Any] | None = None,
    check: bool = True,
    progress: Progress = silent,
) -> None:
    """Write the checkpoint, its manifest and its card into an empty folder; with `check`, run and compare it.

    Raises `UsageError` for a plan that is not portable where the architecture has no regrouped form.
    """
    beside = companions(dense.folder, code=dense.trusted)
    settings, tensors, notes, is_ordinary = prepared(dense, plan)
    check_room(folder, total_bytes(tensors))
    base = dense.config.model_type
    if not is_ordinary:
        write_modeling(folder, base)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    write_shards(folder, tensors, shard_bytes, progress, notes)
    copy_companions(beside, folder)
    verdict: Verdict = TURNED_OFF
    if check:
        loader = dense.reader
        if not is_ordinary:
            loader = getattr(load_modeling(folder, base), classes_of(base)["AutoModelForCausalLM"])
        progress(0, 1, "comparing with the skipped model")
        verdict = verify(dense, plan, folder, loader, tensors)
    manifest = manifest_of(dense.origin, plan, settings["model_type"]) | _broken_period(dense.anatomy, plan)
    use = ORDINARY_USE.format(base=base) if is_ordinary else REGROUPED_USE
    weights = WeightBytes(total_bytes(dense.tensors), total_bytes(tensors))
    describe(folder, manifest, dense.origin.card, use, verdict=verdict, weights=weights, measured=measured)


def _broken_period(anatomy: Anatomy, plan: Plan) -> Settings:
    """After how many layers the kinds of mixers come again, where they no longer do: some engines count them so."""
    kept = [block.index for block in anatomy.blocks if block.index not in plan.attention]
    return {"breaks_period": anatomy.period} if anatomy.period > 1 and not anatomy.keeps_period(kept) else {}


def prepared(dense: DenseModel, plan: Plan) -> tuple[Settings, dict[str, Source], dict[str, str], bool]:
    """config.json, the tensors by their new names, what their files say, and whether the checkpoint is an ordinary one.

    Raises as `export_hf`.
    """
    layers = layers_of(dense.anatomy, plan)
    is_ordinary = all(layer.is_ordinary for layer in layers)
    settings = cut_settings(dense, layers)
    notes: dict[str, str] = {}
    if dense.quantisation is not None:
        moved = moved_modules(dense, layers)
        settings["quantization_config"] = cut_quantisation(dense.quantisation, moved, dense.prefix)
        notes = renamed_notes(dense.notes, moved)
    check_twins(dense, build_cut(dense, settings), layers)
    if not is_ordinary:
        _check_regrouped(dense, plan)
        settings |= _regrouped_settings(dense.config.model_type, layers)
    elif not dense.trusted:
        settings.pop("auto_map", None)  # the code that it names does not go along
    return settings, dict(moved_tensors(dense, layers)), notes, is_ordinary


def _check_regrouped(dense: DenseModel, plan: Plan) -> None:
    base, blocks = dense.config.model_type, dense.anatomy.blocks
    if blocks[0].parallel:
        raise UsageError(
            f"in {base} the attention and the MLP of a block run side by side, so that a checkpoint can lack whole "
            "blocks only; skip blocks"
        )
    if base not in FAMILIES:
        raise UsageError(
            f"this plan keeps sublayers that do not alternate, attention, MLP, attention, MLP, and notall has no form "
            f"for that in {base} (it has for {', '.join(FAMILIES)}); skip whole blocks, or choose a portable plan"
        )
    kinds = {repr(build_of(dense, block.mlp)) for block in blocks if block.index not in plan.mlp}
    if len(kinds) > 1:
        raise UsageError(
            f"this {base} has MLPs of {len(kinds)} kinds, and an MLP without its attention would be built as the wrong "
            "one; skip whole blocks, or choose a portable plan"
        )


def _regrouped_settings(base: str, layers: Sequence[Layer]) -> Settings:
    classes = classes_of(base)
    module = modeling_file(base).removesuffix(".py")
    return {
        "model_type": model_type_of(base),
        "architectures": [classes["AutoModelForCausalLM"]],
        "auto_map": {auto: f"{module}.{name}" for auto, name in classes.items()},
        "sublayers": [asdict(layer) for layer in layers],
    }
