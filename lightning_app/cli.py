"""The command line: parsing, what a checkpoint supplies, the folder of a run and what is recorded there, and errors."""
from __future__ import annotations

import dataclasses
import logging
import os
import re
import shlex
import signal
import sys
import tempfile
import warnings
from argparse import SUPPRESS
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from enum import Enum
from inspect import Parameter, signature
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, get_args

import yaml
from jsonargparse import Namespace
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from se_timm.errors import (
    InputError,
    check_file,
    check_writable,
    existing,
    meant,
    message,
    nearest,
    until_nobody_reads,
)

from .callbacks.last_checkpoint import LastCheckpoint
from .callbacks.predictions import PredictionWriter
from .callbacks.stop_signals import EndAtOnce
from .checkpoints import CheckpointFiles, load_checkpoint, mapped, newest_whole, of_run
from .classifier import GROUPS, ImageClassifier
from .data import ImageDataModule
from .data.augment import Augment
from .folders import (
    LAUNCH,
    NEWEST,
    base_folder,
    checkpoint_to_resume,
    evaluation_folder,
    give_back,
    held,
    launch_id,
    run_folder,
    run_of,
    whole_run,
)
from .home import expand, expand_words
from .logger import WandbLogger, place_loggers
from .messages import LINKED, explain, linked_key, missing_package, three_lines
from .network import INITIAL_WEIGHTS, check_name
from .optim import check_schedule
from .processes import check_devices, check_launch, check_restarts, check_sync_batchnorm
from .provenance import provenance
from .verbs import PROG, VERBS

__all__ = ['AppCLI', 'main', 'run_verb']

# what Lightning calls the stage of each, and in place of its descriptions, the first lines of longer texts
SUBCOMMANDS = {
    'fit': ('train', 'Train a network.'),
    'validate': ('val', 'Evaluate a trained network on the validation images.'),
    'test': ('test', 'Evaluate a trained network on the test images.'),
    'predict': ('predict', 'Write the most probable classes of the images in a folder to a CSV file.')}
EVALUATIONS = [name for name in SUBCOMMANDS if name != 'fit']
# in place of Lightning's, which are of its own keywords
RESUMED = ('Checkpoint from which the training goes on: a file; `last`, the newest of the runs that is whole; '
           'or `auto`, the same, and a new training if there is none.')
EVALUATED = 'Checkpoint of a training. It supplies the settings that are not given, too.'
# With the Trainer's switch off, Lightning refuses these callbacks, which the configs name.
SWITCHES: dict[str, type] = {'enable_progress_bar': ProgressBar, 'enable_checkpointing': Checkpoint}

CKPT_PATH = '--ckpt_path'

# where 1 is a batch and 1.0 all of them: Lightning's type for them takes a whole number for the latter
LIMITS = [f'trainer.limit_{stage}_batches' for stage, _ in SUBCOMMANDS.values()]
# warnings of Lightning's that tell a user nothing: what it calls on torch newer than 2.12, that a resumed training goes
# on in its own folder, that processes should agree on what has been summed over them, and that validation images were
# shuffled: it thinks so of all samplers but torch's SequentialSampler
NO_NEWS = (r'`isinstance\(treespec, LeafSpec\)` is deprecated', 'Checkpoint directory .* exists and is not empty',
           r"It is recommended to use `self\.log\('(?:gates|val|test)/.*sync_dist=True",
           'You requested to overfit but enabled val dataloader shuffling')
# without the one that null leaves out
FILLED: dict[str, dict[str, Any]] = {
    'model': {name: kind for name, kind in GROUPS.items() if name != 'distill'}, 'data.init_args': {'augment': Augment}}

Configs = list[tuple[str, dict[str, Any]]]  # files, or what is given in their place, and their contents

# YAML has no form for them, and Lightning's Timer has one by default
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, each: dumper.represent_str(str(each.value)))


class Parser(LightningArgumentParser):
    """Lightning's parser, with errors of three lines and the nearest valid key."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{'prog': PROG, **kwargs})  # of --data.help too, which is a parser of its own

    def error(self, text: str, ex: Exception | None = None) -> Any:
        """Raise `InputError` in place of printing the usage, in which the one useful line drowns."""
        if not self.exit_on_error:
            return super().error(text, ex)
        raise InputError(explain(text, getattr(ex, 'subcommand_parser', None) or self)) from ex


class RecordConfig(SaveConfigCallback):
    """Writes the resolved config of a training to its folder and to every logger; it re-runs as it is.

    The loggers also get where the run comes from, those of an evaluation too, and checkpoints the id of the W&B run.
    All this once it is known that there is something to record: a training that is refused, for its data or as it
    cannot go on from a checkpoint, writes nothing into its folder.
    """

    folder: Path | None = None  # of a training, one that is its own

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Record an evaluation."""
        if stage != 'fit':
            super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Tell the loggers."""
        if trainer.is_global_zero:
            self.save_config(trainer, pl_module, 'fit')

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the config to the folder: nothing has refused to go on."""
        if trainer.is_global_zero and self.folder:
            self._save_to_folder(self.folder)

    def save_config(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Give the config to the loggers; called on rank 0 only."""
        if not trainer.loggers:
            return
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        recorded = {**config, 'provenance': provenance(trainer)}
        for logger in trainer.loggers:
            logger.log_hyperparams(recorded)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep the id of the W&B run, with which a resumed training goes on wherever the file lies then."""
        if runs := [logger.identity for logger in trainer.loggers if isinstance(logger, WandbLogger)]:
            checkpoint['wandb'] = runs

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Tell the loggers of an evaluation of what moment of the training the checkpoint is."""
        if trainer.state.fn != TrainerFn.FITTING:
            moment = {name: checkpoint[name] for name in ('epoch', 'global_step')}
            for logger in trainer.loggers:
                logger.log_hyperparams({'checkpoint': moment})

    def _save_to_folder(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        config = self.config.clone()
        if config.get('ckpt_path') and run_of(config.ckpt_path) == folder.resolve():
            config.ckpt_path = None  # the same run; the config is that of its beginning
        self.parser.save(config, folder / self.config_filename, skip_none=False, overwrite=True)
        (folder / LAUNCH).write_text(launch_id())


class AppCLI(LightningCLI):
    """LightningCLI for `ImageClassifier` and any `ImageDataModule`."""

    evaluated: dict[str, Any] = {}  # the checkpoint
    given_ckpt_path: str | None = None  # a file, or one of `NEWEST`
    made: tuple[Path, Path] | None = None  # the folder of the training, and what was there before it

    def __init__(self, *args: Any, asked: str | None = None, **kwargs: Any) -> None:
        """Build the parsers and run; of subcommands other than the one that is `asked` for, without their options."""
        self.asked = asked
        try:
            super().__init__(*args, **kwargs)
        except BaseException:
            if self.made:
                give_back(*self.made)
            raise

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Take the number of classes from the data."""
        parser.link_arguments('data', 'model.num_classes', compute_fn=_num_classes, apply_on='instantiate')
        let_switches_stand_alone(parser)
        for action in parser._actions:
            if action.dest in LIMITS:
                setattr(action, '_typehint', int | float | None)  # noqa: B010  (jsonargparse's own)

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        commands: Any = parser._subcommands_action
        for listed in commands._choices_actions:
            _, listed.help = SUBCOMMANDS[listed.dest]

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if self.asked not in (None, subcommand):  # options take longer than all the parsing
            return self.init_parser(**kwargs)
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        for action in parser._actions:
            if action.dest == 'ckpt_path':
                action.help = RESUMED if subcommand == 'fit' else EVALUATED
        if subcommand == 'predict':
            parser.add_argument('--output', type=str, default='predictions.csv', help='CSV file to write.')
            parser.set_defaults({'return_predictions': False})
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; where a checkpoint is evaluated, it supplies what is not given."""
        if args is not None and not isinstance(args, list):
            return super().parse_arguments(parser, args)
        given = with_checkpoint_last(sys.argv[1:] if args is None else args)
        configs = _configs(given)
        check_links(configs)
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = evaluated_checkpoint(given, configs)
            self.evaluated = checkpoint
            completed = complete_from_checkpoint(given, checkpoint, Path(folder))
            with warnings.catch_warnings():  # that the options of the program are given as arguments
                warnings.filterwarnings('ignore', "LightningCLI's args parameter")
                super().parse_arguments(parser, completed)
            self.config = expand(self.config)
            if checkpoint:
                self.config[self.config.subcommand].config.pop(0)  # that file is not the user's

    def _parse_ckpt_path(self) -> None:
        """Keep what is given; Lightning would replace it by what the checkpoint says."""

    def _set_seed(self) -> None:
        """Set the seed, which Lightning wants in 32 bits."""
        seed = self._get(self.config, 'seed_everything')
        if not isinstance(seed, bool) and isinstance(seed, int) and not 0 <= seed < 2 ** 32:
            raise InputError(message(
                f'seed_everything: {seed}', 'it is none of 32 bits', 'take a whole number from 0 to 4294967295'))
        super()._set_seed()

    def before_instantiate_classes(self) -> None:
        """Refuse, before any work, what would fail later or be ignored."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        check_devices(config.trainer)
        if self.subcommand:
            check_limit(self.subcommand, config.trainer)
        fill_groups(config)
        if self.subcommand == 'fit':
            check_writable('trainer.default_root_dir:', base_folder(config))
            check_restarts(config.ckpt_path)
            self.given_ckpt_path = config.ckpt_path
            config.ckpt_path = checkpoint_to_resume(base_folder(config), config.ckpt_path)
        if self.subcommand in EVALUATIONS:
            check_trained(self.subcommand, config)
            self._take_number_of_classes(config.data.init_args)

    def _take_number_of_classes(self, data: Namespace) -> None:
        """Set the number of classes as in the checkpoint, where it knows them: the data need not be asked."""
        number = self.evaluated.get('hyper_parameters', {}).get('num_classes')
        if (self.subcommand == 'predict' or self.evaluated.get('class_names')) and data.get('num_classes', 0) is None:
            data.num_classes = number

    def instantiate_classes(self) -> None:
        """Build all; refuse other processes than there are, and to evaluate a classifier without trained weights."""
        super().instantiate_classes()
        self.model.restores_generators = False  # nothing comes after it in this process
        if classes := self.evaluated.get('class_names'):
            self.datamodule.use_classes(classes)
        given = self._get(self.config, 'data').get('init_args') or {}
        for name in self.datamodule.at_default(self.evaluated.get('data_left_out', ()), given):
            rank_zero_warn(f'data.{name}: the checkpoint is without that of its training, which was no plain value; '
                           'here it is its default')
        if type(self.model) is not ImageClassifier:
            self.model.program = f'python {shlex.quote(sys.argv[0])}'
        check_launch(self.trainer)
        if self.subcommand == 'fit' and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            check_schedule(self.model.schedule, self.trainer.max_epochs or 0)
        check_sync_batchnorm(self.trainer, self._get(self.config_init, 'trainer').sync_batchnorm)
        trained = self.model.classes_of_weights
        if self.subcommand not in EVALUATIONS or self.config_init[self.subcommand].ckpt_path:
            return
        if trained is not None:
            raise InputError(message(
                f'{self.subcommand}: weights of {trained} classes', f'there are {self.model.net.num_classes} here, for '
                'which the classifier is random, and so would the result be',
                'train it first (fit), take data of the classes of the weights, or weights of those of the data'))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer, for a training with a folder of its own."""
        trainer = self._get(self.config_init, 'trainer')
        callbacks = trainer.callbacks if isinstance(trainer.callbacks, list) else [trainer.callbacks]
        refused = tuple(kind for switch, kind in SWITCHES.items() if trainer[switch] is False)
        kept = [callback for callback in callbacks if callback and not isinstance(callback, refused)]
        # last, as it wants to be: `--trainer.callbacks+=` can only add others behind it
        trainer.callbacks = sorted(kept, key=lambda callback: isinstance(callback, LastCheckpoint))
        check_callbacks(trainer.callbacks)
        if self.subcommand in EVALUATIONS:
            trainer.callbacks.append(EndAtOnce())
        if self.subcommand == 'predict':
            trainer.callbacks.append(PredictionWriter(self._get(self.config_init, 'output')))
            trainer.logger = False  # a table is written, and nothing else
        config = self.config_init[self.subcommand] if self.subcommand else self.config_init
        loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
        if self.subcommand in ('validate', 'test'):
            place_loggers(loggers, evaluation_folder(config, self.subcommand), self.subcommand)
        if self.subcommand != 'fit' or trainer.fast_dev_run:
            return self._built_trainer(**kwargs)
        above = existing(base_folder(config))
        folder = run_folder(config)
        self.made = folder, above
        logs_to_wandb = any(isinstance(logger, WandbLogger) for logger in loggers)
        run = whole_run(config.ckpt_path)
        if config.ckpt_path and run != folder:
            where = 'of a run in another folder' if run else f'in no folder of a run, which has a {LAUNCH}'
            rank_zero_info(f'{config.ckpt_path} is {where}: this training goes on in {folder}')
        goes_on = config.ckpt_path is not None and run in (None, folder)
        place_loggers(
            loggers, folder, resumed=wandb_runs(config.ckpt_path) if goes_on and logs_to_wandb else [], goes_on=goes_on)
        plugins = trainer.plugins if isinstance(trainer.plugins, list) else [trainer.plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            trainer.plugins = [*filter(None, plugins), CheckpointFiles()]
        built = self._built_trainer(**{**kwargs, 'default_root_dir': str(folder)})
        for callback in built.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RecordConfig):
                callback.folder = folder
        for callback in built.checkpoint_callbacks:  # the one that Lightning adds where the config names none, too
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                # resolved, as Lightning has it: a resumed run keeps its best score only if the folder's name is equal
                callback.dirpath = os.path.realpath(folder / 'checkpoints')
        return built

    def _run_subcommand(self, subcommand: str) -> None:
        folder = self.made and self.made[0]
        with held(folder) if folder else nullcontext(False) as waited:
            config = self.config_init[subcommand]
            if folder and waited and config.ckpt_path != self.given_ckpt_path:  # the other has written newer ones since
                config.ckpt_path = str(newest_whole(of_run(folder)) or config.ckpt_path)
            super()._run_subcommand(subcommand)

    def _built_trainer(self, **kwargs: Any) -> Trainer:
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (ValueError, RuntimeError, ModuleNotFoundError) as error:
            if three_lines(str(error)):
                raise
            raise MisconfigurationException(str(error)) from error  # as the rest of what Lightning refuses
        if not hasattr(trainer, 'val_check_interval'):  # where it is a time; Lightning's EarlyStopping asks for it
            trainer.val_check_interval = None  # type: ignore[assignment]
        return trainer


def check_callbacks(callbacks: list[Callback]) -> None:
    """Raise `InputError` if one is there twice: Lightning takes that only of those without a state, for both to act."""
    times = Counter(callback.state_key for callback in callbacks)
    if twice := [callback for callback in callbacks if times[callback.state_key] > 1]:
        name = type(twice[0]).__name__
        raise InputError(message(
            f'trainer.callbacks: {name}, {len(twice)} times', 'each would do what the other does',
            f'leave one out; where the config has {name} already, change it there'))


def let_switches_stand_alone(parser: LightningArgumentParser) -> None:
    """Let each option that is true or false stand for true without a value."""
    for action in parser._actions:
        kind = getattr(action, '_typehint', None)
        if action.nargs is None and bool in (kind, *get_args(kind)):
            action.nargs, action.const = '?', True


def fill_groups(config: Namespace) -> None:
    """Give their defaults to groups of a config with nothing below their names, all of which is commented out."""
    for section, kinds in FILLED.items():
        settings = config.get(section) or Namespace()
        for name, kind in kinds.items():
            if name in settings and settings[name] is None:
                settings[name] = Namespace(**dataclasses.asdict(kind()))


def _num_classes(data: ImageDataModule) -> int | None:
    return data.num_classes


def wandb_runs(ckpt_path: str | None) -> list[dict[str, Any]]:
    """Return the W&B runs of the training that wrote a checkpoint, see `RecordConfig`."""
    if ckpt_path is None:
        return []
    try:
        return mapped(ckpt_path).get('wandb', [])
    except Exception:  # of many kinds, for a file that is none: what is wrong is said where it is restored
        return []


def check_trained(subcommand: str, config: Namespace) -> None:
    """Raise `InputError` if the network to be evaluated has no trained weights, or the output cannot be written."""
    check_name(config.model.name)
    network = config.model.network or {}
    if config.ckpt_path is None and not any(network.get(name) for name in INITIAL_WEIGHTS):
        raise InputError(message(
            f'{subcommand}: {config.model.name} without weights', 'its weights are random, and so would the result be',
            "say --ckpt_path runs/.../best.ckpt, or --model.network '{pretrained: true}'"))
    if subcommand == 'predict':
        check_file('output:', Path(config.output), 'predictions.csv')


def evaluated_checkpoint(args: list[str], configs: Configs) -> dict[str, Any]:
    """Return the checkpoint of a training that is to be evaluated; an empty one where there is none.

    Args:
        args: Command line, starting with the subcommand.
        configs: The config files it names, with their contents.

    Raises:
        InputError: If there is no such checkpoint, or it cannot be read.
    """
    given = [content['ckpt_path'] for _, content in configs if 'ckpt_path' in content]
    path = str([None, *given, *_options(args, CKPT_PATH)][-1])
    if not args or args[0] not in SUBCOMMANDS or path in ('None', 'null') or (
            args[0] == 'fit' and path in NEWEST):
        return {}
    if args[0] == 'fit' and not Path(path).suffix and not Path(path).exists() and (close := nearest(path, NEWEST)):
        raise InputError(message(f'ckpt_path: {path}', 'there is no such file', meant(close)))
    checkpoint = load_checkpoint(path)  # that a training goes on from is tried, too, before any work
    return {} if args[0] == 'fit' or 'name' not in checkpoint.get('hyper_parameters', {}) else checkpoint


def complete_from_checkpoint(args: list[str], checkpoint: dict[str, Any], folder: Path) -> list[str]:
    """Return `args` with a config before all others that holds what the checkpoint to be evaluated knows.

    Args:
        args: Command line, starting with the subcommand.
        checkpoint: See `evaluated_checkpoint`.
        folder: Where the config is written.
    """
    if not checkpoint:
        return args
    hparams = dict(checkpoint['hyper_parameters'])
    hparams.pop('num_classes', None)  # is the data's
    config: dict[str, Any] = {'model': hparams, 'trainer': {'precision': checkpoint.get('precision')}}
    if data := checkpoint.get('data'):
        config['data'] = data
    file = folder / 'checkpoint.yaml'
    file.write_text(yaml.safe_dump(config))
    return [args[0], '--config', str(file), *args[1:]]


def with_checkpoint_last(args: list[str]) -> list[str]:
    """Return `args` with the checkpoint that they name at the end, so that no config takes its place.

    The `config.yaml` of a run may name none, and a training would begin anew, or an evaluation have no weights.
    """
    return [*args, *(f'{CKPT_PATH}={path}' for path in _options(args, CKPT_PATH)[-1:])]


def _options(args: list[str], *names: str) -> list[str]:
    """Return the values of an option with the given spellings in a command line."""
    values = []
    for arg, following in zip(args, [*args[1:], ''], strict=True):
        if arg in names:
            values.append(following)
        elif arg.startswith(tuple(f'{name}=' for name in names)):
            values.append(arg.split('=', 1)[1])
    return values


def _configs(args: list[str]) -> Configs:
    """Return the config files of a command line with their contents, files for one group within them included.

    Raises:
        InputError: If one is not YAML.
    """
    found = [(value, _read_yaml(value)) for value in _options(args, '--config', '-c')]
    groups = [('model', value) for value in _options(args, '--model')]
    groups += [(key, os.path.join(os.path.dirname(path) if os.path.isfile(path) else '', value))
               for path, content in found for key, value in content.items()
               if isinstance(value, str) and value.endswith(('.yaml', '.yml', '.json'))]
    return found + [(file, {key: _read_yaml(file)}) for key, file in groups]


def _read_yaml(given: str) -> dict[str, Any]:
    """Return what a config file holds, or what is given in place of one, such as `{num_classes: 5}`."""
    is_file = os.path.isfile(given)
    try:
        content = yaml.safe_load(Path(given).read_text() if is_file else given)
    except (yaml.YAMLError, ValueError) as error:  # the latter for 2026-02-30, and what is no text
        if not is_file:
            return {}  # the parser says so
        raise InputError(message(f'config: {given}', f'it is not YAML ({error})', 'correct it there')) from error
    return expand(content) if isinstance(content, dict) else {}


def check_links(configs: Configs) -> None:
    """Raise `InputError` if a config file sets a key that follows from another; jsonargparse would ignore it."""
    for given, content in configs:
        for key in LINKED:
            group, name = key.split('.')
            keys = content.get(group)
            if key in content or (isinstance(keys, dict) and name in keys):
                raise InputError(linked_key(key, f'in {given}'))


def check_limit(subcommand: str, trainer: Namespace) -> None:
    """Raise `InputError` if the command would see no batch, after which Lightning ends as if all were well."""
    stage, _ = SUBCOMMANDS[subcommand]
    key = f'limit_{stage}_batches'
    if trainer[key] == 0:
        raise InputError(message(
            f'trainer.{key}: {trainer[key]}', f'{subcommand} would do nothing',
            'leave it out, or take a number from 1'))


def run_verb(verb: str, args: list[str]) -> Any:
    """Run a verb that is no method of Lightning's Trainer: a function, whose arguments are the options.

    What the function collects in `*args` is what stands on the command line without an option, at least one.
    """
    entry = VERBS[verb]
    function = resolve_name(entry.function)
    named = resolve_name(entry.named_arguments) if entry.named_arguments else list
    parser = Parser(prog=f'{PROG} {verb}', allow_abbrev=False, description=(function.__doc__ or '').split('\n\n')[0])
    parser.add_function_arguments(function, as_group=False)
    let_switches_stand_alone(parser)
    for action in parser._actions:
        if action.dest in entry.unnamed:
            action.help = SUPPRESS
    several = [each for each in signature(function).parameters.values() if each.kind is Parameter.VAR_POSITIONAL]
    names = [each.name.removesuffix('s').upper() for each in several]
    for each, metavar in zip(several, names, strict=True):
        described = re.search(rf'^ *\*{each.name}: (.+)$', function.__doc__ or '', re.MULTILINE)
        parser.add_argument(each.name, nargs='+', metavar=metavar, help=described and described[1])
    usage = entry.usage or ' '.join([*(f'{each} [{each} ...]' for each in names), '[options]'])
    parser.usage = f'{PROG} {verb} {usage}'
    with until_nobody_reads(), refused_in_lines(verb, verb):
        options = parser.instantiate_classes(expand(parser.parse_args(named(args)))).as_dict()
        positional = [value for each in several for value in options.pop(each.name)]
        return function(*positional, **options)


@contextmanager
def refused_in_lines(what: str, command: str) -> Iterator[None]:
    """End this process with status 2 after a message of three lines, if something given cannot be used.

    Args:
        what: That Lightning refuses without such a message.
        command: Whose help tells of it.
    """
    try:
        yield
        return
    except SIGTERMException:  # Lightning's own, without a status
        sys.exit(128 + signal.SIGTERM)
    except (InputError, ModuleNotFoundError, ValueError) as error:
        if (text := three_lines(str(error)) or missing_package(str(error))) is None:
            raise
    except MisconfigurationException as error:
        text = message(what, str(error), f'see {PROG} {command} --help')
    print(f'\nerror: {text}', file=sys.stderr)
    sys.exit(2)


def is_no_advert(record: logging.LogRecord) -> bool:
    """Return whether a line of Lightning's is about the run, not one that proposes another product."""
    return 'Tip: For seamless' not in str(record.msg)


def check_class(verb: str, model_class: type[ImageClassifier]) -> None:
    """Raise `InputError` if a command trains networks, but not by this class."""
    if verb in ('benchmark', 'sweep') and model_class is not ImageClassifier:
        raise InputError(message(
            verb, f'it trains by ImageClassifier, not by {model_class.__name__}',
            f'run fit for each of yours; {PROG} {verb} is for the others'))


def main(args: ArgsType = None, run: bool = True, model_class: type[ImageClassifier] = ImageClassifier) -> Any:
    """Run the command line; the one entry for the shell, `python -m` and tests.

    Args:
        args: Arguments; those of the process where not given.
        run: False builds data, model and trainer (`cli.datamodule`, `cli.model`, `cli.trainer`) without a subcommand.
        model_class: What is trained and evaluated; the arguments of a subclass are options, too.

    Raises:
        SystemExit: With status 2 after a message of three lines, if something given cannot be used.

    Returns:
        The `AppCLI`, or what the function of another verb returns.
    """
    for warning in NO_NEWS:
        warnings.filterwarnings('ignore', warning)
    logging.getLogger('lightning.pytorch.utilities.rank_zero').addFilter(is_no_advert)
    given = sys.argv[1:] if args is None else args
    if isinstance(given, list):
        given = expand_words(given)
    if run and not given:
        commands = ','.join((*SUBCOMMANDS, *VERBS))
        print('\nerror: ' + message('no command', 'one is needed', f'{PROG} {{{commands}}} ...'), file=sys.stderr)
        sys.exit(2)
    if run and isinstance(given, list) and given[0] in VERBS:
        with refused_in_lines(given[0], given[0]):
            check_class(given[0], model_class)
        return run_verb(given[0], given[1:])
    parsers: dict[str, Any] = {
        'description': 'Train, evaluate and use Squeeze-and-Excitation networks, and all others of timm.',
        'epilog': f'Other commands: {", ".join(VERBS)}. {PROG} COMMAND --help tells more of each.',
        **{name: {'usage': f'{PROG} {name} [options]', 'description': text, 'allow_abbrev': False}
           for name, (_, text) in SUBCOMMANDS.items()}}
    asked = given[0] if isinstance(given, list) and given and given[0] in SUBCOMMANDS else None
    with refused_in_lines('trainer', 'fit'):
        return AppCLI(
            model_class, ImageDataModule, asked=asked, subclass_mode_data=True, args=given, run=run,
            parser_class=Parser,
            parser_kwargs={'prog': PROG, 'allow_abbrev': False, **(parsers if run else {'usage': f'{PROG} [options]'})},
            seed_everything_default=0, auto_configure_optimizers=False, load_from_checkpoint_support=False,
            trainer_defaults={'logger': False, 'enable_model_summary': False},
            save_config_callback=RecordConfig, save_config_kwargs={'save_to_log_dir': False})
