"""The columns of tables whose rows are no records; those of records are with each kind, in `records/`."""

from __future__ import annotations

from ..records.benchmarks import DIFFERENCE, DOCUMENTS, TASK, VALUE, WORSE, P
from ..records.columns import number, plain, size
from ..records.record import KV, QUALITY, SIZE, STATE, WEIGHTS

MODEL = plain("model")  # dense, skipped or repaired
DENSE = number("dense", "dense")
INSPECT_COLUMNS = (
    plain("sublayer"),
    number("parameters", "parameters", ","),
    number("share", "share", ".2%"),
    WEIGHTS,
    KV,
    STATE,
    plain("mixer"),
    plain("read_by", "read by"),
)
FOOTPRINT_COLUMNS = (MODEL, *SIZE)
QUALITY_COLUMNS = (MODEL, *QUALITY, number("sequences", "sequences", "d"))
TASK_COLUMNS = (*TASK, MODEL, DIFFERENCE, WORSE, P, VALUE, DENSE, *DOCUMENTS)
CHECK_COLUMNS = (plain("check"), MODEL, DIFFERENCE, WORSE, P, VALUE, DENSE)
FILE_COLUMNS = (plain("file"), size("bytes", "size"))
TASKS_COLUMNS = (plain("task"), plain("kind"), DOCUMENTS[0])
CRITERIA_COLUMNS = (plain("criterion"), plain("of"), plain("goes by"))
