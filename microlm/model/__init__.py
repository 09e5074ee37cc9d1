"""ids → logits: configuration, decoder, LoRA, HF directories. Parameter names are the Hugging Face names."""
