"""Every kernel once on small odd shapes: what ``compute-sanitizer`` runs.

compute-sanitizer --tool memcheck python -m bench.sanitize
"""

from __future__ import annotations

import itertools

import torch

import splade_kernels as sk

# (batch, length, hidden size, vocabulary): no power of two, one token, one sequence, a row stride no TMA can take.
SHAPES = ((3, 37, 40, 203), (1, 1, 33, 17), (5, 19, 72, 131))


def exercise(device: torch.device) -> int:
    """Forward and backward of both poolings, padded and packed, FLOPS and sparsify; inference with few active words,
    which screening leaves to the exact kernel. Returns how many ran."""
    count = 0
    dtypes = (torch.float32, torch.float16, torch.bfloat16) if device.type == "cuda" else (torch.float32,)
    for shape, dtype, pooling in itertools.product(SHAPES, dtypes, ("max", "sum")):
        batch, length, hidden_size, vocab_size = shape
        generator = torch.Generator().manual_seed(0)

        def draw(*size: int, dtype: torch.dtype = dtype, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(size, generator=generator).to(device, dtype).requires_grad_()

        lengths = torch.randint(0, length + 1, (batch,), generator=generator)
        lengths[-1] = length
        mask = (torch.arange(length) < lengths[:, None]).to(device)
        leaves = draw(batch, length, hidden_size), draw(vocab_size, hidden_size), draw(vocab_size)
        packed = leaves[0].detach()[mask].requires_grad_()
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(device)
        screened = pooling == "max" and device.type == "cuda"  # in training, padded; packed unscreened
        outputs = [
            sk.splade_pool(*leaves, mask, pooling_strategy=pooling, screening=screened),
            sk.splade_pool(packed, *leaves[1:], cu_seqlens=cu_seqlens, max_seqlen=length, pooling_strategy=pooling),
        ]
        for output in outputs:
            sk.sparsify(output, max_active_dims=5)
            (output.float().sum() + sk.flops_loss(output, threshold=3)).backward()
            count += 1
        if pooling == "max":
            sparse = leaves[2].detach() - 3 * hidden_size**0.5
            for _ in range(2):  # the second one finds the weight quantised
                with torch.no_grad():
                    sk.splade_pool(*leaves[:2], sparse, mask, screening=screened)
                count += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    return count


if __name__ == "__main__":
    print(exercise(torch.device("cuda" if torch.cuda.is_available() else "cpu")), "outputs and their gradients")
