"""Text to token ids and back: loading, training and applying a tokenizer."""
