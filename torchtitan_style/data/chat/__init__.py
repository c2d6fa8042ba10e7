"""Conversations: the forms that rows have, the chat template, and which tokens are trained on."""
