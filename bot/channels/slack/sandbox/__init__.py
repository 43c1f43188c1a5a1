"""A Slack of our own on the loopback address: the Web API, Socket Mode, signed requests, and people who write and click."""
