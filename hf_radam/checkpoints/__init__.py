"""Checkpoints on disk: save, verify, find, load and extend them. Nothing here knows a trainer."""
