"""Which domain a turn is about: an encoder for short texts and a router fitted on the examples of the live cards."""
