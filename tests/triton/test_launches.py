"""How much a call launches: each costs the host microseconds, which is what calls of a few queries take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tests.triton.screening_cases import REASON, run, sparse_case

pytestmark = [pytest.mark.skipif(REASON != "available", reason=REASON), pytest.mark.usefixtures("on_accelerator")]

if REASON == "available":
    from splade_kernels.backends.triton import max_forward as forward
    from splade_kernels.backends.triton import pack, tuning


class Launches(TorchDispatchMode):
    """Names of PyTorch's operations that compute something, and of Triton's kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and "empty" not in str(func):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], list[str]]:
    seen = Launches()
    kind = type(forward._finalise_kernel)
    launcher = kind.__getitem__

    def counted(kernel: Any, grid: Any) -> Any:
        launch = launcher(kernel, grid)
        seen.names.append(kernel.fn.__name__)

        def without_what_the_interpreter_does(*arguments: Any, **options: Any) -> None:
            with _disable_current_modes():
                launch(*arguments, **options)

        return without_what_the_interpreter_does

    monkeypatch.setattr(kind, "__getitem__", counted)

    def count(call: Callable[[], object]) -> list[str]:
        seen.names.clear()
        with seen:
            call()
        return list(seen.names)

    return count


@pytest.mark.parametrize(
    ("mode", "need_argmax", "most"),
    [("off", False, 8), ("off", True, 8), ("auto", False, 8), ("auto", True, 8), ("on", False, 17), ("on", True, 14)],
)
def test_of_one_slice(mode, need_argmax, most, launches, monkeypatch):
    monkeypatch.setattr(tuning, "SCREENING_PAYS", frozenset())
    case = sparse_case((3, 20, 16, 200))
    run(case, mode, need_argmax)  # whose quantised weight is kept
    names = launches(lambda: run(case, mode, need_argmax))
    names = [name for name in names if name != "aten.equal.default"]  # the cache's look at a weight on a CPU
    assert "_finalise_kernel" in names
    assert len(names) <= most, names


@pytest.mark.parametrize(("mode", "most"), [("off", 5), ("on", 10)])
def test_of_every_further_slice(mode, most, launches, monkeypatch):
    case = sparse_case((4, 20, 16, 200))
    one = launches(lambda: run(case, mode))
    monkeypatch.setattr(pack, "SLICE_BYTES", 1)
    four = launches(lambda: run(case, mode))
    assert len(four) - len(one) <= 3 * most, four
