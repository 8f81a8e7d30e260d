"""Encoded corpora written for search engines (docs/formats.md)."""
