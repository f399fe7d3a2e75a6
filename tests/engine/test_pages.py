"""Page pool, prefix cache and scheduler: no page is lost, none is given out twice, nobody starves."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from headway.engine.kv_cache import OutOfPagesError, PagePool, pages_for
from headway.engine.prefix_cache import PrefixCache, extend_digests
from headway.engine.scheduler import Chunk, Scheduler, Sequence
from headway.errors import HeadwayError, InvalidInputError


def test_pool_gives_each_page_once() -> None:
    pool = PagePool(4)
    assert sorted(pool.take() for _ in range(4)) == [0, 1, 2, 3]
    with pytest.raises(OutOfPagesError, match="all 4 pages"):
        pool.take()


def test_pool_counts_references() -> None:
    pool = PagePool(2)
    page = pool.take()
    pool.retain(page)
    assert not pool.release(page)
    assert pool.release(page)
    with pytest.raises(HeadwayError, match="released more often"):
        pool.release(page)
    pool.reclaim(page)
    assert pool.num_free == 2


def test_pool_refuses_to_reclaim_a_held_page() -> None:
    pool = PagePool(1)
    with pytest.raises(HeadwayError, match="still held"):
        pool.reclaim(pool.take())


def digests_of(tokens: list[int], page_size: int = 4) -> list[bytes]:
    digests: list[bytes] = []
    extend_digests(digests, tokens, page_size)
    return digests


def test_digest_covers_everything_before_the_page() -> None:
    a, b = digests_of([1, 2, 3, 4, 5, 6, 7, 8]), digests_of([0, 2, 3, 4, 5, 6, 7, 8])
    assert len(a) == 2
    assert a[0] != b[0]
    assert a[1] != b[1]
    assert digests_of([1, 2, 3, 4, 9])[0] == a[0]


def test_digests_grow_with_the_tokens() -> None:
    tokens = list(range(11))
    digests = digests_of(tokens[:6])
    extend_digests(digests, tokens, 4)
    assert digests == digests_of(tokens)


def remember(cache: PrefixCache, tokens: list[int]) -> list[int]:
    """Take pages for tokens, insert them, and return them still held."""
    digests = digests_of(tokens)
    pages = cache.allocate(len(digests))
    for page, digest in zip(pages, digests, strict=True):
        cache.insert(page, digest)
    return pages


def test_released_pages_are_found_again() -> None:
    cache = PrefixCache(PagePool(8))
    pages = remember(cache, list(range(12)))
    cache.release(pages)
    assert cache.num_available == 8
    assert cache.acquire(digests_of([*range(8), 99, 98, 97, 96])) == pages[:2]
    assert cache.num_used == 2


def test_eviction_takes_the_least_recently_used_and_the_ends_of_chains_first() -> None:
    cache = PrefixCache(PagePool(6))
    old, new = remember(cache, list(range(12))), remember(cache, list(range(50, 62)))
    cache.release(old)
    cache.release(new)
    assert set(cache.allocate(2)) == set(old[1:])
    assert cache.acquire(digests_of(list(range(12)))) == old[:1]
    assert cache.acquire(digests_of(list(range(50, 62)))) == new


def test_held_pages_are_never_evicted() -> None:
    cache = PrefixCache(PagePool(3))
    remember(cache, list(range(8)))
    cache.allocate(1)
    with pytest.raises(OutOfPagesError, match="1 pages wanted, 0 available"):
        cache.allocate(1)


def test_the_same_content_twice_keeps_the_first_page() -> None:
    cache = PrefixCache(PagePool(4))
    first, second = remember(cache, [1, 2, 3, 4]), remember(cache, [1, 2, 3, 4])
    cache.release(second)
    assert cache.pool.num_free == 3
    assert cache.acquire(digests_of([1, 2, 3, 4])) == first


def test_disabled_cache_remembers_nothing() -> None:
    cache = PrefixCache(PagePool(4), enabled=False)
    cache.release(remember(cache, list(range(8))))
    assert cache.pool.num_free == 4
    assert cache.acquire(digests_of(list(range(8)))) == []


def test_clear_frees_what_nobody_holds() -> None:
    cache = PrefixCache(PagePool(4))
    held = remember(cache, [1, 2, 3, 4])
    cache.release(remember(cache, [5, 6, 7, 8]))
    cache.clear()
    assert cache.pool.num_free == 3
    cache.release(held)
    assert cache.pool.num_free == 4


def scheduler(
    pages: int = 16, *, page_size: int = 4, enabled: bool = True, **more: int
) -> Scheduler:
    limits = {"max_model_len": 32, "chunked_prefill_size": 8, "max_running_requests": 8, **more}
    return Scheduler(PrefixCache(PagePool(pages), enabled=enabled), page_size=page_size, **limits)


def sequence(name: str, tokens: list[int]) -> Sequence:
    return Sequence(name, list(tokens), len(tokens))


def run(chunks: list[Chunk], owner: Scheduler, next_token: int = 7) -> None:
    """What the engine does with a step, less the model."""
    for chunk in chunks:
        samples = chunk.samples
        owner.advance(chunk)
        if samples:
            chunk.sequence.tokens.append(next_token)


def sizes(chunks: list[Chunk]) -> list[tuple[str, int]]:
    return [(chunk.sequence.request_id, chunk.num_tokens) for chunk in chunks]


def test_prompts_are_cut_to_the_budget_and_mixed_with_decodes() -> None:
    owner = scheduler(enabled=False)
    owner.add(sequence("a", list(range(5))))
    owner.add(sequence("b", list(range(20))))
    steps = []
    for _ in range(4):
        chunks = owner.schedule()
        steps.append(sizes(chunks))
        run(chunks, owner)
    assert steps == [
        [("a", 5), ("b", 3)],
        [("a", 1), ("b", 8)],
        [("a", 1), ("b", 8)],
        [("a", 1), ("b", 1)],
    ]


def test_a_pool_too_small_for_the_longest_sequence_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"kv_cache_tokens.*max_model_len=32"):
        scheduler(pages=7)


def test_the_newest_sequence_makes_room() -> None:
    owner = scheduler(pages=8, enabled=False, chunked_prefill_size=64)
    old, new = sequence("old", list(range(12))), sequence("new", list(range(11)))
    owner.add(old)
    owner.add(new)
    while owner.num_preemptions == 0:
        run(owner.schedule(), owner)
    assert owner.running == [old]
    assert list(owner.waiting) == [new]
    assert new.pages == []
    assert new.num_computed == 0
    assert len(new.tokens) > 11  # what it has said stays said


class EngineWithoutModel(RuleBasedStateMachine):
    """Random arrivals, steps, ends and aborts, over a small vocabulary so that prefixes collide."""

    PAGES = 12
    PAGE_SIZE = 4
    LIMIT = 40

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.live: dict[str, Sequence] = {}

    @rule(enabled=st.booleans())
    @precondition(lambda self: not hasattr(self, "owner"))
    def start(self, enabled: bool) -> None:
        self.owner = scheduler(
            self.PAGES,
            enabled=enabled,
            max_model_len=self.LIMIT,
            chunked_prefill_size=6,
            max_running_requests=4,
        )

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=30))
    @precondition(lambda self: hasattr(self, "owner"))
    def arrive(self, tokens: list[int]) -> None:
        self.count += 1
        one = sequence(str(self.count), tokens)
        self.live[one.request_id] = one
        self.owner.add(one)

    @rule(token=st.integers(0, 1), end=st.integers(0, 5))
    @precondition(lambda self: hasattr(self, "owner"))
    def step(self, token: int, end: int) -> None:
        chunks = self.owner.schedule()
        assert bool(chunks) == bool(self.live), "a step without work while requests wait"
        assert len({chunk.sequence.request_id for chunk in chunks}) == len(chunks)
        for chunk in chunks:
            held = len(chunk.sequence.pages) * self.PAGE_SIZE
            assert chunk.sequence.num_computed + chunk.num_tokens <= held
        run(chunks, self.owner, token)
        for number, chunk in enumerate(chunks):
            full = len(chunk.sequence.tokens) >= self.LIMIT
            if full or (number == end and chunk.sequence.num_output_tokens):
                self.owner.remove(self.live.pop(chunk.sequence.request_id))

    @rule(pick=st.randoms(use_true_random=False))
    @precondition(lambda self: getattr(self, "live", None))
    def abort(self, pick: random.Random) -> None:
        self.owner.remove(self.live.pop(pick.choice(sorted(self.live))))

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        if not hasattr(self, "owner"):
            return
        pool, cache = self.owner.cache.pool, self.owner.cache
        held: dict[int, int] = {}
        for one in self.live.values():
            assert len(set(one.pages)) == len(one.pages)
            assert len(one.pages) >= pages_for(one.num_computed, self.PAGE_SIZE)
            for page in one.pages:
                held[page] = held.get(page, 0) + 1
        assert all(pool.references(page) == held.get(page, 0) for page in range(self.PAGES))
        free = list(pool.free_pages())
        assert len(set(free)) == len(free)
        assert not set(free) & set(held)
        assert cache.num_used == len(held)

    @invariant()
    def shared_pages_hold_the_same_tokens(self) -> None:
        content: dict[int, tuple[int, ...]] = {}
        for one in self.live.values():
            for index, page in enumerate(one.pages):
                end = (index + 1) * self.PAGE_SIZE
                if end <= one.num_computed:
                    assert content.setdefault(page, tuple(one.tokens[:end])) == tuple(
                        one.tokens[:end]
                    )

    @invariant()
    def the_oldest_runs_first(self) -> None:
        if hasattr(self, "owner"):
            order = [int(s.request_id) for s in (*self.owner.running, *self.owner.waiting)]
            assert order == sorted(order)
            assert sorted(map(int, self.live)) == order

    def teardown(self) -> None:
        if hasattr(self, "owner"):
            for one in list(self.live.values()):
                self.owner.remove(one)
            assert self.owner.cache.num_available == self.PAGES


TestEngineWithoutModel = EngineWithoutModel.TestCase
TestEngineWithoutModel.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    outputs=st.integers(1, 10),
    pages=st.integers(10, 20),
    enabled=st.booleans(),
)
def test_everyone_finishes(lengths: list[int], outputs: int, pages: int, enabled: bool) -> None:
    """However small the pool, as long as one sequence fits, all get their tokens in bounded time."""
    owner = scheduler(pages, enabled=enabled, max_model_len=40)
    for name, length in enumerate(lengths):
        owner.add(sequence(str(name), [name % 3] * length))
    for _ in range(sum(lengths) * 20 + len(lengths) * outputs * 20):
        chunks = owner.schedule()
        run(chunks, owner)
        for chunk in chunks:
            if chunk.sequence.num_output_tokens >= outputs:
                owner.remove(chunk.sequence)
        if not owner.running and not owner.waiting:
            break
    assert not owner.running
    assert not owner.waiting
    assert owner.cache.num_used == 0
