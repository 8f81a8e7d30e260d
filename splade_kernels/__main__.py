"""``python -m splade_kernels``: the command line."""

from .cli import main

main()
