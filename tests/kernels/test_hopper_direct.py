"""Starting compiled kernels without Triton's launch path, over stand-ins of its launchers' two shapes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton

from headway.errors import InvalidInputError
from headway.kernels.hopper import direct

Call = tuple[Any, ...]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """What the C function was called with."""
    calls: list[Call] = []
    utils = SimpleNamespace(launch=lambda *args: calls.append(args))
    driver = SimpleNamespace(active=SimpleNamespace(utils=utils))
    monkeypatch.setattr(triton.runtime, "driver", driver)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 70 + index, False)
    return calls


def kernel_of(**run: Any) -> Any:
    run = {"launch_cooperative_grid": False, "launch_pdl": True} | run
    return SimpleNamespace(run=SimpleNamespace(**run), function=1234, packed_metadata=(4, 1, 5000))


def encoding(launcher: Any) -> Any:
    """A launcher wrapped as Triton wraps it for kernels that take descriptors."""

    def inner(*args: Any) -> Any:
        return launcher(*args)

    return inner


def test_one_function_per_signature(started: list[Call]) -> None:
    class Launch:  # a C function has no closure
        def __call__(self, *args: Any) -> None:
            started.append(args)

    for launch in (Launch(), encoding(Launch())):
        direct.DirectLaunch(kernel_of(launch=launch))((132, 2, 1), 3, (11, None, 2.5))
    wanted = (132, 2, 1, 73, 1234, False, True, None, None, (4, 1, 5000), None, None, None)
    assert started == [(*wanted, 11, None, 2.5)] * 2


def test_one_function_told_the_signature(started: list[Call]) -> None:
    kernel = kernel_of(launch=None, arg_annotations=["a"], kernel_signature=b"s")
    direct.DirectLaunch(kernel)((132, 2, 1), 3, (11, None, 2.5))
    wanted = (132, 2, 1, 73, 1234, False, True, (4, 1, 5000), *[None] * 5, ["a"], b"s")
    assert started == [(*wanted, (11, None, 2.5))]


def own_path(calls: list[Call], **run: Any) -> Any:
    """A kernel that also starts as Triton's users start it."""

    class Kernel(SimpleNamespace):
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args: calls.append((grid, *args))

    return Kernel(**vars(kernel_of(**run)))


def without_the_function(*args: Any) -> None:
    pytest.fail("started as a C function")


@pytest.mark.parametrize(
    ("version", "run"),
    [
        ("3.10.0", {"launch": None, "arg_annotations": ["a"], "kernel_signature": b"s"}),
        ("4.0.0+git1", {"launch": encoding(without_the_function)}),
        ("3.6.0", {"launch": without_the_function}),
        ("3.6.0", {"launch": encoding(without_the_function), "global_scratch_size": 128}),
    ],
    ids=["newer", "much newer", "another wrapper", "scratch"],
)
def test_an_unknown_launcher_is_left_to_triton(
    monkeypatch: pytest.MonkeyPatch, started: list[Call], version: str, run: dict[str, Any]
) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    launch = direct.DirectLaunch(own_path(started, **run))
    cache = 4096, torch.bfloat16, (9, 2, 16, 128), (4096, 128, 256, 1), (1, 1, 16, 128)
    (made,) = launch.tensor_map(*cache)
    assert (made.base.data_ptr(), made.shape, made.strides) == (4096, [*cache[2]], [*cache[3]])
    launch((132, 2, 1), 3, (made, 11, None, 2.5))
    assert started == [((132, 2, 1), made, 11, None, 2.5)]
    with pytest.raises(InvalidInputError, match="multiples of 16 bytes"):
        launch.tensor_map(4100, *cache[1:])


@pytest.mark.parametrize("name", ["fill_tma_descriptor", "fill_tma_descriptor_tiled"])
def test_descriptors_are_encoded_under_either_name(
    monkeypatch: pytest.MonkeyPatch, started: list[Call], name: str
) -> None:
    utils = SimpleNamespace(**{name: lambda *args: ("map", *args)})
    monkeypatch.setattr(triton.runtime.driver.active, "utils", utils)
    made = direct.tensor_map(
        4096, torch.bfloat16, (9, 2, 16, 128), (4096, 128, 256, 1), (1, 1, 16, 128)
    )
    encoded = ("map", 4096, 3, 2, 9, [1, 1, 16, 64], [9, 2, 16, 128], [4096, 128, 256, 1], 0)
    assert made == (encoded, 9, 2, 16, 128, 4096, 128, 256, 1)


def test_descriptors_are_kept_by_address_up_to_a_number(
    monkeypatch: pytest.MonkeyPatch, started: list[Call]
) -> None:
    encoded: list[int] = []

    def encode(address: int, *rest: Any) -> int:
        encoded.append(address)
        return address

    utils = SimpleNamespace(fill_tma_descriptor=encode)
    monkeypatch.setattr(triton.runtime.driver.active, "utils", utils)
    monkeypatch.setattr(direct, "_MOST_MAPS", 2)
    launch = direct.DirectLaunch(kernel_of(launch=SimpleNamespace()))
    boxes = direct.Boxes(torch.bfloat16, (9, 2, 16, 64), (2048, 64, 128, 1), (1, 1, 16, 64), None)
    for address in (16, 32, 16, 32, 48, 16):
        assert boxes(launch, address) == (address, 9, 2, 16, 64, 2048, 64, 128, 1)
    assert encoded == [16, 32, 48, 16]
