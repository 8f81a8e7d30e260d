"""Device helpers and host facts that the kernels share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Rows of a packed group: what one reduction combines, and what sequences are padded to a multiple of.
GROUP = 16
GROUP_ROWS = tl.constexpr(GROUP)
# Most tokens of a tile. The last tile reads up to so many packed rows past the last token, which have to be zeros.
LARGEST_BLOCK_T = 256
# Columns that rows of int8 are padded to a multiple of: whole blocks of every configuration, whatever the hidden size,
# so that nothing is masked along them and every row is aligned.
INT8_WIDTH = 128
# Triton 3.6 takes no plain string as the default of a device function's argument.
STRIPS = tl.constexpr("strips")
# Whether kernels run on the CPU through Triton's interpreter (``TRITON_INTERPRET=1`` before the import).
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of a float32 product: TF32 only where PyTorch's own matmuls may use it.

    The newer setting is read first: once it was set, reading the older one raises.
    """
    if dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    setting = getattr(matmul, "fp32_precision", "none")
    allowed = setting == "tf32" if setting not in ("none", "") else bool(matmul.allow_tf32)
    return "tf32" if allowed else "ieee"


@triton.jit
def widen(x):
    """``x`` in float32. The interpreter's own conversion gets bfloat16 below 2^-126 wrong."""
    if INTERPRETED:
        if x.dtype == tl.bfloat16:
            return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """``x`` in DTYPE, rounded to nearest with ties to even, as conversions on a GPU are.

    The interpreter's own conversion truncates float32 to bfloat16, even with ``fp_downcast_rounding="rtne"``, and turns
    some NaN into infinity. Its float16 is NumPy's, which is right.
    """
    if INTERPRETED:
        x = x if x.dtype == DTYPE else widen(x)
        if x.dtype != DTYPE and DTYPE == tl.bfloat16:
            bits = tl.where(x != x, 0x7FFF0000, x.to(tl.int32, bitcast=True))
            nearest = bits + 0x7FFF + ((bits >> 16) & 1)
            return (nearest >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    if x.dtype == tl.float32 and DTYPE != tl.float32:
        return x.to(DTYPE, fp_downcast_rounding="rtne")
    return x.to(DTYPE)


@triton.jit
def not_at_most(x, bound):
    """``x > bound``, and true for NaN, which has to reach the result."""
    return ~(x <= bound)


@triton.jit
def is_active(x):
    """Whether a logit, or its activation, is above 0 or NaN."""
    return not_at_most(x, 0.0)


@triton.jit
def canonical(x):
    """``x`` with one zero and one NaN, so that equal values have equal bits.

    On a GPU adding zero is enough: zeros become +0, and arithmetic returns no NaN but 0x7FFFFFFF.
    """
    x = x + 0.0
    if INTERPRETED:
        x = tl.where(x != x, tl.full((), 0x7FFFFFFF, tl.int32).to(tl.float32, bitcast=True), x)
    return x


@triton.jit
def ordered(x):
    """Canonical float32 to int32 of the same order; NaN is the largest."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def unordered(o):
    """Inverse of :func:`ordered`."""
    return (o ^ ((o >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def training_key(dot, packed_row):
    """The larger the canonical dot, then the lower its row, the larger the key; always above 0."""
    return ((ordered(dot).to(tl.int64) + 0x80000000) << 31) | (0x7FFFFFFF - packed_row).to(tl.int64)


@triton.jit
def key_dot(key):
    return unordered(((key >> 31) - 0x80000000).to(tl.int32))


@triton.jit
def key_row(key):
    return (0x7FFFFFFF - (key & 0x7FFFFFFF)).to(tl.int32)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def maximum(x, AXIS: tl.constexpr):
    """Maximum of canonical floats over an axis. NaN is the largest, which ``tl.max`` would drop."""
    if INTERPRETED:
        # A custom combine function takes the interpreter a second a tile.
        return unordered(tl.max(ordered(x), axis=AXIS))
    else:
        return tl.reduce(x, AXIS, _larger)


@triton.jit
def log1p(x):
    """``log(1 + x)`` for ``x >= 0``, also for small x: ``log(u) + r / u`` with the rounding error r of ``u = 1 + x``.

    The quotient is so small that its own error, two units in the last place on a GPU, vanishes in the sum.
    """
    u = 1.0 + x
    # Infinity minus infinity would be NaN.
    rest = tl.where(u - 1.0 == x, 0.0, x - (u - 1.0))
    return tl.where(u == 1.0, x, tl.log(u) + rest / u)


@triton.jit
def expm1(y):
    """``exp(y) - 1`` for ``y >= 0``, also for small y: in ``(u - 1) / log(u)`` the error of ``u = exp(y)`` cancels."""
    u = tl.exp(y)
    return tl.where(u == 1.0, y, (u - 1.0) * (y / tl.log(tl.where(u == 1.0, 2.0, u))))


@triton.jit
def tanh(u):
    """``tanh(u)`` for ``u >= 0`` or NaN: up to 0.625 the odd polynomial of Cephes' tanhf, then ``1 - 2e / (1 + e)``.

    There ``e = exp(-2u)`` is at most 0.29, so that its error is smaller in the result.
    """
    small = tl.where(u < 0.625, u, 0.0)
    s = small * small
    p = ((-5.70498872745e-3 * s + 2.06390887954e-2) * s - 5.37397155531e-2) * s + 1.33314422036e-1
    e = tl.exp(-2.0 * u)
    return tl.where(u < 0.625, small + small * (s * (p * s - 3.33332819422e-1)), 1.0 - 2.0 * e / (1.0 + e))


@triton.jit
def transformed(x, scale, softcap):
    """``z = scale · x``, then ``softcap · tanh(z / softcap)``, of ``x >= 0`` or NaN. Either may be None."""
    if scale is not None:
        x = x * scale
    if softcap is not None:
        x = softcap * tanh(x / softcap)
    return x


@triton.jit
def transform_slope(x, scale, softcap):
    """Slope of :func:`transformed` in x; with ``e = exp(-2z / softcap)`` that of the soft cap is ``4e / (1 + e)²``.

    Its relative error is small also where the soft cap is saturated.
    """
    slope = 1.0 if scale is None else scale
    if softcap is not None:
        z = x if scale is None else x * scale
        e = tl.exp(-2.0 * (z / softcap))
        slope *= 4.0 * e / ((1.0 + e) * (1.0 + e))
    return slope


@triton.jit
def activate(x, scale, softcap, LOGS: tl.constexpr):
    """``relu(x)``, scale and soft cap unless None, then ``log1p`` LOGS times; NaN stays NaN."""
    y = transformed(tl.where(is_active(x), x, 0.0), scale, softcap)
    for _ in tl.static_range(LOGS):
        y = log1p(y)
    return y


@triton.jit
def tiles_of_program(tiles, ORDER: tl.constexpr):
    """First tile, end and step of a program of a persistent grid; with ORDER "runs" it takes consecutive tiles."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    if ORDER == "runs":
        longer = tiles % programs
        first = program * (tiles // programs) + tl.minimum(program, longer)
        return first, first + tiles // programs + (program < longer).to(tl.int32), 1
    else:
        return program, tiles, programs


@triton.jit
def tile_of(program, tiles_v, tiles_t, GROUP_V: tl.constexpr, ORDER: tl.constexpr = STRIPS):
    """Tile of a program: strips of GROUP_V vocabulary tiles that walk the tokens, so that a strip of W stays in L2.

    ORDER "runs": row by row, so that consecutive tiles share their rows of W.
    """
    if ORDER == "runs":
        return program // tiles_t, program % tiles_t
    strip = program // (GROUP_V * tiles_t)
    first = strip * GROUP_V
    height = tl.minimum(tiles_v - first, GROUP_V)
    within = program - strip * (GROUP_V * tiles_t)
    return first + within % height, within // height


@triton.jit
def dots(weight, row_ptr, o_v, o_t, m_v, m_t, depth, hidden_size, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    """``W[v] · h[t]`` over the first ``depth`` hidden dimensions: ``[BLOCK_V, BLOCK_T]`` in float32.

    ``weight`` is the pointer of W with its two strides.
    """
    weight_ptr, stride_wv, stride_wd = weight
    p_w = weight_ptr + o_v.to(tl.int64)[:, None] * stride_wv
    p_h = row_ptr + o_t.to(tl.int64)[None, :] * hidden_size
    acc = tl.zeros((o_v.shape[0], o_t.shape[0]), dtype=tl.float32)
    for first in range(0, depth, BLOCK_K):
        o_k = first + tl.arange(0, BLOCK_K)
        m_k = o_k < hidden_size
        b_w = tl.load(p_w + o_k.to(tl.int64)[None, :] * stride_wd, mask=m_v[:, None] & m_k[None, :], other=0.0)
        b_h = tl.load(p_h + o_k[:, None], mask=m_t[None, :] & m_k[:, None], other=0.0)
        acc = multiply(b_w, b_h, acc, PRECISION)
    return acc


@triton.jit
def multiply(b_w, b_h, acc, PRECISION: tl.constexpr):
    """``acc + b_w @ b_h``.

    The interpreter would multiply the bit patterns of bfloat16, and hands float32 to a BLAS whose rounding may depend
    on the position in the tile. Rounding from float64 avoids both.
    """
    if INTERPRETED:
        exact = tl.dot(widen(b_w).to(tl.float64), widen(b_h).to(tl.float64), out_dtype=tl.float64)
        return acc + exact.to(tl.float32)
    else:
        return tl.dot(b_w, b_h, acc, input_precision=PRECISION)


@triton.jit
def saturation(softcap, LOGS: tl.constexpr):
    """As :func:`splade_kernels.backends.pooling.saturation`: from where on an output counts as that of +inf."""
    largest = softcap
    for _ in tl.static_range(LOGS):
        largest = log1p(largest)
    return largest * (1.0 - 2.0**-22)


@triton.jit
def logit_gradient(p_grad, p_output, mask, scale, softcap, LOGS: tl.constexpr):
    """``g = dy · dact`` of the active entries, from the activated output, and 0 of the others; NaN stays NaN.

    Each ``log1p`` with the output y has the slope ``exp(-y)`` and had the argument ``exp(y) - 1``; the soft cap with
    the output ``z = softcap · t`` has the slope ``(1 - t) (1 + t)``. How precise that is:
    :func:`splade_kernels.backends.pooling.activation_gradient`.
    """
    y = widen(tl.load(p_output, mask=mask, other=0.0))
    dy = widen(tl.load(p_grad, mask=mask, other=0.0))
    active = is_active(y)
    if softcap is not None:
        saturated = y >= saturation(softcap, LOGS)
    slope = 1.0
    for _ in tl.static_range(LOGS):
        slope *= tl.exp(-y)
        y = tl.exp(y) - 1.0 if softcap is None else expm1(y)
    if softcap is not None:
        t = y / softcap
        # NaN is in the slope already.
        slope *= tl.where(saturated | (t >= 1.0), 0.0, (1.0 - t) * (1.0 + t))
    if scale is not None:
        slope *= scale
    return tl.where(active, dy * slope, 0.0)
