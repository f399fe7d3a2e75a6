"""Sampling: the right distribution, the same draw in every batch, and logprobs of the model's own."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from headway.engine.request import SamplingParams
from headway.engine.sampler import BLOCK, HEAD_SIZES, Row, sample, uniform
from headway.errors import InvalidInputError

DRAWS = 4000
LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.0, -1.0, -2.0, -30.0, 1.5])


def frequencies(logits: torch.Tensor, params: SamplingParams, draws: int = DRAWS) -> torch.Tensor:
    """How often each token comes, over draws of one request's stream."""
    rows = [Row(params, seed=11, index=i) for i in range(draws)]
    tokens = [one.token_id for one in sample(logits.expand(draws, -1), rows)]
    return torch.bincount(torch.tensor(tokens), minlength=logits.shape[-1]) / draws


def assert_close(found: torch.Tensor, wanted: torch.Tensor, draws: int = DRAWS) -> None:
    """Within five standard deviations of a binomial, and exactly zero where nothing may come."""
    slack = 5 * (wanted * (1 - wanted) / draws).sqrt()
    assert bool(((found - wanted).abs() <= slack).all()), (found, wanted)


def filtered(probs: torch.Tensor, keep: list[int]) -> torch.Tensor:
    result = torch.zeros_like(probs)
    result[keep] = probs[keep]
    return result / result.sum()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_temperature(temperature: float) -> None:
    wanted = torch.softmax(LOGITS / temperature, dim=-1)
    assert_close(frequencies(LOGITS, SamplingParams(temperature=temperature)), wanted)


@pytest.mark.parametrize("narrow", [{}, {"top_k": 3}, {"top_p": 0.9}], ids=str)
@pytest.mark.parametrize("temperature", [1e-20, 1e-40, 1e-300])
def test_a_temperature_next_to_zero_is_greedy(temperature: float, narrow: dict[str, float]) -> None:
    params = SamplingParams(temperature=temperature, **narrow)  # type: ignore[arg-type]
    wanted = torch.nn.functional.one_hot(torch.tensor(0), 8).float()
    assert torch.equal(frequencies(LOGITS, params, draws=50), wanted)


@pytest.mark.parametrize("temperature", [1e35, 1e300, math.inf])
def test_a_temperature_without_bounds_is_uniform_over_what_may_come(temperature: float) -> None:
    logits = torch.tensor([2.0, -math.inf, 1.0, -5.0])
    found = frequencies(logits, SamplingParams(temperature=temperature))
    assert_close(found, torch.tensor([1 / 3, 0.0, 1 / 3, 1 / 3]))


@pytest.mark.parametrize("narrow", [{}, {"top_k": 3}], ids=str)
@pytest.mark.parametrize("top_p", [1e-10, 1e-40, 1e-300])
def test_a_top_p_next_to_zero_leaves_the_likeliest(top_p: float, narrow: dict[str, int]) -> None:
    wanted = torch.nn.functional.one_hot(torch.tensor(0), 8).float()
    found = frequencies(LOGITS, SamplingParams(top_p=top_p, **narrow), draws=50)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("top_k", [1, 2, 5, 8, 1000])
def test_top_k(top_k: int) -> None:
    # Tokens 1 and 7 tie; a limit between them would be arbitrary, and none of these is.
    order = LOGITS.sort(descending=True, stable=True).indices.tolist()
    keep = order[:top_k]
    if top_k == 2:
        found = frequencies(LOGITS, SamplingParams(top_k=2))
        assert found[0] > 0
        assert (found[1] > 0) != (found[7] > 0)
        return
    wanted = filtered(torch.softmax(LOGITS, dim=-1), keep)
    assert_close(frequencies(LOGITS, SamplingParams(top_k=top_k)), wanted)


@pytest.mark.parametrize(
    ("top_p", "keep"), [(0.05, [0]), (0.75, [0, 1, 7]), (0.9, [0, 1, 7, 2]), (1.0, list(range(8)))]
)
def test_top_p(top_p: float, keep: list[int]) -> None:
    """The smallest set of most likely tokens that has the mass: here .36 .22 .22 .13 .05 .02 .01 0."""
    wanted = filtered(torch.softmax(LOGITS, dim=-1), keep)
    assert_close(frequencies(LOGITS, SamplingParams(top_p=top_p)), wanted)


@pytest.mark.parametrize(("min_p", "keep"), [(0.5, [0, 1, 7]), (0.1, [0, 1, 7, 2, 3]), (1.0, [0])])
def test_min_p(min_p: float, keep: list[int]) -> None:
    wanted = filtered(torch.softmax(LOGITS, dim=-1), keep)
    assert_close(frequencies(LOGITS, SamplingParams(min_p=min_p)), wanted)


def test_one_stop_string_by_itself_is_refused_not_read_letter_by_letter() -> None:
    with pytest.raises(InvalidInputError, match="stop: got END; want a tuple of strings"):
        SamplingParams(stop="END")  # type: ignore[arg-type]


def test_top_p_counts_what_top_k_left() -> None:
    """Of tokens 0, 1, 7 (.45 .27 .27) a mass of .7 needs two, though all three have .8 of the whole."""
    found = frequencies(LOGITS, SamplingParams(top_k=3, top_p=0.7))
    assert int((found > 0).sum()) == 2
    assert found[0] > 0


def test_filters_join() -> None:
    probs = torch.softmax(LOGITS / 2, dim=-1)
    found = frequencies(LOGITS, SamplingParams(temperature=2.0, top_k=5, top_p=0.99, min_p=0.5))
    assert_close(found, filtered(probs, [0, 1, 7, 2]))


def test_top_p_over_a_flat_vocabulary() -> None:
    """Half the mass of 5,000 nearly equal tokens is the first half of them."""
    vocabulary, draws = 5000, 1000
    logits = torch.linspace(0, -1e-3, vocabulary)
    rows = [Row(SamplingParams(top_p=0.5), seed=3, index=i) for i in range(draws)]
    tokens = torch.tensor([one.token_id for one in sample(logits.expand(draws, -1), rows)])
    assert int(tokens.max()) < vocabulary * 0.501
    assert_close((tokens < 1000).float().mean()[None], torch.tensor([0.4]), draws)


@pytest.mark.parametrize("top_k", [*HEAD_SIZES, HEAD_SIZES[-1] + 1])
def test_top_k_of_any_size(top_k: int) -> None:
    vocabulary, draws = 3000, 1000
    logits = torch.linspace(0, -1e-3, vocabulary)[torch.randperm(vocabulary)]
    best = set(logits.topk(top_k).indices.tolist())
    rows = [Row(SamplingParams(top_k=top_k), seed=3, index=i) for i in range(draws)]
    drawn = {one.token_id for one in sample(logits.expand(draws, -1), rows)}
    assert drawn <= best
    assert len(drawn) > min(top_k, draws) / 3


@pytest.mark.parametrize("vocabulary", [16 * BLOCK, 16 * BLOCK + 1, 50 * BLOCK, 50 * BLOCK - 7])
def test_wide_rows(vocabulary: int) -> None:
    """Draws from a wide vocabulary, of which a few spread tokens have all the mass."""
    torch.manual_seed(vocabulary)
    logits = torch.full((vocabulary,), float("-inf"))
    places = [0, BLOCK - 1, BLOCK, vocabulary // 2, vocabulary - 1]
    logits[places] = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5])
    wanted = torch.softmax(logits, dim=-1)
    assert_close(frequencies(logits, SamplingParams()), wanted)
    assert_close(frequencies(logits, SamplingParams(top_p=0.999999)), wanted)


def test_greedy_is_the_largest() -> None:
    logits = torch.randn(5, 300)
    rows = [Row(SamplingParams(temperature=0, top_k=3, min_p=0.2), 0, 0)] * 5
    assert [one.token_id for one in sample(logits, rows)] == logits.argmax(-1).tolist()


KINDS = (
    SamplingParams(temperature=0),
    SamplingParams(),
    SamplingParams(temperature=0.7, min_p=0.05),
    SamplingParams(top_k=40),
    SamplingParams(top_k=500, top_p=0.9),
    SamplingParams(top_p=0.8),
    SamplingParams(top_p=0.999, temperature=3.0),
)


def test_a_draw_does_not_depend_on_the_batch() -> None:
    """In coarse logits, full of ties, too."""
    torch.manual_seed(0)
    logits = (torch.randn(len(KINDS) * 8, 3000) * 3).to(torch.bfloat16)
    rows = [Row(KINDS[i % len(KINDS)], seed=i, index=5) for i in range(len(logits))]
    together = [one.token_id for one in sample(logits, rows)]
    alone = [sample(logits[i : i + 1], [row])[0].token_id for i, row in enumerate(rows)]
    assert together == alone
    order = torch.randperm(len(rows)).tolist()
    shuffled = sample(logits[order], [rows[i] for i in order])
    assert [one.token_id for one in shuffled] == [together[i] for i in order]


def test_seeds_and_positions_give_different_numbers() -> None:
    numbers = [uniform(seed, index) for seed in range(50) for index in range(50)]
    assert len(set(numbers)) == 2500
    assert all(0 <= number < 1 for number in numbers)
    assert abs(sum(numbers) / 2500 - 0.5) < 5 * math.sqrt(1 / 12 / 2500)
    assert uniform(-1, 0) == uniform((1 << 64) - 1, 0)  # any int is a seed


@pytest.mark.parametrize("params", KINDS)
def test_logprobs_are_the_untempered_distribution(params: SamplingParams) -> None:
    logits = torch.randn(3, 100)
    wanted = torch.log_softmax(logits, dim=-1)
    rows = [Row(dataclasses.replace(params, logprobs=n), 1, 0) for n in (0, 2, 5)]
    for i, one in enumerate(sample(logits, rows)):
        assert one.logprob is not None
        assert one.logprob.token_id == one.token_id
        assert one.logprob.logprob == pytest.approx(float(wanted[i, one.token_id]), abs=1e-6)
        values, ids = wanted[i].topk((0, 2, 5)[i])
        assert [token for token, _ in one.logprob.top] == ids.tolist()
        assert [p for _, p in one.logprob.top] == pytest.approx(values.tolist(), abs=1e-6)


def test_logprobs_only_where_asked_for() -> None:
    rows = [Row(SamplingParams(), 0, 0), Row(SamplingParams(logprobs=1), 0, 0)]
    without, with_them = sample(torch.randn(2, 10), rows)
    assert without.logprob is None
    assert with_them.logprob is not None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("params", KINDS)
def test_a_broken_row_leaves_the_others_alone(params: SamplingParams, bad: float) -> None:
    logits = torch.randn(3, 50)
    rows = [Row(params, seed=i, index=0) for i in range(3)]
    wanted = sample(logits, rows)
    logits[1, 7] = bad
    found = sample(logits, rows)
    assert (found[0], found[2]) == (wanted[0], wanted[2])
    assert found[1].error is not None
    assert "not finite" in found[1].error


def test_masked_tokens_never_come() -> None:
    logits = torch.full((64, 10), float("-inf"))
    logits[:, 3] = 0.0
    rows = [Row(KINDS[i % len(KINDS)], seed=i, index=0) for i in range(64)]
    assert {one.token_id for one in sample(logits, rows)} == {3}
