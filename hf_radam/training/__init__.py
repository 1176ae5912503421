"""Moved soon."""
