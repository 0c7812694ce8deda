"""What is measured of a plan: one type a fact, with its units and its columns. Nothing
here runs a model.
"""

from .added import (
    Added as Added,
)
from .compared import (
    COMPARED as COMPARED,
    DENSE_VALUE as DENSE_VALUE,
    DIFFERENCE as DIFFERENCE,
    METRICS as METRICS,
    NAMED_TASKS as NAMED_TASKS,
    P_VALUE as P_VALUE,
    PLAN_CHECKS as PLAN_CHECKS,
    PLAN_SCORES as PLAN_SCORES,
    RECOVERED as RECOVERED,
    RECOVERY as RECOVERY,
    SIGNIFICANT as SIGNIFICANT,
    VALUE as VALUE,
    WORSE as WORSE,
    Check as Check,
    Compared as Compared,
    Decoding as Decoding,
    NamedTasks as NamedTasks,
    PlanCheck as PlanCheck,
    PlanScore as PlanScore,
    Recovered as Recovered,
    Recovery as Recovery,
    State as State,
    TaskScore as TaskScore,
)
from .cost import (
    DECODE_MS as DECODE_MS,
    FOOTPRINT as FOOTPRINT,
    KV as KV,
    PARAMETERS as PARAMETERS,
    PEAK as PEAK,
    PREFILL_MS as PREFILL_MS,
    SPEED_CHECK as SPEED_CHECK,
    SPEEDUPS as SPEEDUPS,
    STATE_BYTES as STATE_BYTES,
    TIMES as TIMES,
    WEIGHT_BYTES as WEIGHT_BYTES,
    Footprint as Footprint,
    SearchCost as SearchCost,
    SpeedCheck as SpeedCheck,
    Times as Times,
)
from .grid import (
    CONFIGURED as CONFIGURED,
    GRID as GRID,
    Configured as Configured,
)
from .quality import (
    COSINE as COSINE,
    DELTA_NLL as DELTA_NLL,
    KL as KL,
    NATS_PER_TOKEN as NATS_PER_TOKEN,
    NLL as NLL,
    PERPLEXITY as PERPLEXITY,
    QUALITY as QUALITY,
    SIMILARITY as SIMILARITY,
    TOP1 as TOP1,
    Quality as Quality,
    Scores as Scores,
    Similarity as Similarity,
)
