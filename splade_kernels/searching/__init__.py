"""Searching an encoded corpus, and judging the result."""
