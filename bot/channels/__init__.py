"""Where people reach the service."""
