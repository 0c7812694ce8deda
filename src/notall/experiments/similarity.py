"""Similarity of features by depth, kept in a folder."""

from __future__ import annotations

from ..progress import Progress
from ..results.facts import Similarity
from ..results.ledger import Ledger
from ..results.provenance import Provenance
from ..results.record import Record
from .subject import Subject


class SimilarityRecord(Record, Similarity, kind="similarity", key=("layer", "kind")):
    """One block or sublayer of a run."""


def similarities(
    subject: Subject, about: Provenance, progress: Progress
) -> list[SimilarityRecord]:
    """Of each block and sublayer on the subject's text; measured unless the folder has
    them all.
    """
    from ..measuring.quality import measure_similarity

    progress(0, 1, "similarity by depth")
    held = Ledger(subject.out, SimilarityRecord, about)
    wanted = [
        (block.index, kind)
        for block in subject.structure.blocks
        for kind in ("block", *block.kinds)
    ]
    if held.missing(wanted):
        found = measure_similarity(subject.model, subject.batches)
        records = [SimilarityRecord.from_fact(row, provenance=about) for row in found]
        held.add(*(record for record in records if record.key not in held))
    progress(1, 1, "similarity by depth")
    return [held[key] for key in wanted]
