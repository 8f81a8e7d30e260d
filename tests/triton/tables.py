"""A tuned table for each architecture, as if a GPU had measured it and it shipped."""

from __future__ import annotations

import json
from pathlib import Path

from splade_kernels.backends.triton.tuning import (
    ARCHITECTURES,
    Config,
    HiddenConfig,
    MatmulConfig,
    Shape,
    WeightConfig,
    entry,
    uses_descriptors,
)


def table(arch: int) -> dict[Shape, Config]:
    """Entries of every kind, none of which is a default."""
    tma = uses_descriptors(arch)
    matmul = MatmulConfig(128, 64, 64, 8, 2, group_v=4, tma=tma)
    return {
        Shape("maximum", arch, "bfloat16", 768, 30522): matmul,
        Shape("maximum", arch, "bfloat16", 1024, 250002): MatmulConfig(64, 64, 64, 4, 3, tma=tma, partials=True),
        Shape("sum", arch, "bfloat16", 768, 30522): MatmulConfig(64, 64, 32, 4, 2),
        Shape("int8", arch, "bfloat16", 768, 30522): MatmulConfig(128, 64, 64, 8, 2, tma=tma),
        Shape("backward-weight", arch, "bfloat16", 768, 30522): WeightConfig(8, 256, 4),
        Shape("backward-hidden", arch, "bfloat16", 768, 30522): HiddenConfig(2, 4, 512, 2),
    }


def write(folder: Path) -> Path:
    """The files that would ship, in the form of the tuner's results."""
    for arch in ARCHITECTURES:
        content = {"kind": "tuning", "rows": [], "table": [entry(*item) for item in table(arch).items()]}
        (folder / f"sm_{arch}.json").write_text(json.dumps(content))
    return folder
