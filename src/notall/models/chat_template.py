"""A prompt in the model's chat template: a program that comes with the model, so it may fail and it may never end."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import UsageError, shortened

MOST_SECONDS = 5.0  # a template takes milliseconds
TEMPLATE = "<template>"  # the file that Jinja says its code is in


def in_chat_template(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The prompt as what a user says, up to where the model answers. Raises `UsageError` where no template says it."""
    if not tokenizer.chat_template:
        raise UsageError("this model has no chat template: leave chat out")
    message = [{"role": "user", "content": prompt}]
    try:
        with _ending_in_time():
            return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # whatever a program may raise
        said = shortened(str(error) or type(error).__name__)
        raise UsageError(f"the model's chat template fails ({said}): leave chat out, or mend the template") from error


@contextmanager
def _ending_in_time() -> Iterator[None]:
    """Stop a template after MOST_SECONDS. A single operation, such as a power of huge numbers, is not interrupted."""
    end = time.monotonic() + MOST_SECONDS

    def watch(frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > end:
            raise TimeoutError(f"it does not end within {MOST_SECONDS:g} seconds")
        return watch if frame.f_code.co_filename == TEMPLATE else None  # line by line in the template alone

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)
