"""Steps that prefill, in pieces: what plain layers compute between their attention calls, as CUDA graphs.

Launched kernel by kernel, the layers of a small model take the host longer than some hundred tokens take
the device. What an attention call launches depends on which tokens belong together, so it is launched anew
in every step. Products, norms and activations depend on the number of rows alone: they are captured for
some numbers of rows, in memory that all layers share. A step of fewer tokens computes on padding, at which
nobody looks.

Steps of some thousand tokens are launched as fast as they are computed, and padding would cost more than
it saves. The exception is a step as large as steps get: under load most are, little of it is padding, and
a busy host takes longer to launch it than the device to compute it.
"""

from __future__ import annotations

import bisect
import functools
import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from headway.engine.fused_layer import FusedLayer
from headway.engine.graphs import Record
from headway.engine.trial import grown_alike, queries_and_keys

logger = logging.getLogger(__name__)

#: Most tokens of a step that always runs in pieces: a larger one keeps a GPU busy for as long as the host.
MOST_ROWS = 2048

#: Full steps: how far they are filled at least, and the most bytes that pieces of them may take. A model
#: that takes more has layers so wide that the device is the slower one anyway.
FULL = 7 / 8
MOST_BYTES = 1 << 30
#: Of the memory that is free beside the KV cache: the rest is for steps that run whole, and for sampling.
SHARE = 1 / 4


def row_counts(most: int, row_bytes: int = 0, free_bytes: float = math.inf) -> list[int]:
    """Numbers of rows worth graphs of their own, where no step has more than ``most`` tokens: from 16 to
    MOST_ROWS, each up to twice the one before; ``most``, where it is larger, if there is memory for it.

    Args:
        row_bytes: what a row takes; free_bytes: memory beside the KV cache.
    """
    counts = [16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, MOST_ROWS]
    if most * row_bytes > min(MOST_BYTES, SHARE * free_bytes):
        most = min(most, MOST_ROWS)
    return [*(count for count in counts if count < most), max(most, counts[0])]


def plain_layers(model: nn.Module) -> list[FusedLayer]:
    """The layers that were exchanged for plain ones, in order."""
    exchanged = (vars(module).get("forward") for module in model.modules())
    return [forward for forward in exchanged if isinstance(forward, FusedLayer)]


class Pieces:
    """What lies between the attention calls of a model's layers, for steps of up to MOST_ROWS tokens, and
    for those that nearly fill ``counts[-1]`` rows.

    Args:
        layers: all of the model's, in order, with products of the same sizes.
        counts: numbers of rows to capture, ascending.
        record: how a piece is captured.
    """

    def __init__(self, layers: Sequence[FusedLayer], counts: Sequence[int], record: Record) -> None:
        self._layers = list(layers)
        self._counts = list(counts)
        self._record = record
        self._after = {layer: place for place, layer in enumerate(self._layers, 1)}
        like, most = self._layers[0].weight, self._counts[-1]
        width, qkv_width, attended_width = self._layers[0].sizes
        self._hidden = like.new_zeros(1, most, width)
        self._qkv = like.new_zeros(most, qkv_width)
        self._attended = like.new_zeros(most, attended_width)
        #: by number of rows: the first layer's beginning, then what follows each layer's attention
        self._replays: dict[int, list[Callable[[], Tensor]]] = {}
        self._tokens = self._rows = 0

    @torch.inference_mode()
    def capture(self, advance: Callable[[], None] = lambda: None) -> None:
        """Capture every number of rows, the largest first, so that the others fit into its memory."""
        for rows in reversed(self._counts):
            self._replays[rows] = [
                self._record(functools.partial(self._piece, place, rows))
                for place in range(len(self._layers) + 1)
            ]
            advance()

    def _piece(self, place: int, rows: int) -> Tensor:
        hidden = self._hidden[0, :rows]
        if place > 0:
            self._layers[place - 1].finish(hidden, self._attended[:rows])
        if place < len(self._layers):
            self._layers[place].project(hidden, self._qkv[:rows])
        return hidden

    def rows_for(self, num_tokens: int) -> int | None:
        """Rows that such a step computes; None where pieces do not suit its size."""
        found = bisect.bisect_left(self._counts, num_tokens)
        if found == len(self._counts):
            return None
        rows = self._counts[found]
        return rows if rows <= MOST_ROWS or num_tokens >= FULL * rows else None

    def begin(self, num_tokens: int) -> None:
        """A step of so many tokens begins."""
        rows = self.rows_for(num_tokens)
        assert rows is not None
        self._tokens, self._rows = num_tokens, rows

    def before(self, layer: FusedLayer, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's hidden states (1, rows, width) where they stay, its q, k and v of the tokens, and
        where attention's results (tokens, heads * head_dim) belong."""
        hidden = self._hidden[:, : self._rows]
        if layer is self._layers[0]:
            hidden.copy_(hidden_states)
            self._replays[self._rows][0]()
        return hidden, self._qkv[: self._tokens], self._attended[: self._tokens]

    def after(self, layer: FusedLayer) -> None:
        """Go on from attention to the next layer's, or to the end."""
        self._replays[self._rows][self._after[layer]]()


@torch.inference_mode()
def pieces_of(
    model: nn.Module,
    counts: Sequence[int],
    record: Record,
    advance: Callable[[], None] = lambda: None,
) -> Pieces | None:
    """Captured pieces of a model, for these numbers of rows.

    None where not all of its layers with attention are plain, they cannot share memory, or a trial says
    that the model does not run through them one after the other.
    """
    layers = plain_layers(model)
    wanted = queries_and_keys(model)
    if 3 * len(layers) != len(wanted) or len({layer.sizes for layer in layers}) != 1:
        return None
    pieces = Pieces(layers, counts, record)
    pieces.capture(advance)
    if grown_alike(wanted, queries_and_keys(model, pieces)):
        return pieces
    logger.warning("prefill runs without CUDA graphs: in pieces the model attends with other keys")
    return None
