"""The commands that are no methods of Lightning's Trainer; what they are is imported when one runs, not before."""
from __future__ import annotations

from dataclasses import dataclass

__all__ = ['PROG', 'VERBS', 'Verb']

PROG = 'python -m lightning_app'  # in front of each command


@dataclass(frozen=True)
class Verb:
    """A command: a function, whose arguments are the options.

    Attributes:
        function: Where it is, as `MODULE:NAME`.
        named_arguments: Where the function is that names what the command line has without names, if it has such.
        unnamed: Arguments that the help leaves out, as a command line has them without their names.
        usage: What follows the command, where that is not to be seen from the arguments.
    """

    function: str
    named_arguments: str | None = None
    unnamed: tuple[str, ...] = ()
    usage: str | None = None


VERBS = {
    'analyze': Verb('lightning_app.analysis.analyze:analyze'),
    'benchmark': Verb('lightning_app.benchmark:benchmark'),
    'compare': Verb('lightning_app.analysis.compare:compare'),
    'dashboard': Verb('lightning_app.dashboard:dashboard'),
    'export': Verb('lightning_app.export:export'),
    'loading': Verb('lightning_app.loading:loading'),
    'prepare': Verb('lightning_app.prepare:prepare'),
    'sweep': Verb(
        'lightning_app.sweep:sweep', named_arguments='lightning_app.sweep:named_arguments',
        unnamed=('file', 'options'), usage='FILE [--dry_run] [--folder FOLDER] [options of fit]'),
}
