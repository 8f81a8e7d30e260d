"""Metadata lives in pyproject.toml. This file is where the optional compiled extension will be declared."""

from setuptools import setup

setup()
