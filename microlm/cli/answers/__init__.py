"""Commands that answer: `generate` and `chat`, and the options that they share with `serve`."""
