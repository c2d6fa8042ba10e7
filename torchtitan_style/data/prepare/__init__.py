"""A corpus tokenized once: building the folder, finding it again, checking that nothing has changed."""
