"""The grid of a W&B sweep file, run here: one training after the other, without a server."""
from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from se_timm.errors import InputError, check_writable, meant, message, nearby, nearest

from .analysis.runs import cut_off, value_at
from .checkpoints import of_runs
from .cli import main
from .data.workers import STOP_SIGNALS, handled
from .files import replaced

__all__ = ['Run', 'combinations', 'named_arguments', 'read_sweep', 'runs_of', 'sweep']

ROOT, CHECKPOINT = '--trainer.default_root_dir', '--ckpt_path'
DRY_RUN = '--dry_run'  # a switch, which stands alone or with a value
OWN = {DRY_RUN: DRY_RUN, '--folder': '--folder', ROOT: '--folder'}  # what is not for fit, and its own name
# in the folder of a run, the settings with which it was begun, and with which it came to its end
BEGUN, FINISHED = 'begun.json', 'finished.json'
# settings of no consequence for what a training comes to, or that a resumed one may have otherwise
IMMATERIAL = (
    'ckpt_path', 'trainer.default_root_dir', 'trainer.logger', 'trainer.accelerator', 'trainer.devices',
    'trainer.num_nodes', 'trainer.strategy', 'data.init_args.num_workers', 'data.init_args.prefetch')
FREE = ('network', 'add_se', 'options')  # groups without keys of their own, in which each counts
REMARKS = {'name', 'description', 'metric'}  # of no consequence for a grid
SERVER = {'project': 'WANDB_PROJECT', 'entity': 'WANDB_ENTITY'}  # where W&B has the runs, by what variable
KEYS = {'program', 'method', 'command', 'parameters', *SERVER, *REMARKS}
EXAMPLE = 'see configs/sweep/reduction.yaml for the form, or let W&B run it: wandb sweep FILE'
TRAINING = [sys.executable, '-m', 'lightning_app', 'fit']
REFUSED = {
    CHECKPOINT: ('each training goes on from its own checkpoint', 'leave it out'),
    ROOT: ('each training has its own folder', 'leave it out, and say --folder DIR for that of all'),
    '--print_config': ('there is a config for each training', 'say --dry_run for the commands')}


@dataclass(frozen=True)
class Run:
    """A training of a sweep.

    Attributes:
        name: Its combination of values.
        folder: Where its runs are.
        args: Of `python -m lightning_app`.
        environment: Variables beside those of this process.
        settings: What the arguments and the config files come to.
    """

    name: str
    folder: Path
    args: list[str]
    environment: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)

    def command(self) -> str:
        """Return what a shell takes."""
        variables = [f'{name}={shlex.quote(value)}' for name, value in self.environment.items()]
        return ' '.join([*variables, shlex.join(['python', *TRAINING[1:3], *self.args])])


def sweep(file: str, dry_run: bool = False, folder: str | None = None, options: list[str] | None = None) -> None:
    """Run the grid (`method: grid`) of a W&B sweep file, one training after the other. Other options are for fit.

    Each training is a process of its own, with a folder of its own, named after its values. The same command goes on
    where it was interrupted: trainings that are finished are left out, the others resume. One that fails does not stop
    the next.

    Args:
        file: The sweep file, with `method: grid`.
        dry_run: Only print the commands.
        folder: Where the trainings' folders are, `runs/sweep/NAME-OF-FILE` where not given; also
            `--trainer.default_root_dir`.
        options: What is none of these is for `fit`, and wins over the file.

    Raises:
        InputError: For a sweep that cannot be run so, and for arguments that `fit` does not take, before any training.
        SystemExit: With status 1 if a training does not come to its end, 128 and more if a signal stops the sweep.
    """
    runs = checked(runs_of(file, folder, options or []))
    ended = {}
    for number, run in enumerate(runs, 1):
        finished = marked(run.folder / FINISHED) is not None
        print(f'{number} of {len(runs)}: {run.name}{", finished before" if finished else ""}', flush=True)
        if dry_run:
            print(run.command())
        elif not finished and (reason := train(run)):
            ended[run.name] = reason
    if ended:
        print(f'\n{len(ended)} of {len(runs)} are not finished; the same command goes on with them', file=sys.stderr)
        for name, reason in ended.items():
            print(f'  {name}: {reason}', file=sys.stderr)
        sys.exit(1)


def named_arguments(given: list[str]) -> list[str]:
    """Return the arguments of `sweep FILE [--dry_run] OPTIONS...` by name: what is not its own is for `fit`."""
    if not given or {'-h', '--help'} & set(given) or given[0].startswith('-'):
        return ['--help'] if {'-h', '--help'} & set(given) else []
    own, options, words = ['--file', given[0]], [], given[1:]
    while words:
        word = words.pop(0)
        name, equals, value = word.partition('=')
        if name not in OWN:
            options.append(word)
        elif equals:
            own += [OWN[name], value]
        elif name == DRY_RUN and words[:1] not in (['true'], ['false']):
            own.append(name)
        else:
            own += [OWN[name], *words[:1]]
            words = words[1:]
    return [*own, '--options', json.dumps(options)]


# The file


def read_sweep(file: str) -> dict[str, Any]:
    """Return the content of a sweep file.

    Raises:
        InputError: If it is none, or has what only W&B's server can do.
    """
    try:
        content = yaml.safe_load(Path(file).read_text())
    except FileNotFoundError as error:
        raise InputError(message(f'file: {file}', 'there is no such file', nearby(Path(file), EXAMPLE))) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(message(f'file: {file}', f'it cannot be read ({error})', EXAMPLE)) from error
    forms = {'parameters': dict, 'command': list}
    if not isinstance(content, dict) or not all(isinstance(content.get(key), form) and content[key]
                                                for key, form in forms.items()):
        raise InputError(message(f'file: {file}', 'it is no sweep: it needs parameters and a command', EXAMPLE))
    if content.get('method') != 'grid':
        raise InputError(message(
            f'method: {content.get("method")}', 'only a grid is run here; the others ask a server for each training',
            'say method: grid, or let W&B run it: wandb sweep FILE'))
    if unknown := [key for key in content if key not in KEYS]:
        close = nearest(unknown[0], KEYS)
        raise InputError(message(
            f'{unknown[0]}: {content[unknown[0]]}', 'a grid that is run here has no use for it',
            meant(close) or 'remove it, or let W&B run it: wandb sweep FILE'))
    return content


def combinations(parameters: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the combinations of the values, as texts, in the order of the file, the last parameter first to change.

    Raises:
        InputError: For a parameter without values, with one twice, or that each training has for itself.
    """
    values = []
    for name, given in parameters.items():
        if refused := REFUSED.get(f'--{name}'):
            raise InputError(message(f'parameters.{name}', *refused))
        values.append([text(value) for value in values_of(name, given)])
        if twice := [value for value in values[-1] if values[-1].count(value) > 1]:
            raise InputError(message(
                f'parameters.{name}: {twice[0]}', 'it is listed twice', 'list each value once; for several trainings '
                'that differ by chance, let seed_everything be a parameter'))
    return [dict(zip(parameters, each, strict=True)) for each in itertools.product(*values)]


def values_of(name: str, given: Any) -> list[Any]:
    """Return the values of a parameter.

    Raises:
        InputError: If there are none, but a distribution, or further parameters.
    """
    if isinstance(given, dict) and given.keys() == {'value'}:
        return [given['value']]
    if isinstance(given, dict) and given.keys() == {'values'} and isinstance(given['values'], list) and given['values']:
        return given['values']
    raise InputError(message(
        f'parameters.{name}: {given}', 'a grid goes over values, and keys have dots, as on the command line',
        'list them as values: [...], or let W&B run it: wandb sweep FILE'))


def text(value: Any) -> str:
    """Return a value as an option of the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def expanded(content: Mapping[str, Any], values: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """Return the command of a combination, and the variables that it sets.

    Raises:
        InputError: If it is not a training of this program.
    """
    macros = {'${env}': [], '${interpreter}': [sys.executable], '${program}': [str(content.get('program'))],
              '${args}': [f'--{name}={value}' for name, value in values.items()]}
    given = [str(word) for word in content['command']]
    command = [word for each in given for word in macros.get(each, [each])]
    variables = {}
    while given[0] == '${env}' and command and (match := re.fullmatch(r'(\w+)=(.*)', command[0])):
        variables[match[1]] = match[2]
        command = command[1:]
    strange = [word for word in command if word.startswith('${')]
    if strange or command[:len(TRAINING)] != TRAINING or '${args}' not in given:
        raise InputError(message(
            f'command: {" ".join(given)}', f'{strange[0]} is none of {", ".join(macros)}' if strange
            else 'it is not ${interpreter} -m lightning_app fit ... ${args}', EXAMPLE))
    return command[len(TRAINING) - 1:], variables


# The trainings


def runs_of(file: str, folder: str | None, options: list[str]) -> list[Run]:
    """Return the trainings of a sweep file, in a folder, with further options of `fit`.

    Raises:
        InputError: For a sweep that cannot be run so.
    """
    for option in options:
        if refused := REFUSED.get(option.partition('=')[0]):
            raise InputError(message(f'{option} with sweep', *refused))
    content, study = read_sweep(file), Path(file).stem
    base = Path(folder or f'runs/sweep/{study}')
    check_writable('folder:', base)
    chosen = combinations(content['parameters'])
    server = {variable: str(content[key]) for key, variable in SERVER.items()
              if key in content and variable not in os.environ}
    runs = []
    for values, name in zip(chosen, folders(chosen), strict=True):
        args, variables = expanded(content, values)
        runs.append(Run(
            ', '.join(f'{key}={value}' for key, value in values.items()), base / name,
            [*args, *options, f'{ROOT}={base / name}', f'{CHECKPOINT}=auto'],
            {'WANDB_RUN_GROUP': study, **server, **variables}))
    return runs


def varying_in(chosen: list[dict[str, str]]) -> list[str]:
    """Return the parameters in which the combinations differ."""
    return [name for name in chosen[0] if len({values[name] for values in chosen}) > 1]


def folders(chosen: list[dict[str, str]]) -> list[str]:
    """Return a name for the folder of each combination, of the parameters that vary."""
    varying = varying_in(chosen) or list(chosen[0])
    names: list[str] = []
    for values in chosen:
        parts = [f'{name}={plain(values[name])}' for name in varying]
        name = ','.join(parts)[:200]  # file systems take 255 bytes
        numbered = (f'{name}-{number}' for number in itertools.count(1))
        names.append(next(each for each in itertools.chain([name], numbered) if each not in names))
    return names


def plain(value: str) -> str:
    """Return a value as a part of a file's name, with the sign of a number."""
    sign = '-' if re.match(r'-[\d.]', value) else ''
    return sign + re.sub(r'[^a-zA-Z0-9_.+-]+', '-', value).strip('-')


def checked(runs: list[Run]) -> list[Run]:
    """Return the trainings with their settings.

    Raises:
        InputError: If two trainings would be the same, or one was begun or finished with other settings.
        SystemExit: With status 2, after the message, if `fit` does not take one.
    """
    runs = [with_earlier_folder(replace(run, settings=resolved(run))) for run in runs]
    found: dict[str, Run] = {}
    for run in runs:
        other = found.setdefault(json.dumps(run.settings, sort_keys=True), run)
        if other is not run:
            raise InputError(message(
                f'{other.name} and {run.name}', 'both would be the same training, as another option or config of the '
                'command wins over the parameters', 'leave it out, or let it stand before ${args} in the sweep file'))
        check_unchanged(run)
    return runs


def resolved(run: Run) -> dict[str, Any]:
    """Return the settings of a training, of the config files too, but for those that are immaterial."""
    printed = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(printed):
        warnings.simplefilter('ignore')  # of arguments that are not those of this process
        try:
            main([*run.args, '--print_config'])
        except SystemExit as end:
            if end.code:
                raise
    settings: dict[str, Any] = yaml.safe_load(printed.getvalue())
    for key in IMMATERIAL:
        group, _, name = key.rpartition('.')
        (value_at(settings, group) or {} if group else settings).pop(name, None)
    return settings


def with_earlier_folder(run: Run) -> Run:
    """Return a training with the folder that it has already: that named another one if other parameters varied then."""
    for marker in (run.folder / FINISHED, *run.folder.parent.glob(f'*/{FINISHED}'), run.folder / BEGUN,
                   *run.folder.parent.glob(f'*/{BEGUN}')):
        if (before := marked(marker)) is not None and before.get('settings') == run.settings:
            args = [f'{ROOT}={marker.parent}' if arg == f'{ROOT}={run.folder}' else arg for arg in run.args]
            return replace(run, folder=marker.parent, args=args)
    return run


def check_unchanged(run: Run) -> None:
    """Raise `InputError` if a training was begun or finished with other settings than the options and configs say."""
    for marker in (run.folder / FINISHED, run.folder / BEGUN):
        if (before := marked(marker)) is None or (marker.name == BEGUN and not of_runs(run.folder)):
            continue
        if other := first_difference(before['settings'], run.settings):
            raise InputError(message(
                f'{run.folder}: {marker.stem}', '{} was {} when it was trained, and is {} now'.format(*other),
                'change it back, or name another folder by --folder'))


def first_difference(before: Any, now: Any, key: str = '') -> tuple[str, Any, Any] | None:
    """Return key and values of the first setting that is another now; a new one, of a newer version, is none."""
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        before, now = dict(enumerate(before)), dict(enumerate(now))
    if isinstance(before, dict) and isinstance(now, dict) and key.rpartition('.')[2] not in FREE:
        found = (first_difference(before[name], now[name], f'{key}.{name}'.lstrip('.'))
                 for name in before if name in now)
        return next(filter(None, found), None)
    return None if before == now else (key, before, now)


def marked(marker: Path) -> dict[str, Any] | None:
    """Return what stands in a file of a training, None if there is none that is whole."""
    try:
        content = json.loads(marker.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def mark(marker: Path, run: Run) -> None:
    """Write the settings of a training to a file, whole or not at all."""
    marker.parent.mkdir(parents=True, exist_ok=True)
    with replaced(marker) as unfinished:
        unfinished.write_text(json.dumps({'settings': run.settings}))


def train(run: Run) -> str | None:
    """Run a training; return why it has not come to its end, None if it has.

    Raises:
        SystemExit: If this process was asked to stop; the training was told so, and has ended.
    """
    mark(run.folder / BEGUN, run)
    command = [*TRAINING[:-1], *run.args]
    process = subprocess.Popen(command, env={**os.environ, **run.environment})
    with passed_on(process) as received:
        status = process.wait()
    if received:
        print(f'{signal.Signals(received[0]).name}: the sweep ends; the same command goes on with it', file=sys.stderr)
        sys.exit(128 + received[0])
    if status:
        return f'exit status {status}'
    if any(run.folder.glob('version_*/config.yaml')):  # not so with trainer.fast_dev_run
        if cut_off(run.folder):
            return 'ended by trainer.max_time'
        mark(run.folder / FINISHED, run)
    return None


@contextlib.contextmanager
def passed_on(process: subprocess.Popen[Any]) -> Iterator[list[int]]:
    """Pass signals that ask to stop on to a process; yield the list of those.

    Not Ctrl-C, which terminals send to both; the second means to a training that it ends at once. Others may have sent
    it to this process alone.
    """
    received: list[int] = []

    def forward(number: int, frame: Any) -> None:
        received.append(number)
        if number != signal.SIGINT:
            process.send_signal(number)
            return
        with contextlib.suppress(RuntimeError):  # where it comes while a line is written
            print('SIGINT: the sweep ends when this training has; if no terminal told that, too: '
                  f'kill -TERM {os.getpid()}', file=sys.stderr, flush=True)

    with handled(forward, *STOP_SIGNALS):
        yield received
