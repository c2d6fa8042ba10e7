"""Model families. What one is, spec.py; which there are, registry.py; each in a folder of its own."""
