"""What stands in for an MLP that a prompt skips: a linear map of the normalised stream.

A square matrix is a fraction of an MLP's work. Shapes: a stream is (batch, tokens,
hidden).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .weight_swaps import STAND_IN

SQUARE_EPSILON = 1e-6  # of the mean square


def normalised(hidden: Tensor) -> Tensor:
    """Each token of a stream, (..., hidden), divided by its root mean square, in its
    own dtype.
    """
    exact = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    scale = exact.square().mean(-1, keepdim=True).add(SQUARE_EPSILON).rsqrt()
    return (exact * scale).to(hidden.dtype)


class StandIn(nn.Module):
    """Adds M x + b to a stream, where x is the stream, normalised: for a prompt's
    earlier tokens, in the place of an MLP.
    """

    def __init__(self, matrix: Tensor, bias: Tensor, path: str = STAND_IN) -> None:
        super().__init__()
        self.matrix, self.bias = matrix, bias  # (hidden, hidden), (hidden,)
        self.path = path  # of both, below the layer

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> "StandIn":
        """From a plan's `prompt_weights` of one MLP."""
        (path,) = {path.rpartition(".")[0] for path in weights}
        return cls(weights[f"{path}.weight"], weights[f"{path}.bias"], path)

    def forward(self, hidden: Tensor) -> Tensor:
        """What is added to `hidden`; both are (batch, tokens, hidden)."""
        return linear(normalised(hidden), self.matrix, self.bias)

    def added(self, hidden: Tensor, total: Tensor, last: int) -> Tensor:
        """`total`, and for all but the `last` tokens what it makes of `hidden`, (batch,
        tokens, hidden) each.
        """
        early = hidden.shape[1] - last
        made = total[:, :early] + self(hidden[:, :early])
        return torch.cat([made, total[:, early:]], 1)
