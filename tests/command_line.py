"""Options that make a command short on a tiny model; the fixtures `run` and `folder`
are conftest's.
"""

from __future__ import annotations

QUICK = [
    "--sequences",
    "2",
    "--length",
    "16",
    "--batch-size",
    "2",
    "--dtype",
    "float32",
]
TIMED = ["--prompt-tokens", "4", "--generation-tokens", "2", "--rounds", "1"]
FAST = [*TIMED, "--dtype", "float32"]
MLPS = ["--skip", "mlp"]
