"""A prompt in the model's chat template: a program that comes with the model, so it may fail and it may never end."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedTokenizerBase

from ..errors import UsageError, shortened

MOST_SECONDS = 5.0  # a template takes milliseconds


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


class _Endless(Exception):
    """Said of a template that does not end."""

    def __str__(self) -> str:
        return f"it does not end within {MOST_SECONDS:g} seconds"


@contextmanager
def _ending_in_time() -> Iterator[None]:
    """Stop a template after MOST_SECONDS. A single operation, such as a power of huge numbers, is not interrupted."""
    thread = ctypes.c_ulong(threading.get_ident())
    raise_there = ctypes.pythonapi.PyThreadState_SetAsyncExc  # also where this is not the main thread
    timer = threading.Timer(MOST_SECONDS, lambda: raise_there(thread, ctypes.py_object(_Endless)))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
