"""What a user may set: the schema, how it is read, and what is checked before anything starts."""

from .load import load_config, to_toml
from .schema import Config

__all__ = ["Config", "load_config", "to_toml"]
