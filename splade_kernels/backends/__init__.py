"""The implementations behind the operators, and the choice between them."""

from .selection import BACKENDS, available_backends, select

__all__ = ["BACKENDS", "available_backends", "select"]
