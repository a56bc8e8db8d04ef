"""The home folder where an option says `~`, which a shell expands only at the start of a word: not in `--x=~/y`."""
from __future__ import annotations

import os
import re
from argparse import Namespace
from typing import Any

__all__ = ['expand', 'expand_words']

HOME = re.compile(r'~[^/=]*/')  # with the slash: YAML's ~ alone is null


def expand(value: Any) -> Any:
    """Return what an option says, or a group of options, with home folders in place of `~/` and `~NAME/`."""
    if isinstance(value, str):
        return os.path.expanduser(value) if HOME.match(value) else value
    if isinstance(value, dict):
        return {key: expand(each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(expand, value))
    if isinstance(value, Namespace):
        return type(value)(**expand(vars(value)))
    return value


def expand_words(words: list[str]) -> list[str]:
    """Return the words of a command line with home folders in place of `~/`, also after `--NAME=`."""
    return [option + equals + expand(value) for option, equals, value in (
        word.partition('=') if word.startswith('-') else ('', '', word) for word in words)]
