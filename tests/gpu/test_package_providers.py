"""Every provider that is installed, on a real device: what it claims is shown, the rest is refused.

The calls are those of tests/providers/test_features.py, which shows the same on stand-ins. Packages that
compile on first use take minutes: pytest -n 14 spreads them over processes, -k fa4 picks a provider.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from headway import providers
from tests.calls import Call, assert_matches
from tests.providers import feature_calls
from tests.providers.claims import assert_claims_are_shown
from tests.providers.honoured import honoured_or_refused

DEVICE = "cuda"
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(
    params=[name for name in providers.NAMES if name not in ("cpu", *providers.PINNED_ONLY)]
)
def provider(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    absent = providers.get(name).unavailable(torch.device(DEVICE))
    if absent is not None:
        pytest.skip(absent)
    return name


def fit_for(provider: str, call: Call) -> Call:
    """Rows that belong to nobody hold NaN, but for packages that say they multiply them by zero."""
    can = providers.get(provider).capabilities(torch.device(DEVICE))
    return feature_calls.without_nan(call) if can.needs_finite_tails else call


@pytest.mark.parametrize("name", feature_calls.CALLS)
def test_a_call_is_honoured_or_refused(provider: str, name: str) -> None:
    call = fit_for(provider, feature_calls.named(name))
    if not honoured_or_refused(call, provider, DEVICE):
        honoured_or_refused(call, provider, DEVICE, with_lse=False)


@pytest.mark.parametrize("name", ["dense causal", "ragged causal", "pages of 64, causal"])
def test_a_call_without_out_and_lse(provider: str, name: str) -> None:
    call = fit_for(provider, feature_calls.named(name))
    honoured_or_refused(call, provider, DEVICE, with_lse=False)


def test_every_claim_is_shown(provider: str) -> None:
    assert_claims_are_shown(provider, DEVICE)


def run_with_junk(provider: str) -> None:
    """Entries of the page table behind a sequence's last page are no pages."""
    call = fit_for(provider, feature_calls.named("pages of 64"))
    table, lengths = call.kwargs["page_table"], call.kwargs["cache_seqlens"]
    if providers.get(provider).reasons_against(call.copy(DEVICE).problem()):
        return
    table[torch.arange(table.shape[1]) >= -(-lengths[:, None] // 64)] = 2147480000
    assert_matches(call.run(provider, DEVICE), call.run("reference"), call)


def test_junk_in_the_page_table_is_never_followed(provider: str) -> None:
    """In a process of its own: whoever follows it leaves no usable device behind."""
    code = f"import tests.gpu.test_package_providers as t; t.run_with_junk({provider!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
