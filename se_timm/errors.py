"""Messages for users: what was given, why it is wrong, what to do, with the nearest valid name."""
from __future__ import annotations

import argparse
import difflib
import importlib.util
import os
import select
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NoReturn

from torch import nn

__all__ = [
    'ArgumentParser', 'InputError', 'check_file', 'check_installed', 'check_least', 'check_module', 'check_switches',
    'check_writable', 'existing', 'exit_status', 'is_installed', 'meant', 'message', 'nearby', 'nearest', 'unknown',
    'until_nobody_reads',
]


class InputError(ValueError):
    """Something a user gave cannot be used; the text is a `message`. The command line prints it without a traceback."""


def message(given: str, reason: str, remedy: str) -> str:
    """Return the three lines that every user error of this project consists of.

    Args:
        given: What the user gave, with its value.
        reason: Why that cannot be used.
        remedy: What to do instead.
    """
    given, reason, remedy = (' '.join(text.split()) for text in (given, reason, remedy))  # one line each
    return f'{given}\n  why: {reason}\n  do:  {remedy}'


def nearest(name: str, options: Iterable[str], count: int = 3) -> list[str]:
    """Return up to `count` of `options` that resemble `name`, whatever its case: those it begins first."""
    original = {str(option).lower(): str(option) for option in options}
    name = str(name).lower()
    begun = sorted((option for option in original if name and option.startswith(name)), key=len)[:count - 1]
    close = difflib.get_close_matches(name, original, n=count, cutoff=0.5)
    return [original[option] for option in dict.fromkeys([*begun, *close])][:count]


def meant(close: Sequence[str]) -> str:
    """Return for a `message` the question whether one of some names was meant, and a space; nothing without names."""
    return f'did you mean {" or ".join(close)}? ' if close else ''


def nearby(path: Path, remedy: str) -> str:
    """Return `remedy` after the question whether the nearest name beside a missing file or folder was meant."""
    parent = path.parent
    names = (entry.name for entry in parent.iterdir() if entry.name != path.name) if parent.is_dir() else ()
    close = nearest(path.name, names)  # not a link of that name which leads nowhere
    return meant([str(parent / name) for name in close[:1]]) + remedy


def unknown(kind: str, name: object, options: Iterable[object]) -> str:
    """Return the message for a value that is not one of `options`.

    Args:
        kind: What the value is, for example `'excitation'`.
        name: The value given.
        options: All valid values.
    """
    valid = sorted(str(option) for option in options)
    shown = ', '.join(valid) if len(valid) <= 24 else f'one of {len(valid)} names'
    return message(
        f'{kind}: {name!r}', f'there is no such {kind}', f'{meant(nearest(str(name), valid))}valid: {shown}')


def check_switches(**switches: object) -> None:
    """Raise `ValueError` for an argument that is neither True nor False."""
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise ValueError(message(f'{name}: {value!r}', 'it is a switch', 'say True or False'))


def check_module(function: str, net: object) -> None:
    """Raise `ValueError` for what a function cannot take as a network."""
    if not isinstance(net, nn.Module):
        raise ValueError(message(
            f'{function}({net!r:.60})', f'it is a {type(net).__name__}, not an nn.Module', 'give the network itself'))


def check_least(least: int, **numbers: float | None) -> None:
    """Raise `InputError` for a number below `least`, or NaN; None is a number that was not given."""
    for name, number in numbers.items():
        if number is not None and not number >= least:  # as NaN is, too
            why = 'it is too small' if number < least else 'it is no number'
            raise InputError(message(f'{name}: {number}', why, f'take a number from {least}'))


def is_installed(package: str) -> bool:
    """Return whether a package, by its name in imports, is there."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # what it lies in
        return False


def check_installed(given: str, extra: str, *packages: str, otherwise: str = '') -> None:
    """Raise `InputError` if something needs packages that are not there.

    Args:
        given: What the user gave that needs them.
        extra: The extra of se-timm that brings them.
        packages: Their names in imports.
        otherwise: What can be done without them.
    """
    if missing := [package for package in packages if not is_installed(package)]:
        what = f'the package {missing[0]} is' if len(missing) == 1 else f'the packages {", ".join(missing)} are'
        remedy = f"pip install 'se-timm[{extra}]'" + (f', or {otherwise}' if otherwise else '')
        raise InputError(message(given, f'{what} not installed', remedy))


def check_file(option: str, file: Path | None, example: str) -> None:
    """Raise `InputError` if a file that shall be written after long work cannot be, None being no file.

    Args:
        option: What named it, as messages begin.
        file: The file; its folder may have to be made.
        example: A name for a file, for where a folder was given.
    """
    if file is None:
        return
    check_reached(option, file)
    if file.is_dir():
        raise InputError(message(f'{option} {file}', 'it is a folder', f'name a file in it, such as {file / example}'))
    if not file.exists():
        check_writable(option, file.parent)
    elif not os.access(file, os.W_OK):
        raise InputError(message(f'{option} {file}', 'you may not write to it', 'name another'))


def check_reached(option: str, path: Path) -> None:
    """Raise `InputError` for a path where nothing can be, such as one that is too long, or in a folder of another's."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise InputError(message(f'{option} {path}', f'there can be none ({why})', 'name another')) from error


def existing(folder: Path) -> Path:
    """Return the folder, or the nearest above it that is there."""
    return next(each for each in (folder, *folder.absolute().parents) if each.exists())


def check_writable(option: str, folder: Path) -> None:
    """Raise `InputError` if nothing can be written to a folder, which may have to be made."""
    check_reached(option, folder)
    there = existing(folder)
    try:
        with tempfile.TemporaryDirectory(dir=there):  # permissions do not tell all
            pass
    except OSError as error:
        raise InputError(message(
            f'{option} {folder}', f'{there} is a file' if not there.is_dir() else
            f'nothing can be written to {there} ({error.strerror})', 'name a folder to which you can write')) from error


class ArgumentParser(argparse.ArgumentParser):
    """Parses a command line with the errors of this project, and takes no abbreviations."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)
        self.register('type', Path, lambda text: Path(os.path.expanduser(text)))  # shells leave the ~ of --output=~/x

    def error(self, text: str) -> NoReturn:
        """Raise `InputError` in place of printing the usage."""
        raise InputError(message(text, 'the command line cannot be read so', f'{self.prog} --help lists the options'))


def is_broken(file: IO[str]) -> bool:
    """Return whether a file is a pipe from which nobody reads any more."""
    poll = select.poll()
    poll.register(file.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


@contextmanager
def until_nobody_reads() -> Iterator[None]:
    """End this process as SIGPIPE would, without a traceback, where what reads its output ends first, like `head`."""
    try:
        yield
        if sys.stdout:  # None where it is closed
            sys.stdout.flush()
    except BrokenPipeError:
        if not sys.stdout or not hasattr(select, 'poll') or not is_broken(sys.stdout):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more
        sys.exit(128 + signal.SIGPIPE)


def exit_status(command: Callable[[], int]) -> int:
    """Return the exit status of a command; 2, and the message on stderr, for what cannot be used."""
    try:
        with until_nobody_reads():
            return command()
    except InputError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
