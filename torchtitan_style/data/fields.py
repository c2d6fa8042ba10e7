"""What of a corpus's rows is a document."""

from __future__ import annotations

from torchtitan_style.config.schema import Corpus

from .chat.conversations import Conversations
from .records import Fields


def fields_of(corpus: Corpus) -> Fields:
    """The field or column with the text, or how a row is read as a conversation."""
    return Conversations(corpus.messages_key) if corpus.format == "chat" else corpus.text_key
