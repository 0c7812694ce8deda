"""What a plan takes, in time and memory, and what it took to choose it."""

from pydantic import Field

from ..record import Amount, Count, Fact, Positive, Quartiles
from ..table import Column, number, size, with_quartiles
from .added import Added


class Times(Fact):
    """What a model takes, compared with the original model in the same rounds:
    milliseconds, and ratios paired by round.
    """

    prefill_ms: Quartiles = Field(
        description="milliseconds from the prompt to the first new token"
    )
    decode_ms_per_token: Quartiles = Field(
        description="milliseconds of a decode step, for the whole batch"
    )
    speedup_prefill: Quartiles = Field(
        description="dense prefill_ms / this one's, a ratio a round; > 1: faster"
    )
    speedup_decode: Quartiles = Field(
        description="dense decode_ms_per_token / this one's, likewise"
    )
    peak_bytes: Count | None = Field(
        None, description="most CUDA memory allocated while timing; None without CUDA"
    )


SPEEDUPS: tuple[Column[Times], Column[Times]] = (
    with_quartiles("decode speedup", lambda times: times.speedup_decode, ".2f"),
    with_quartiles("prefill speedup", lambda times: times.speedup_prefill, ".2f"),
)
DECODE_MS: Column[Times] = with_quartiles(
    "decode ms/token", lambda times: times.decode_ms_per_token
)
PREFILL_MS: Column[Times] = with_quartiles("prefill ms", lambda times: times.prefill_ms)
PEAK: Column[Times] = size("peak memory", lambda times: times.peak_bytes)
TIMES = (*SPEEDUPS, DECODE_MS, PREFILL_MS)


class Footprint(Fact):
    """What a plan leaves of a model. What is skipped and others read weighs what it
    did.
    """

    params: Count = Field(description="parameters that are left")
    weight_bytes: Count = Field(
        description="bytes of the weights that are left, as loaded, scales too"
    )
    kv_bytes_per_token: Count = Field(
        description="bytes of KV cache a token of one sequence takes"
    )
    state_bytes: Count | None = Field(
        None, description="bytes of states of fixed size of one sequence, of hybrids"
    )


WEIGHT_BYTES: Column[Footprint] = size("weights", lambda left: left.weight_bytes)
KV: Column[Footprint] = size("KV/token", lambda left: left.kv_bytes_per_token)
STATE_BYTES: Column[Footprint] = size("states", lambda left: left.state_bytes)
PARAMETERS: Column[Footprint] = number("parameters", lambda left: left.params, ",")
FOOTPRINT = (WEIGHT_BYTES, KV, PARAMETERS, STATE_BYTES)


class SearchCost(Added):
    """What choosing took."""

    evaluations: Count = Field(0, description="sets of sublayers that were evaluated")
    executions: Amount = Field(
        0.0, description="sublayers run, in passes over the whole calibration text"
    )
    seconds: Amount = Field(0.0, description="CPU seconds of all threads")
    wall_seconds: Amount = Field(
        0.0,
        description="of the clock: on a GPU it is the measure; 0 where none was kept",
    )


class SpeedCheck(Fact):
    """A plan's speedup of a workload as it was predicted, and as it was measured,
    interleaved with the original.
    """

    predicted_ms: Positive
    measured_ms: Positive
    predicted_speedup: Positive = Field(description="ratio to the original model")
    measured_speedup: Quartiles = Field(description="the rounds' own ratios")

    @property
    def off(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted_speedup / self.measured_speedup.median - 1


SPEED_CHECK: tuple[Column[SpeedCheck], ...] = (
    with_quartiles("measured speedup", lambda check: check.measured_speedup, ".3f"),
    number("predicted speedup", lambda check: check.predicted_speedup, ".3f"),
    number("off by", lambda check: check.off, "+.1%"),
    number("measured ms", lambda check: check.measured_ms, ".0f"),
    number("predicted ms", lambda check: check.predicted_ms, ".0f"),
)
