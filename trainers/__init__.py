"""Conversations in, an evaluated and published domain version out."""
