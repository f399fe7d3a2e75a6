"""Scheduler: which tokens of which sequences are computed in the next step.

Continuous batching: sequences join and leave at every step. Each running sequence with one token left to
compute decodes; the others, and as many waiting ones as fit, get chunks of their prompts under a common
token budget. When pages run out the newest sequence goes back to the queue and is computed again later
(what the prefix cache still holds of it is not). The oldest sequence can always claim every page, so the
engine never stalls as long as one sequence of full length fits, which ``Scheduler`` insists on.
"""

from __future__ import annotations

import itertools
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from headway.engine.kv_cache import pages_for
from headway.engine.prefix_cache import PrefixCache, extend_digests
from headway.errors import InvalidInputError

#: In the place of a token that the device has drawn and not told yet.
PENDING = -1


#: Guesses at the tokens that follow a sequence.
Propose = Callable[["Sequence"], "tuple[int, ...]"]


@dataclass(eq=False)
class Sequence:
    """One request's tokens and where their keys and values are."""

    request_id: str
    tokens: list[int]  # prompt, then output
    num_prompt_tokens: int
    num_computed: int = 0  # leading tokens whose keys and values are in the cache
    pages: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)  # of the full pages of ``tokens``
    num_inserted: int = 0  # leading pages the prefix cache knows of
    admissions: int = 0  # times it has been given pages; changes whenever they do, but for growth
    cached_tokens: int | None = None  # prompt tokens found in the prefix cache; None until admitted
    limit: int | None = None  # tokens at which it ends, whatever they are
    #: last of ``tokens`` that are drawn but not known yet: PENDING stands for them
    num_pending: int = 0
    is_over: bool = False  # it has its last token, and leaves once that is told
    #: every prompt token's logits are wanted, so none comes from the cache
    reads_prompt: bool = False

    @property
    def is_read(self) -> bool:
        """Whether the logits of all that is computed next are wanted."""
        return self.reads_prompt and self.num_computed < self.num_prompt_tokens

    @property
    def num_remaining(self) -> int:
        return len(self.tokens) - self.num_computed

    @property
    def num_known(self) -> int:
        return len(self.tokens) - self.num_pending

    @property
    def num_output_tokens(self) -> int:
        """Output tokens that are known."""
        return self.num_known - self.num_prompt_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether its last token alone is to be computed, and another one wanted."""
        return self.num_remaining == 1 and not self.is_ending

    @property
    def is_ending(self) -> bool:
        """Whether its last token is drawn, only not known or not told yet."""
        if self.is_over:
            return True
        return self.num_pending > 0 and self.limit is not None and len(self.tokens) >= self.limit


@dataclass(frozen=True)
class Chunk:
    """``num_tokens`` tokens of a sequence, from its first one not computed yet.

    ``drafts`` are the last of them: guesses at what follows the sequence's last token.
    """

    sequence: Sequence
    num_tokens: int
    drafts: tuple[int, ...] = ()

    @property
    def tokens(self) -> list[int]:
        start = self.sequence.num_computed
        own = self.sequence.tokens[start : start + self.num_tokens - len(self.drafts)]
        return [*own, *self.drafts] if self.drafts else own

    @property
    def samples(self) -> bool:
        """Whether it ends with the sequence's last token, whose logits give the next one."""
        return self.num_tokens - len(self.drafts) == self.sequence.num_remaining

    @property
    def takes_pending(self) -> bool:
        """Whether its last token is one that the host does not know yet."""
        return self.sequence.num_pending > 0 and self.samples

    @property
    def num_rows(self) -> int:
        """Rows of logits that are looked at, the last ones of the chunk."""
        if self.sequence.is_read:
            return self.num_tokens
        return (1 if self.samples else 0) + len(self.drafts)


class Scheduler:
    """Keeps the queue and the running set.

    Invariant: running sequences are older than waiting ones, and both are in order of arrival.

    Args:
        max_model_len: longest sequence, in tokens, that will ever be asked for; must fit the pool.
        propose: guesses at what follows a decoding sequence, computed along with its last token.
        most_read: most prompt tokens of a step whose logits are wanted, a row of the vocabulary each.
        uniform_drafts: where a step guesses for anyone, so many guesses for everyone, if there is room:
            graphs want sequences that are alike. A wrong guess costs hardly anything.
    """

    def __init__(
        self,
        cache: PrefixCache,
        *,
        page_size: int,
        max_model_len: int,
        chunked_prefill_size: int,
        max_running_requests: int,
        propose: Propose | None = None,
        most_read: int = sys.maxsize,
        uniform_drafts: int = 0,
    ) -> None:
        if pages_for(max_model_len, page_size) > cache.pool.num_pages:
            raise InvalidInputError(
                "kv_cache_tokens",
                f"{cache.pool.num_pages} pages of {page_size} tokens",
                f"room for one sequence of max_model_len={max_model_len} tokens",
            )
        self.cache = cache
        self.page_size = page_size
        self.chunked_prefill_size = chunked_prefill_size
        self.max_running_requests = max_running_requests
        self._propose = propose
        self._max_model_len = max_model_len
        self.most_read = most_read
        self.uniform_drafts = uniform_drafts
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.forget()

    def forget(self) -> None:
        """Begin to count anew."""
        self.num_preemptions = 0
        self.hit_tokens = 0
        self.query_tokens = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or not; its pages come back."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._release(sequence)

    def schedule(self) -> list[Chunk]:
        """The next step's work: decodes first, then chunks of prompts. Empty only with nothing to do."""
        chunks = self._decodes()
        budget, to_read = self.chunked_prefill_size, self.most_read
        decoding = {chunk.sequence.request_id for chunk in chunks}
        here = [one for one in self.running if one.request_id not in decoding and not one.is_ending]
        for sequence in itertools.chain(here, iter(self._admit, None)):
            tokens = min(budget, sequence.num_remaining)
            if sequence.is_read:
                tokens = min(tokens, to_read)
                to_read -= tokens
            if tokens:
                chunks.append(Chunk(sequence, tokens))
            budget -= tokens
            if not budget:
                break
        return chunks

    def advance(self, chunk: Chunk) -> None:
        """Record that a chunk is computed, or that the device is about to: what is launched later finds
        its keys and values in place. Call it before the next token is appended."""
        chunk.sequence.num_computed += chunk.num_tokens - len(chunk.drafts)
        self.remember(chunk.sequence)

    def remember(self, sequence: Sequence) -> None:
        """Tell the prefix cache of the pages whose tokens are all computed and known."""
        full = min(sequence.num_computed, sequence.num_known) // self.page_size
        if self.cache.enabled and full > sequence.num_inserted:
            self._extend_digests(sequence)
            for index in range(sequence.num_inserted, full):
                self.cache.insert(sequence.pages[index], sequence.digests[index])
            sequence.num_inserted = full

    def _extend_digests(self, sequence: Sequence) -> None:
        extend_digests(sequence.digests, sequence.tokens, self.page_size, sequence.num_known)

    def _decodes(self) -> list[Chunk]:
        """One token for each sequence that is past its prompt, making room by preemption."""
        guesses = self._guesses()
        chunks = []
        index = 0
        while index < len(self.running):  # preemption shortens the list, from its end
            sequence = self.running[index]
            if sequence.is_decoding and self._grow(sequence):
                drafts = self._drafts(sequence, guesses.get(sequence, ()))
                chunks.append(Chunk(sequence, 1 + len(drafts), drafts))
            index += 1
        return chunks

    def _guesses(self) -> dict[Sequence, tuple[int, ...]]:
        """What decoding sequences may say next; as many guesses for each where they have to be alike."""
        if self._propose is None:
            return {}
        decoding = [sequence for sequence in self.running if sequence.is_decoding]
        guesses = {sequence: tuple(self._propose(sequence)) for sequence in decoding}
        if not self.uniform_drafts or not any(guesses.values()):
            return {sequence: self._wanted(sequence, g) for sequence, g in guesses.items()}
        longest = max(len(sequence.tokens) for sequence in decoding)
        if longest + self.uniform_drafts > self._max_model_len:
            return {sequence: self._wanted(sequence, g) for sequence, g in guesses.items()}
        filler = (0,) * self.uniform_drafts
        return {sequence: (*g, *filler)[: self.uniform_drafts] for sequence, g in guesses.items()}

    def _wanted(self, sequence: Sequence, guesses: tuple[int, ...]) -> tuple[int, ...]:
        """Those before the sequence's end."""
        if sequence.limit is None:
            return guesses
        return guesses[: max(0, sequence.limit - len(sequence.tokens) - 1)]

    def _drafts(self, sequence: Sequence, guesses: tuple[int, ...]) -> tuple[int, ...]:
        """The guesses, with the pages they need, if there is room; no one gives way to them."""
        wanted = pages_for(len(sequence.tokens) + len(guesses), self.page_size)
        missing = wanted - len(sequence.pages)
        if not guesses or missing + len(self.running) > self.cache.num_available:
            return ()
        if missing > 0:
            sequence.pages += self.cache.allocate(missing)
        return guesses

    def _grow(self, sequence: Sequence) -> bool:
        """Get the page for the sequence's next token; false if the sequence itself had to go."""
        missing = pages_for(len(sequence.tokens), self.page_size) - len(sequence.pages)
        while missing > self.cache.num_available:
            newest = self.running[-1]
            self._preempt(newest)
            if newest is sequence:
                return False
        if missing > 0:
            sequence.pages += self.cache.allocate(missing)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self.cache.release(sequence.pages)
        sequence.pages = []
        sequence.num_computed = sequence.num_inserted = 0

    def _admit(self) -> Sequence | None:
        """Move the head of the queue into the running set, with pages for all its tokens, if it can be."""
        if not self.waiting or len(self.running) >= self.max_running_requests:
            return None
        sequence = self.waiting[0]
        if sequence.num_pending:  # preempted with a token under way
            return None
        wanted = self._wanted_digests(sequence)
        cached = self.cache.acquire(wanted)
        missing = pages_for(len(sequence.tokens), self.page_size) - len(cached)
        # One spare page for each running sequence: admitting into the last pages would only preempt.
        if missing + len(self.running) > self.cache.num_available or self._being_computed(
            wanted, len(cached)
        ):
            self.cache.release(cached)
            return None
        self.waiting.popleft()
        sequence.pages = cached + self.cache.allocate(missing)
        sequence.num_computed = len(cached) * self.page_size
        sequence.num_inserted = len(cached)
        sequence.admissions += 1
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.num_computed
            self.hit_tokens += sequence.num_computed
            self.query_tokens += sequence.num_prompt_tokens
        self.running.append(sequence)
        return sequence

    def _wanted_digests(self, sequence: Sequence) -> list[bytes]:
        """Digests of the pages worth looking up: at least one token must be left to compute."""
        if not self.cache.enabled or sequence.reads_prompt:
            return []
        self._extend_digests(sequence)
        return sequence.digests[: (len(sequence.tokens) - 1) // self.page_size]

    def _being_computed(self, wanted: list[bytes], page: int) -> bool:
        """Whether a running sequence is about to fill the page this one needs next.

        Waiting for it a step or more computes a shared prefix once instead of side by side.
        """
        if page >= len(wanted):
            return False
        return any(
            other.num_inserted <= page < len(other.digests) and other.digests[page] == wanted[page]
            for other in self.running
        )
