"""How runs went, as one HTML file."""
