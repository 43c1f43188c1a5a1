"""The engine: token ids in, token ids out. It knows no text, no chat, no domains, no Slack and no Redis."""
