"""The command `hf-radam`."""

from hf_radam.cli.main import main

__all__ = ["main"]
