"""Where keys and values live: one pair of tensors per layer, cut into pages that sequences share.

A page holds the keys and values of ``page_size`` consecutive tokens of one sequence, in every layer; all
layers use the same page numbers. Pages are counted: several sequences may refer to one page, and only
the last release makes it reusable.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headway.errors import HeadwayError, InvalidInputError


class OutOfPagesError(HeadwayError):
    """More pages are wanted than are free. The scheduler makes room; it never reaches a user."""


@dataclass(frozen=True)
class KVShape:
    """What one layer stores per token: keys (num_kv_heads, head_dim), values (num_kv_heads, head_dim_v).

    ``shared``: values are the first columns of the keys, as in latent attention, and stored once.
    """

    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    shared: bool = False

    @property
    def elements_per_token(self) -> int:
        return self.num_kv_heads * (self.head_dim + (0 if self.shared else self.head_dim_v))


class KVCache:
    """The tensors: per layer k (num_pages, page_size, Hkv, D) and v (num_pages, page_size, Hkv, Dv).

    Pages start with undefined content: on a CPU, memory is taken only as pages are written.
    """

    def __init__(
        self,
        shapes: Sequence[KVShape],
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_pages = num_pages
        self.page_size = page_size

        def pages(heads: int, dim: int) -> Tensor:
            return torch.empty(num_pages, page_size, heads, dim, dtype=dtype, device=device)

        def pair(shape: KVShape) -> tuple[Tensor, Tensor]:
            keys = pages(shape.num_kv_heads, shape.head_dim)
            if shape.shared:
                return keys, keys[..., : shape.head_dim_v]
            return keys, pages(shape.num_kv_heads, shape.head_dim_v)

        self.layers: tuple[tuple[Tensor, Tensor], ...] = tuple(pair(shape) for shape in shapes)


def bytes_per_token(shapes: Sequence[KVShape], dtype: torch.dtype) -> int:
    """Bytes that one token's keys and values take in all layers together."""
    return sum(shape.elements_per_token for shape in shapes) * dtype.itemsize


def pages_for(num_tokens: int, page_size: int) -> int:
    """How many pages hold that many tokens."""
    return -(-num_tokens // page_size)


class PagePool:
    """Page numbers 0 .. num_pages - 1 with reference counts.

    A page is free, held (count at least 1), or idle: count 0, yet kept out of the free list by whoever
    released it, until ``reclaim``.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise InvalidInputError("num_pages", num_pages, "at least 1")
        self.num_pages = num_pages
        self._references = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def references(self, page: int) -> int:
        return self._references[page]

    def take(self) -> int:
        """A free page, now held once."""
        if not self._free:
            raise OutOfPagesError(f"all {self.num_pages} pages are in use")
        page = self._free.pop()
        self._references[page] = 1
        return page

    def retain(self, page: int) -> None:
        """One more reference to a held or idle page."""
        self._references[page] += 1

    def release(self, page: int) -> bool:
        """One reference less; true when it was the last. The page is then idle: reclaim it, or keep it."""
        if self._references[page] < 1:
            raise HeadwayError(f"page {page} was released more often than it was taken")
        self._references[page] -= 1
        return self._references[page] == 0

    def reclaim(self, page: int) -> None:
        """Make an idle page free."""
        if self._references[page]:
            raise HeadwayError(f"page {page} is still held {self._references[page]} times")
        self._free.append(page)

    def free_pages(self) -> Iterable[int]:
        return tuple(self._free)
