"""What every program of this folder is asked for: a folder of texts, a model,
threads.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

import notall


def options_of(description: str | None) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", type=Path, default=Path("../shared/data"))
    options.add_argument("--model", default="smollm2")
    options.add_argument("--dtype", default="bfloat16")
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    return options


def load_asked(asked: argparse.Namespace) -> tuple[Any, Any]:
    """The model and its tokenizer; ends the program where there are no texts."""
    if not asked.data.is_dir():
        sys.exit(f"skipped: no folder {asked.data} with texts; give one with --data")
    torch.set_num_threads(asked.threads)
    return notall.load(asked.model, dtype=asked.dtype)
