"""The door: tokens over the wire. Enters: an `Engine`; leaves: an OpenAI-compatible HTTP server."""
