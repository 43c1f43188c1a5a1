"""HTTP: an OpenAI-compatible API, feedback, health and metrics."""
