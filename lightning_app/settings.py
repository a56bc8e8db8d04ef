"""Settings from Python: in plain values, so that checkpoints load without code of anybody's, and of the known words."""
from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Callable, Collection, Mapping
from enum import Enum
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch

from se_timm.errors import InputError, message, unknown

__all__ = ['as_group', 'check_choices', 'is_plain', 'plain_values']

# how values of classes of these, such as jsonargparse's PositiveInt, become plain
BASES: dict[type, Callable[[Any], Any]] = {int: int.__int__, float: float.__float__, str: str.__str__}
PLAIN = {type(None), bool, *BASES}
COLLECTIONS = (list, tuple, set)


def as_group(key: str, given: Any, kind: Any) -> Any:
    """Return a group of settings as its dataclass; what is of another class stays.

    Args:
        key: What messages call it, such as `model.optim`.
        given: The group, a dict of what is not as by default, or None for all defaults.
        kind: The dataclass.

    Raises:
        InputError: For settings that it does not have, or what is no group of settings.
    """
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    if isinstance(given, Mapping):
        for name in given:
            if name not in fields:
                raise InputError(unknown(f'setting of {key}', name, fields))
        for name, field in fields.items():
            if name not in given and field.default is field.default_factory is dataclasses.MISSING:
                raise InputError(message(f'{key}: {given!r}', f'it needs {name}', f'give {key}.{name}'))
        return kind(**given)
    if given is not None and (is_plain(given) or isinstance(given, type)):
        raise InputError(message(
            f'{key}: {given!r}', 'it is a group of settings',
            f'give {kind.__name__}(...) or a dict; settings are {", ".join(fields)}'))
    return kind() if given is None else given


def plain_values(key: str, value: Any) -> Any:
    """Return a setting as a checkpoint holds it: paths are text, numpy's numbers and arrays are Python's.

    Args:
        key: What messages call it, such as `model.network`.
        value: From Python it may be anything.

    Raises:
        InputError: If torch would not load a checkpoint with it.
    """
    if isinstance(value, Mapping):
        return {plain_values(key, name): plain_values(f'{key}.{name}', each) for name, each in value.items()}
    if isinstance(value, COLLECTIONS):
        collection = next(kind for kind in COLLECTIONS if isinstance(value, kind))
        return collection(value if are_plain(value) else (plain_values(key, each) for each in value))
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if type(value) not in (bool, *BASES) and not isinstance(value, Enum):
        value = next((plain(value) for kind, plain in BASES.items() if isinstance(value, kind)), value)
    if type(value) not in PLAIN and not loads(value):
        raise InputError(message(
            f'{key}: {value!r}', 'no checkpoint with it could be loaded: it holds plain values, not code',
            'give it by its name, as on the command line, or by what it is made from'))
    return value


def is_plain(value: Any) -> bool:
    """Return whether `plain_values` makes a value plain: no code, class or enumeration, and no array of images."""
    if isinstance(value, Mapping):
        return are_plain_keys(value) and all(map(is_plain, value.values()))
    if isinstance(value, set):
        return are_plain_keys(value)
    if isinstance(value, (list, tuple)):
        return are_plain(value) or all(map(is_plain, value))
    return isinstance(value, (type(None), *BASES, os.PathLike, np.generic)) and not isinstance(value, Enum)


def are_plain_keys(values: Collection[Any]) -> bool:
    """Return whether YAML can read these as keys, which sets have, too: no tuples, which it has as lists."""
    return are_plain(values) or not any(isinstance(value, tuple) or not is_plain(value) for value in values)


def are_plain(values: Collection[Any]) -> bool:
    """Return whether all of many values, such as a million paths, are plain as they are."""
    return PLAIN.issuperset(map(type, values))


def check_choices(key: str, settings: Any, kind: type) -> None:
    """Raise `InputError` for a word that is none of those of its field; on the command line the parser does.

    Args:
        key: What messages call the settings, such as `model.loss`.
        settings: An instance of `kind`, or of a subclass.
        kind: A dataclass.
    """
    for name, hint in get_type_hints(kind).items():
        if get_origin(hint) is Literal and (value := getattr(settings, name)) not in get_args(hint):
            raise InputError(unknown(f'{key}.{name}', str(value), get_args(hint)))


def loads(value: Any) -> bool:
    """Return whether torch loads what it saves of a value, as `weights_only` has it."""
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:  # of many kinds, some from within the value
        return False
    return True
