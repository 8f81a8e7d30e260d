"""A corpus in, sparse vectors out: reading texts, encoding them, and the folder of Parquet parts that holds the result.

:class:`EncodeBatch` is the step for engines (Ray Data, Spark) that read and write themselves. The command line is
:mod:`splade_kernels.cli`, the folder's layout is described in docs/encoding.md.
"""

from __future__ import annotations

__all__: list[str] = []
