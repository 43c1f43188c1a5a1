"""Who may do what, and how much: API keys, roles and limits. Knows nothing of HTTP."""
