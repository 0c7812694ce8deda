"""How far a step moves each column of a matrix: as far as the size of its input bears.

A step of AdamW moves every weight by about the rate, whatever it is multiplied by. Where
all of a row's weights move with the signs of their inputs, the output moves by the rate
times the sum of the inputs' sizes, which with 8,960 inputs is a multiple of the output
itself. So weights are trained in whitened coordinates: each column is divided by its
rate, and moves by as much as it is multiplied by.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .projections import is_matrix

# the sum of the sizes of a matrix's inputs, over its output's, that the full rate suits:
# the default model's output projections have 65 to 190
USUAL = 100.0
LEAST = 0.5  # of the mean size: what is silent on these tokens need not be on others


Matrices = Mapping[str, nn.Linear | Conv1D]


def matrices_of(model: nn.Module, paths: Collection[str]) -> Matrices:
    """The modules whose weights are the parameters at `paths`, by these, where they are
    plain matrices.
    """
    return {
        path: module
        for name, module in model.named_modules()
        if (path := f"{name}.weight") in paths and is_matrix(module)
    }


@torch.no_grad()
def column_rates(matrices: Matrices, run: Callable[[], object]) -> dict[str, Tensor]:
    """Of each matrix the rate of each of its columns, as a factor of at most 1:
    (inputs,), or as its weight has them (inputs, 1).

    `run` calls the model with some text. Factors are powers of 2, so that what is
    divided by them and multiplied again is exactly what it was.
    """
    sizes: dict[str, Tensor] = {}
    with _watched(matrices, sizes):
        run()
    return {
        path: _rates(sizes[path], is_turned=isinstance(one, Conv1D))
        for path, one in matrices.items()
        if path in sizes
    }


@contextmanager
def _watched(matrices: Matrices, sizes: dict[str, Tensor]) -> Iterator[None]:
    """While the model runs, keep in `sizes` the mean squares of inputs, (inputs,), each
    token relative to its output.
    """

    def hook(path: str) -> Callable[..., None]:
        def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            given, answer = args[0].flatten(0, -2), output.flatten(0, -2)
            ratios = given.float().square() / answer.float().square().mean(-1, True)
            # of a token whose output is none, nothing can be said
            ratios = ratios[ratios.isfinite().all(-1)]
            if len(ratios):
                sizes[path] = ratios.mean(0)

        return keep

    with ExitStack() as hooks:
        for path, module in matrices.items():
            hooks.enter_context(module.register_forward_hook(hook(path)))
        yield


def _rates(squares: Tensor, *, is_turned: bool) -> Tensor:
    sizes = squares.sqrt()
    sizes = sizes.clamp_min(LEAST * sizes.mean()).clamp_min(1e-6)
    rates = (USUAL / (len(sizes) * sizes)).clamp_max(1.0)
    powers = rates.log2().round().exp2()
    return powers[:, None] if is_turned else powers
