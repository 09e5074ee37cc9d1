"""One verdict on any OpenAI-compatible endpoint. Enters: a URL; leaves: pass, fail or not offered."""
