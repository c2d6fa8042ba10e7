"""From files to batches. A module imports from its own folder and from those before it, in this order:

    tokenizer/    text to token ids and back
    chat/         conversations: the forms of a row, chat templates, which tokens are trained on
    sources/      which files a corpus is made of, the documents in them, and what cannot be read
    *.py          what every training step uses: rows, their order, packing and mixture, shards, streams, the loader
    prepare/      a corpus tokenized once, in a folder that runs find again; held-out sets; ``prepare --show``

tests/test_imports.py reads the order from here.
"""
