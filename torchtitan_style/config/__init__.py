"""What a user may set: the schema, how it is read, and what is checked before anything starts.

``launch/configure.py`` puts a configuration together from this and from what model families and weights add.
"""

from .load import to_toml
from .schema import Config

__all__ = ["Config", "to_toml"]
