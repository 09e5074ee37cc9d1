"""One verdict on any OpenAI-compatible endpoint. Enters: a URL; leave: pass, fail, not offered, not shown."""
