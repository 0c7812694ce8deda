"""Text, its tokens, and batches of token ids, checked before anything runs."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..digests import digest_of
from ..errors import UsageError, expect, shortened
from ..files import contents, expanded
from ..strict_json import read_json
from ..structure.model_structure import inputs_device
from .names import DEFAULT_TEXT, USAGE_MIX

MIX = ("answers", "episodes", "completions")  # the parts of the text `mix`
# before a file of prompts, the first, third ... of which a model answers
ANSWERS_TO = "answers:"
MOST_BYTES = 1 << 30  # of a file


def is_made(source: str) -> bool:
    """Whether a text of that name is made here, and read from no file."""
    return source in (*MIX, USAGE_MIX) or source.startswith(ANSWERS_TO)


@dataclass(frozen=True)
class Text:
    """A text with its name (`prose`, or the file's with no folder) and the SHA-256 of
    its UTF-8 bytes.
    """

    name: str
    sha256: str
    content: str


def read_text(source: str | Path = DEFAULT_TEXT) -> Text:
    """Read a UTF-8 text file, the `text` fields of a .jsonl file, or `prose`: English
    that ships with Python.

    Prose and its hash differ a bit between Python versions. Raises UsageError for a
    text missing, empty or not UTF-8.
    """
    path = expanded(source)
    name = shortened(path.name)
    if source == DEFAULT_TEXT:
        content = _prose()
    else:
        content = read_file(path, "`prose` or a text file")
        if path.suffix == ".jsonl":
            content = "\n\n".join(fields(path, content, "text"))
    if not content.strip():
        raise UsageError(f"the text {name} is empty: give one with words in it")
    return Text(path.name, digest_of([content]), content)


_TOKENISED: WeakKeyDictionary[PreTrainedTokenizerBase, dict[str, Tensor]] = (
    WeakKeyDictionary()
)


def token_ids(tokenizer: PreTrainedTokenizerBase, text: Text) -> Tensor:
    """(tokens,), int32; a text is tokenised once."""
    known = _TOKENISED.setdefault(tokenizer, {})
    if text.sha256 not in known:
        ids = tokenizer(text.content, add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        known[text.sha256] = torch.tensor(ids, dtype=torch.int32)
    return known[text.sha256]


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[BOS] if the tokenizer puts it before a text, else nothing."""
    first = tokenizer("a")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def _prose() -> str:
    try:
        from pydoc_data.topics import topics
    except (
        ImportError
    ) as error:  # some distributions ship Python without its documentation
        raise UsageError(
            "this Python has no pydoc_data, the default text: give a text file"
        ) from error
    return "\n\n".join(topics[name] for name in sorted(topics))


def read_file(path: Path, wanted: str) -> str:
    """A UTF-8 file's text. Raises UsageError, which says to give `wanted`, for none and
    for too large a one.
    """
    name = shortened(path)
    try:
        return (
            contents(path, MOST_BYTES)
            .decode("utf-8-sig")
            .replace("\r\n", "\n")
            .replace("\r", "\n")
        )
    except UnicodeDecodeError as error:
        raise UsageError(
            f"the text {name} is not UTF-8 (byte {error.start}): convert it, or give"
            " another"
        ) from error
    except OSError as error:
        raise UsageError(
            f"cannot read the text {name} ({error.strerror}): give {wanted}"
        ) from error


def fields(path: Path, content: str, name: str) -> list[str]:
    """The field `name` of every line of JSON, each a string; blank lines are
    skipped.
    """
    found = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            field = read_json(line)[name]
        except (ValueError, KeyError, TypeError):
            field = None
        if not isinstance(field, str):
            raise UsageError(
                f"{shortened(path)}, line {number}: give a JSON object with a string"
                f' named "{name}"'
            )
        found.append(field)
    return found


IDS = (
    "token ids as tensors of (batch, tokens), such as tokenizer(text,"
    " return_tensors='pt')['input_ids']"
)


def checked(
    batches: Iterable[Tensor], model: PreTrainedModel | None = None
) -> Iterator[Tensor]:
    """`batches` one by one, on the device where `model` takes its inputs.

    Raises `UsageError` for what are no ids of (batch, 2 tokens or more), or not
    `model`'s.
    """
    expect(batches, Iterable, f"a list of {IDS}")
    device = None if model is None else inputs_device(model)
    vocabulary = (
        getattr(model.get_input_embeddings(), "num_embeddings", None) if model else None
    )
    for batch in batches:
        expect(batch, Tensor, IDS)
        if batch.ndim != 2 or batch.is_floating_point() or not len(batch):
            raise UsageError(
                f"give {IDS}, not a tensor of {tuple(batch.shape)},"
                f" {str(batch.dtype).rpartition('.')[2]}"
            )
        if batch.shape[1] < 2:
            raise UsageError(
                "a window of one token predicts nothing: give windows of two tokens or"
                " more"
            )
        for token in map(int, batch.aminmax()):
            if vocabulary is not None and not 0 <= token < vocabulary:
                raise UsageError(
                    f"the model has no token {token:,}, but {vocabulary:,} from 0: use"
                    " its own tokenizer"
                )
        yield batch.to(device=device)


def all_checked(
    batches: Iterable[Tensor], model: PreTrainedModel | None = None
) -> list[Tensor]:
    """`batches`, each `checked`. Raises `UsageError` as `checked` does, and where there
    are none.
    """
    if not (found := list(checked(batches, model))):
        raise UsageError(f"there is no text: give a list of {IDS}")
    return found


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, a line or a `prompt` field of a .jsonl file each; one that
    comes twice is read once.

    Raises `UsageError` where one is none, or all are.
    """
    content = read_file(path, "a file of prompts")
    prompts = (
        fields(path, content, "prompt")
        if path.suffix == ".jsonl"
        else [*filter(str.strip, content.split("\n"))]
    )
    if not prompts:
        raise UsageError(f"{shortened(path)} holds no prompts: give one a line")
    if not all(map(str.strip, prompts)):
        raise UsageError(
            f"{shortened(path)} holds an empty prompt: write one that says something,"
            " or leave it out"
        )
    return [*dict.fromkeys(prompts)]  # every second one judges what the others choose
