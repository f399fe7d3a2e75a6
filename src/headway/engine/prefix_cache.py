"""Prefix cache: full pages are found again by the tokens that lead up to them.

A page's digest covers its own tokens and, through its parent's digest, every token before them, so equal
digests mean equal keys and values. Pages stay findable after their last sequence has gone; when the pool
runs dry the least recently used of those give way. The cache is therefore also the engine's allocator:
everything that takes or gives back a page goes through it.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from headway.engine.kv_cache import OutOfPagesError, PagePool

ROOT = b""


def page_digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Digest of a full page holding ``tokens`` behind the page (chain) whose digest is ``parent``."""
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


def extend_digests(
    digests: list[bytes], tokens: Sequence[int], page_size: int, length: int | None = None
) -> None:
    """Append the digests of the full pages of ``tokens``, or of the first ``length`` of them, that
    ``digests`` does not cover yet."""
    for page in range(len(digests), (len(tokens) if length is None else length) // page_size):
        parent = digests[-1] if digests else ROOT
        digests.append(page_digest(parent, tokens[page * page_size : (page + 1) * page_size]))


class PrefixCache:
    """Takes pages from a pool, remembers what full ones hold, and evicts when pages are wanted.

    With ``enabled=False`` nothing is remembered and it is a plain allocator.
    """

    def __init__(self, pool: PagePool, *, enabled: bool = True) -> None:
        self.pool = pool
        self.enabled = enabled
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_available(self) -> int:
        """Pages that could be allocated now: free ones and remembered ones that nobody holds."""
        return self.pool.num_free + len(self._idle)

    @property
    def num_used(self) -> int:
        """Pages that sequences hold."""
        return self.pool.num_pages - self.num_available

    def acquire(self, digests: Sequence[bytes]) -> list[int]:
        """The pages of the longest known prefix of a chain of digests, each held once more."""
        pages = []
        for digest in digests:
            page = self._page_of.get(digest)
            if page is None:
                break
            self._idle.pop(page, None)
            self.pool.retain(page)
            pages.append(page)
        return pages

    def allocate(self, count: int) -> list[int]:
        """``count`` pages of undefined content, each held once; all of them or OutOfPagesError."""
        if count > self.num_available:
            raise OutOfPagesError(f"{count} pages wanted, {self.num_available} available")
        while self.pool.num_free < count:
            self._evict()
        return [self.pool.take() for _ in range(count)]

    def release(self, pages: Sequence[int]) -> None:
        """Give up a sequence's hold on its pages, in their order in the sequence.

        The last pages become evictable first: without its parent a page cannot be found.
        """
        for page in reversed(pages):
            if not self.pool.release(page):
                continue
            if page in self._digest_of:
                self._idle[page] = None
            else:
                self.pool.reclaim(page)

    def insert(self, page: int, digest: bytes) -> None:
        """Remember that a held page, now full, has this digest. The first page of a digest stays."""
        if self.enabled and digest not in self._page_of:
            self._page_of[digest] = page
            self._digest_of[page] = digest

    def clear(self) -> None:
        """Forget everything; pages that nobody holds become free."""
        for page in self._idle:
            self.pool.reclaim(page)
        self._idle.clear()
        self._page_of.clear()
        self._digest_of.clear()

    def _evict(self) -> None:
        page, _ = self._idle.popitem(last=False)
        del self._page_of[self._digest_of.pop(page)]
        self.pool.reclaim(page)
