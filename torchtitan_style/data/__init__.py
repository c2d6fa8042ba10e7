"""From files to batches: corpus → tokenizer → token file → rows in a fixed order → batches."""
