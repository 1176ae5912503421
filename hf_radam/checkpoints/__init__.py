"""Checkpoints on disk: written whole, verified, found, gone on from. Nothing here knows a trainer."""
