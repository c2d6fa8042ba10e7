"""Which files a corpus is made of, on disk, on the Hub or by URL, and the documents in them, good and bad."""
