"""A corpus in, sparse vectors out: reading texts, encoding them, and the folder of Parquet parts that holds the result.

:class:`EncodeBatch` is the step for engines (Ray Data, Spark) that read and write themselves. The command line is
:mod:`splade_kernels.cli`, the folder's layout is described in docs/encoding.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batch import EncodeBatch

__all__ = ["EncodeBatch"]


def __getattr__(name: str) -> Any:
    # Not before it is asked for: it imports pyarrow.
    if name == "EncodeBatch":
        from .batch import EncodeBatch

        return EncodeBatch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
