"""The options that commands share, each with its one explanation."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError, shortened

# How the help of a command groups its options.
MODEL, TEXT, TIMING, BENCHMARKS, CLUSTER = "Model", "Text", "Timing", "Benchmarks", "Cluster"
BUDGET, JUDGED_BY, REPAIRING = "Budget: one of them, or one with a limit of nats", "What a set is judged by", "Repair"

Model = Annotated[str, typer.Argument(metavar="MODEL", help="smollm2, a hub id, a folder, or a .gguf file")]
Dtype = Annotated[
    str, typer.Option(help="dtype to compute in: auto, float32, bfloat16 or float16", rich_help_panel=MODEL)
]
OwnDtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="float32, bfloat16 or float16 (default: the checkpoint's own; of a GGUF file, bfloat16)",
        rich_help_panel=MODEL,
    ),
]
Device = Annotated[str, typer.Option(help="device to run on: auto, cpu, cuda, cuda:1, mps ...", rich_help_panel=MODEL)]
DeviceMap = Annotated[
    str | None,
    typer.Option(help="spread the model over devices with accelerate: auto, balanced ...", rich_help_panel=MODEL),
]
Revision = Annotated[str | None, typer.Option(help="branch, tag or commit of a hub model", rich_help_panel=MODEL)]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="run the model's own code from the hub", rich_help_panel=MODEL)
]
Attention = Annotated[
    str | None, typer.Option(help="attention implementation: sdpa, eager, flash_attention_2 ...", rich_help_panel=MODEL)
]
PlanFile = Annotated[Path | None, typer.Option("--plan", help="plan file, or the folder of a repair")]
Repair = Annotated[
    bool,
    typer.Option(
        "--repair",
        help="refit what is kept first, as `notall repair`: minutes",
        rich_help_panel=REPAIRING,
    ),
]
RepairText = Annotated[
    list[str] | None,
    typer.Option(
        "--repair-text", help="text to refit to; repeat it for more (default: prose)", rich_help_panel=REPAIRING
    ),
]
RepairSequences = Annotated[
    int | None,
    typer.Option(
        help="windows of 512 tokens to refit to (default: up to 128, which take minutes)", rich_help_panel=REPAIRING
    ),
]
TextSource = Annotated[
    str,
    typer.Option(
        "--text",
        help="a UTF-8 file, a .jsonl with a `text` column, or prose, which ships with Python",
        rich_help_panel=TEXT,
    ),
]
Sequences = Annotated[int, typer.Option(help="number of windows of text", rich_help_panel=TEXT)]
Length = Annotated[int, typer.Option(help="tokens in each window", rich_help_panel=TEXT)]
BatchSize = Annotated[int, typer.Option(help="windows to run at a time", rich_help_panel=TEXT)]


def _seed(seed: int) -> int:
    if not 0 <= seed < 1 << 63:
        raise UsageError(f"--seed {shortened(seed)} is none: give a whole number from 0 to {(1 << 63) - 1}")
    return seed


Seed = Annotated[int, typer.Option(callback=_seed, help="random seed")]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]
Prompt = Annotated[int, typer.Option("--prompt", help="prompt tokens when timing", rich_help_panel=TIMING)]
New = Annotated[int, typer.Option("--new", help="new tokens when timing", rich_help_panel=TIMING)]
Rounds = Annotated[int, typer.Option(help="timed rounds; each times both models in turn", rich_help_panel=TIMING)]

Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--tasks",
        help="openllm, or tasks of lm-evaluation-harness, with commas between them; see `notall tasks`",
        rich_help_panel=BENCHMARKS,
    ),
]
FewShot = Annotated[
    int | None,
    typer.Option("--num-fewshot", help="examples to show (default: the task's own number)", rich_help_panel=BENCHMARKS),
]
Limit = Annotated[
    list[str] | None,
    typer.Option(
        "--limit",
        help="documents of each task, such as 40; mmlu=2 limits one task, or each task of a group",
        rich_help_panel=BENCHMARKS,
    ),
]
TaskPath = Annotated[
    Path | None,
    typer.Option(
        "--task-path",
        help="folder with more tasks: YAML files of the harness, which may run code",
        rich_help_panel=BENCHMARKS,
    ),
]
Truncate = Annotated[
    bool,
    typer.Option("--truncate", help="cut the beginning of what is longer than the context", rich_help_panel=BENCHMARKS),
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="[ADDRESS]",
        help="run on a Ray cluster: the running one, or a new one. ADDRESS may be local, auto, HOST:PORT or "
        "ray://HOST:PORT",
        rich_help_panel=CLUSTER,
    ),
]
RayWorkers = Annotated[
    int | None,
    typer.Option("--ray-workers", help="number of workers (default: one for each GPU)", rich_help_panel=CLUSTER),
]
RayGpus = Annotated[int, typer.Option("--ray-gpus", help="GPUs for each worker", rich_help_panel=CLUSTER)]
Battery = Annotated[
    bool,
    typer.Option(
        "--battery",
        help="also measure what accuracy hides: NLL by position, passkey, calibration, writing, GSM8K",
        rich_help_panel=BENCHMARKS,
    ),
]
TaskBatch = Annotated[
    str, typer.Option("--batch-size", help="requests to run at a time: a number, or auto", rich_help_panel=BENCHMARKS)
]


class SkippedKind(str, Enum):
    attention = "attention"
    mlp = "mlp"
    block = "block"


Skip = Annotated[
    SkippedKind | None,
    typer.Option(metavar="KIND", help="instead of --plan: leave out the deepest of attention, mlp or block"),
]
Fraction = Annotated[
    float | None, typer.Option(help="with --skip: share of the layers to skip, 0 to 1 (default: 0.33)")
]
SkipKeepLast = Annotated[bool, typer.Option("--keep-last", help="with --skip: preserve the last layer")]


Kind = Annotated[
    str,
    typer.Option(
        metavar="KIND",
        help="attention, mlp, block, period (blocks until the kinds of mixers come again) or sublayer (attentions and "
        "MLPs), or a kind of mixer, as inspect names it",
    ),
]
Portable = Annotated[bool, typer.Option("--portable", help="consider only sets that leave an ordinary checkpoint")]
KeepFirst = Annotated[bool, typer.Option("--keep-first", help="preserve the first layer")]
KeepLast = Annotated[bool, typer.Option("--keep-last", help="preserve the last layer")]
Objective = Annotated[
    str | None,
    typer.Option(
        help="nll, kl, answers, task:NAME, or a sum such as 'kl + 0.5*task:NAME' (default: kl; nll with --max-nll)",
        rich_help_panel=JUDGED_BY,
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        help="for `answers`: a file with a prompt on each line, or a .jsonl with a `prompt` column",
        rich_help_panel=JUDGED_BY,
    ),
]
TaskLimit = Annotated[int, typer.Option(help="training questions to use for task:NAME", rich_help_panel=JUDGED_BY)]
