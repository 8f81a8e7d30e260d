"""Triton's interpreter: quicker, and watched for what it computes differently from a GPU (see docs/kernels.md).

bfloat16 is kept as uint16 there: conversions cut it off, arithmetic and comparisons take its bits for integers.
:func:`forbid_bfloat16` makes them errors. :func:`approximate` puts a GPU's approximations in the place of NumPy's
exactly rounded functions. :func:`remember` makes it do once what it repeats at every call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest


def remember(patch: pytest.MonkeyPatch) -> None:
    """Functions of ``triton.language`` are replaced once for each kernel and helper, and NumPy's types looked up once.

    By itself the interpreter replaces them at every launch and at every call of a helper, which takes much of its time,
    and restores them after the launch. A process that interprets compiles nothing, so they can stay replaced.
    """
    from triton.runtime import interpreter

    replace = functools.cache(interpreter._patch_lang)
    original = interpreter._get_np_dtype
    numpy_dtype = functools.cache(original)

    def replace_once(function: Any) -> SimpleNamespace:
        replace(function)
        return SimpleNamespace(restore=lambda: None)

    def get_np_dtype(dtype: Any) -> Any:
        return original(dtype) if dtype.scalar.is_ptr() else numpy_dtype(dtype.scalar)

    patch.setattr(interpreter, "_patch_lang", replace_once)
    patch.setattr(interpreter, "_get_np_dtype", get_np_dtype)


def forbid_bfloat16(patch: pytest.MonkeyPatch) -> None:
    """Conversions of bfloat16 other than of zeros, and operations on it, raise: the kernels' own helpers do without."""
    from triton.runtime import interpreter
    from triton.runtime.interpreter import tl

    builder = interpreter.InterpreterBuilder
    originals = {name: getattr(builder, name) for name in ("cast_impl", "binary_op", "unary_op", "create_dot")}

    def convert(self: Any, source: Any, target: Any) -> Any:
        types = source.dtype.scalar, target.scalar
        if types[0] != types[1] and tl.bfloat16 in types and source.data.any():
            raise AssertionError(f"{types[0]} became {types[1]} without common.narrow or common.widen")
        return originals["cast_impl"](self, source, target)

    def guarded(name: str) -> Callable[..., Any]:
        def operate(self: Any, first: Any, *others: Any) -> Any:
            if first.dtype.scalar == tl.bfloat16:
                raise AssertionError(f"{name} on bfloat16, of which the interpreter sees the bits only")
            return originals[name](self, first, *others)

        return operate

    patch.setattr(builder, "cast_impl", convert)
    for name in ("binary_op", "unary_op", "create_dot"):
        patch.setattr(builder, name, guarded(name))


def approximate(patch: pytest.MonkeyPatch, seed: int = 0) -> None:
    """Results as far off, at random, as those of the instructions that the kernels are compiled to.

    ``div.full.f32``: less than 2 units in the last place. libdevice's logarithm: less than 1. ``ex2.approx.f32`` of a
    product: 2^-22.5, and the rounding of its exponent. ``cvt.rmi.ftz.f32.f32`` takes denormals for zeros.
    """
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    generator = np.random.default_rng(seed)

    def double(function: Callable[..., Any], *operands: Any) -> Any:
        with np.errstate(all="ignore"):
            return function(*(operand.data.astype(np.float64) for operand in operands))

    def off(exact: Any, units: int) -> Any:
        """The float32 on a random side of ``exact``, less than so many units in the last place away."""
        with np.errstate(all="ignore"):
            result = exact.astype(np.float32)
            side = generator.choice(np.float32([-np.inf, np.inf]), exact.shape)
            beyond = np.where(side > 0, result >= exact, result <= exact)
            result = np.where(beyond, result, np.nextafter(result, side))
            for _ in range(units - 1):
                result = np.nextafter(result, side)
            plain = np.isfinite(exact) & (exact != 0)
            return np.where(plain, result, exact.astype(np.float32))

    def divide(self: Any, left: Any, right: Any) -> Any:
        return handle(off(double(np.divide, left, right), 2), left.dtype.scalar)

    def logarithm(self: Any, x: Any) -> Any:
        return handle(off(double(np.log, x), 1), x.dtype.scalar)

    def exponential(self: Any, x: Any) -> Any:
        most = 2.0**-22.5 + 2.0**-23 * np.where(np.isfinite(x.data), np.abs(x.data), 0)
        exact = double(np.exp, x)
        with np.errstate(all="ignore"):
            result = (exact * (1 + most * generator.choice([-1.0, 1.0], exact.shape))).astype(np.float32)
        return handle(result, x.dtype.scalar)

    def floor(self: Any, x: Any) -> Any:
        flushed = np.where(np.abs(x.data) < 2.0**-126, 0, x.data).astype(x.data.dtype)
        return handle(np.floor(flushed), x.dtype.scalar)

    patch.setattr(builder, "create_fdiv", divide)
    patch.setattr(builder, "create_log", logarithm)
    patch.setattr(builder, "create_exp", exponential)
    patch.setattr(builder, "create_floor", floor)
