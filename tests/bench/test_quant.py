"""The emulation behind the table of float8 errors: its roundings, its sums, and what the table shows."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import headway
from headway import quant as scales
from headway.bench import quant
from headway.bench.report import Reading

ROOT = Path(__file__).parents[2]
READING = ROOT / "benchmarks" / "results" / "cpu" / "quantisation.json"
PAGE = ROOT / "docs" / "quantisation.md"


def scheme(name: str) -> quant.Scheme:
    return next(one for one in quant.SCHEMES if one.name == name)


# --- roundings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["cast", "tensor", "head", "block"])
def test_inputs_are_rounded_as_the_format_does(per: str) -> None:
    """Half a unit of three bits, or of the smallest step under the scale."""
    x = quant.draw(300).v
    back = quant._rounded(x, per)
    largest = {
        "cast": torch.full((8, 1, 1), 448.0),
        "tensor": x.abs().amax().expand(8, 1, 1),
        "head": x.abs().amax((1, 2), keepdim=True),
        "block": torch.cat(
            [p.abs().amax((1, 2), keepdim=True).expand(-1, p.shape[1], 1) for p in x.split(128, 1)],
            1,
        ),
    }[per]
    step = largest / 448 * 2.0**-9
    assert ((back - x).abs() <= torch.maximum(x.abs() / 16, step / 2) * 1.00001).all()


def test_a_float8_cache_is_the_librarys_own() -> None:
    """The same rounding as attention over a cache that headway.quant made, but for bfloat16 weights."""
    data = quant.draw(400)
    k, v = (scales.quantise(t.transpose(0, 1).bfloat16(), per="head") for t in (data.k, data.v))
    out = headway.flash_attn_with_kvcache(
        data.q.transpose(0, 1)[None].bfloat16(),
        k.values[None],
        v.values[None],
        k_descale=k.scale[None],
        v_descale=v.scale[None],
        out=torch.empty(1, 2, 8, 128),
        backend="reference",
    )
    assert isinstance(out, Tensor)
    got = quant.attend(data, scheme("float8 cache, per head"))
    _, worst = quant.errors(got, out[0].transpose(0, 1).double())
    assert worst < 2e-3


def test_weights_keep_three_bits_down_to_the_smallest_normal() -> None:
    weights = torch.logspace(-13, 0, 1000, base=2.0, dtype=torch.float64)
    float8 = quant._weights(weights, scheme("all float8, per head"))
    assert ((float8 - weights).abs() <= weights / 16).all()


# --- sums -----------------------------------------------------------------------------------------------


def cut_sum(terms: list[float]) -> Fraction:
    """The definition: every term cut 13 bits below the largest one's leading bit, then an exact sum."""
    largest = max(abs(Fraction(term)) for term in terms)
    if not largest:
        return Fraction(0)
    unit = Fraction(1)
    while unit > largest:
        unit /= 2
    while unit * 2 <= largest:
        unit *= 2
    unit /= 2**13
    return sum((int(Fraction(term) / unit) * unit for term in terms), Fraction(0))


def test_a_step_of_a_tensor_core_cuts_at_a_common_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    size = torch.exp2(torch.randint(-12, 4, (50, 33, 1), generator=generator).float())
    terms = (torch.randn(50, 33, 3, generator=generator) * size).to(quant.FLOAT8).float()
    terms[0] = 0
    got = quant._step(terms[:, 0], terms[:, 1:])
    for i in range(50):
        for j in range(3):
            assert Fraction(got[i, j].item()) == cut_sum(terms[i, :, j].tolist())


def test_small_addends_are_lost_in_one_long_sum_and_not_in_two_levels() -> None:
    """Equal weights and values: each step adds less than the sum so far can hold."""
    n = 32 * 1024
    data = quant.Heads(
        torch.zeros(1, 1, 128, dtype=torch.float64),
        torch.zeros(1, n, 128, dtype=torch.float64),
        torch.ones(1, n, 128, dtype=torch.float64),
    )
    one = quant.attend(data, scheme("all float8, per head, tensor core's sums"))
    two = quant.attend(data, scheme("all float8, per head, two-level sums"))
    assert one.max() < 0.6, "16,384 terms are all that such a sum holds"
    torch.testing.assert_close(two, torch.ones_like(two))


# --- the command and the page ---------------------------------------------------------------------------


def test_the_command_measures_every_scheme_and_writes_a_reading(tmp_path: Path) -> None:
    from headway import cli

    path = tmp_path / "reading.json"
    words = ["bench", "quant", "--contexts", "128,300", "--seeds", "1", "--output", str(path)]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.output
    rows = Reading.load(path).results
    assert [(row["context"], row["name"]) for row in rows] == [
        (n, one.name) for n in (128, 300) for one in quant.SCHEMES
    ]
    assert all(0 < row["error"] <= row["worst_head_error"] < 0.2 for row in rows)
    assert all(one.name in result.output for one in quant.SCHEMES)


def test_the_page_quotes_its_reading() -> None:
    _, _, rest = PAGE.read_text(encoding="utf-8").partition("<!-- table: begin -->\n")
    quoted, _, _ = rest.partition("\n<!-- table: end -->")
    assert quoted == quant.table(Reading.load(READING).results)


def test_the_reading_shows_what_the_page_says() -> None:
    error = {(r["name"], r["context"]): r["error"] for r in Reading.load(READING).results}
    contexts = sorted({context for _, context in error})
    assert (contexts[0], contexts[-1]) == (1024, 131072)
    for n in contexts:
        exact = error["all float8, per head", n]
        assert error["all float8, per head, two-level sums", n] == pytest.approx(exact, rel=0.11)
        assert error["float8 cache, per head", n] < error["float8 cache, a scale per tensor", n]
    longest = contexts[-1]
    lost = error["all float8, per head, tensor core's sums", longest]
    assert lost > 5 * error["all float8, per head", longest]


def test_the_example_of_the_page_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    namespace: dict[str, object] = {}
    exec(compile(code, "docs/quantisation.md", "exec"), namespace)
    out = namespace["out"]
    assert isinstance(out, Tensor)
    assert out.isfinite().all()
