"""Checkpoints that an engine reads, of a model without what a plan skips."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from ...engines import Engine, weight_bytes, worker
from ...exporters import Source, export
from ...exporters.manifest import NotVerified, read_manifest, verification_of
from ...files import temporary
from ...plan import Plan


def checkpoint_bytes(out: Path) -> int:
    """Bytes of the weights that a run left in its folder."""
    return sum(map(weight_bytes, (out / "checkpoints").glob("*")))


def write_plain(
    engine: Engine,
    original: Source,
    plan: Plan,
    out: Path,
    stored: bool = False,
) -> None:
    """Write the model without what the plan skips, plain or as it is `stored`, as the
    engine reads it; whole or not.

    An export is run, and compared with the skipped model. Raises `NotAsSkipped` where
    it answers differently, and `EngineFailed` where that cannot be seen: what is not
    verified is not measured.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with temporary(out) as scratch:
        scratch.mkdir()
        spec = original.model
        assert isinstance(spec, str | Path), "an engine reads files"
        source = engine.source(spec, scratch)
        if stored and Path(source).is_dir():
            source = shutil.copytree(source, scratch / "copy")
        elif plan or source == spec:
            if source != spec and plan.state == "repaired":
                # rounded weights do not show whose they are
                plan = plan.model_copy(update={"replaced": {}})
            in_dtype = engine.plain == engine.dtype and not stored
            dtype = engine.dtype if in_dtype else None
            in_engine = replace(original, model=source, dtype=dtype)
            folder = export(in_engine, plan, engine.target, scratch / "export")
            if isinstance(
                verdict := verification_of(read_manifest(folder)), NotVerified
            ):
                raise worker.EngineFailed(str(verdict))
            source = next(folder.glob(f"*{engine.suffix}")) if engine.suffix else folder
        Path(source).rename(out)
