"""Conversations: the durable log of every turn."""
