"""What goes into a model: batches of token ids, checked before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from ..errors import UsageError, expect

IDS = "token ids as tensors of (batch, tokens), such as tokenizer(text, return_tensors='pt')['input_ids']"


def checked(batches: Iterable[Tensor], model: nn.Module | None = None) -> Iterator[Tensor]:
    """`batches` one by one, each checked.

    Raises `UsageError` for what are no token ids, (batch, tokens) of two tokens at least, and for ids that `model`
    has no row for.
    """
    expect(batches, Iterable, f"a list of {IDS}")
    vocabulary = getattr(model.get_input_embeddings(), "num_embeddings", None) if model else None  # type: ignore[operator]
    for batch in batches:
        expect(batch, Tensor, IDS)
        if batch.ndim != 2 or batch.is_floating_point() or not len(batch):
            raise UsageError(f"give {IDS}, not a tensor of {tuple(batch.shape)}, {str(batch.dtype).rpartition('.')[2]}")
        if batch.shape[1] < 2:
            raise UsageError("a window of one token predicts nothing: give windows of two tokens or more")
        least, most = map(int, batch.aminmax())
        for token in (least, most):
            if vocabulary is not None and not 0 <= token < vocabulary:
                raise UsageError(f"the model has no token {token:,}, but {vocabulary:,} from 0: use its own tokenizer")
        yield batch


def all_checked(batches: Iterable[Tensor], model: nn.Module | None = None) -> list[Tensor]:
    """`batches`, each checked. Raises `UsageError` as `checked` does, and where there are none."""
    found = list(checked(batches, model))
    if not found:
        raise UsageError(f"there is no text: give a list of {IDS}")
    return found
