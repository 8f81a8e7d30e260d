"""One build of the compiled operators under another PyTorch: ``python tests/two_versions.py PYTHON``.

``PYTHON`` is the interpreter of an environment with another supported PyTorch and nothing of this package. The library
built here is loaded there as it is and has to give the bytes that it gives here. Not part of the test suite, which has
one PyTorch.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

LIBRARY = Path(__file__).parents[1] / "splade_kernels/_csrc.so"

CODE = """
import hashlib, sys, torch
torch.ops.load_library(sys.argv[1])
csrc = torch.ops.splade_kernels_csrc
v = torch.arange(3000, dtype=torch.int64)
grad = torch.stack([((v * p) % 17 - 8).float() / 4 for p in (3, 5, 7)])
argmax = torch.stack([(v * p) % 29 for p in (11, 13, 17)]).to(torch.int16)
bounds, words, values = csrc.bucket_by_token(argmax, grad, torch.tensor([0, 29, 58, 80]), 80)
digest = hashlib.sha256(bounds.numpy().tobytes())
for begin, end in bounds.tolist():
    digest.update(words[begin:end].numpy().tobytes() + values[begin:end].numpy().tobytes())
for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
    counts, mask = csrc.active_mask(grad.to(dtype), 100)
    crow = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    for tensor in (crow, mask, *csrc.gather_active(grad.to(dtype), crow, mask, int(crow[-1]))):
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
for tensor in csrc.sparsify(grad, 100):
    digest.update(tensor.view(torch.uint8).numpy().tobytes())
print(torch.__version__, digest.hexdigest())
"""


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    results = []
    for python in (sys.executable, sys.argv[1]):
        done = subprocess.run([python, "-W", "ignore", "-c", CODE, str(LIBRARY)], capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{python}:\n{done.stderr}")
        results.append(done.stdout.split())
        print(*results[-1])
    (here, ours), (there, theirs) = results
    if here == there:
        raise SystemExit(f"both are PyTorch {here}")
    if ours != theirs:
        raise SystemExit("the results differ")
    print(f"the same bytes under {here} and {there}")


if __name__ == "__main__":
    main()
