"""What the parser finds wrong, in three lines."""
from __future__ import annotations

import dataclasses
import os
import re
import textwrap
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path

from jsonargparse import ArgumentParser
from jsonargparse._parameter_resolvers import get_signature_parameters

from se_timm.errors import meant, message, nearby, nearest

from . import callbacks, data
from .verbs import VERBS

__all__ = ['LINKED', 'explain', 'linked_key', 'missing_package', 'three_lines']

# what options are called by the arguments of timm's train.py, and by others, where that is far from the name here
ELSEWHERE = {
    'aa': 'data.augment.auto_augment', 'amp': 'trainer.precision', 'amp_dtype': 'trainer.precision',
    'aug_repeats': 'data.repeats', 'aug_splits': 'data.augment.splits', 'bce_loss': 'model.loss.name',
    'bf16': 'trainer.precision', 'bs': 'data.batch_size', 'checkpoint': 'ckpt_path', 'data_dir': 'data.root',
    'dataset': 'data', 'drop': 'model.network', 'drop_block': 'model.network', 'drop_path': 'model.network',
    'dropout': 'model.network', 'ema': 'trainer.callbacks', 'epochs': 'trainer.max_epochs',
    'fp16': 'trainer.precision', 'gpus': 'trainer.devices', 'grad_accum_steps': 'trainer.accumulate_grad_batches',
    'img_size': 'data.image_size', 'initial_checkpoint': 'model.network', 'input_size': 'data.image_size',
    'kd_model_name': 'model.distill', 'label_smoothing': 'model.loss.smoothing', 'learning_rate': 'model.optim.lr',
    'log_interval': 'trainer.log_every_n_steps', 'log_wandb': 'trainer.logger', 'model_ema': 'trainer.callbacks',
    'opt': 'model.optim.name', 'optimizer': 'model.optim.name', 'output': 'trainer.default_root_dir',
    'pretrained': 'model.network', 'recount': 'data.augment.erasing_count', 'remode': 'data.augment.erasing_mode',
    'reprob': 'data.augment.random_erasing', 'resume': 'ckpt_path', 'sched': 'model.schedule.name',
    'scheduler': 'model.schedule.name', 'smoothing': 'model.loss.smoothing', 'sync_bn': 'trainer.sync_batchnorm',
    'teacher': 'model.distill', 'torchcompile': 'model.compile', 'tta': 'data.eval_views',
    'validation_batch_size': 'data.eval_batch_size', 'wd': 'model.optim.weight_decay', 'workers': 'data.num_workers',
    'world_size': 'trainer.devices',
}
LINKED = {'model.num_classes': 'data.num_classes'}  # a key that follows from the data, and the one that may be given


def explain(text: str, parser: ArgumentParser) -> str:
    """Return jsonargparse's error `text` as a message with the nearest valid key of `parser` or its subcommands."""
    if complete := three_lines(text):
        return complete
    while nested := _OF_A_CLASS.search(text):
        text = f'Parser key "{nested[1]}.{nested[3]}":\n{textwrap.dedent(nested[4])}'
    for pattern, describe in _CASES.items():
        if match := re.search(pattern, text):
            return describe(match, parser)
    first, _, rest = text.partition('\n')
    return message(first, ' '.join(rest.split()) or 'the parser cannot use it',
                   'see python -m lightning_app fit --help, or fit --config ... --print_config for what is set'
                   if _has_data(parser) else f'see {parser.prog} --help')


def three_lines(text: str) -> str | None:
    """Return the message of ours that a library, or a worker process, has wrapped in a text of its own; else None."""
    match = re.search(r'([^\n]*)\n *why: ([^\n]*)\n *do:  ([^\n]*)', text)  # jsonargparse indents what it lists
    if match is None:
        return None
    given = re.split(r'failed: |InputError: |^ *- ', match[1])[-1]
    return message(given, match[2], match[3])


def missing_package(text: str) -> str | None:
    """Return the message for what Lightning says of a package that a class of its own needs; None for another text."""
    if match := re.search(r'`(\w+)` (?:requires|cannot)[^\n]*pip install[^\n]*', text):
        return message(match[1], match[0], 'install the package, or leave the class out')
    if packages := re.findall(r"Try running `pip install -U '([^`]*)'`", text):
        return message(packages[-1], 'this package, which a class that is named needs, is not installed, or too old',
                       f"pip install '{packages[-1]}', or leave the class out")
    return None


def linked_key(key: str, where: str) -> str:
    """Return the message for a key that is set although it follows from another."""
    return message(f'{key} {where}', 'it follows from the data, and setting it would have no effect',
                   f'remove it; {LINKED[key]} is found from the images, or can be given')


def _keys(parser: ArgumentParser) -> list[str]:
    """Return all keys of `parser` and its subcommands that may be set."""
    own = {action.dest for each in _parsers(parser) for action in each._actions} - LINKED.keys()
    if not _has_data(parser):
        return sorted(own)
    of_data = {f'data.augment.{field.name}' for field in dataclasses.fields(data.Augment)}
    of_data |= {f'data.{parameter.name}' for name in data.__all__ if name.endswith('DataModule')
                for parameter in get_signature_parameters(getattr(data, name))}
    return sorted(own | of_data)


def _parsers(parser: ArgumentParser) -> list[ArgumentParser]:
    subcommands = getattr(parser, '_subcommands_action', None)
    return [parser, *(subcommands._name_parser_map.values() if subcommands else [])]


def _positional(parser: ArgumentParser) -> str | None:
    """Return what the arguments without an option are called, if the command takes such."""
    return next((str(action.metavar) for action in parser._actions if action.nargs == '+'), None)


def _has_data(parser: ArgumentParser) -> bool:
    """Return whether the command has images; the options of a data module are not the parser's own."""
    return any(action.dest == 'data' for each in _parsers(parser) for action in each._actions)


def _nearest_keys(key: str, keys: list[str]) -> list[str]:
    """Return the keys like `key`: the same name in another group first, then similar ones; groups are left out."""
    if (here := ELSEWHERE.get(key.rpartition('.')[2].replace('-', '_'))) in keys:
        return [here]
    leaves = [each for each in keys if not any(other.startswith(f'{each}.') for other in keys)]
    names = {leaf.rpartition('.')[2] for leaf in leaves}
    group, _, name = key.rpartition('.')
    alike = [leaf for near in nearest(name, names) for leaf in leaves if leaf.rpartition('.')[2] == near]
    return sorted(alike, key=lambda leaf: leaf.rpartition('.')[0] != group)[:3]


def _suggest(name: str, options: Iterable[str], otherwise: str) -> str:
    return meant(nearest(name, options)) or otherwise


def _unknown_key(match: re.Match[str], parser: ArgumentParser) -> str:
    key = re.split(r'[= ]', match[1].lstrip('-'))[0]
    if key in LINKED:
        return linked_key(key, 'on the command line')
    if key.startswith(('model.class_path', 'model.init_args')):
        return _class_of_model(match[1], 'YourClass')
    if not match[1].startswith('-') and (several := _positional(parser)):
        return message(match[1], f'it stands apart from the first {several}',
                       f'name each {several} before the options')
    if not match[1].startswith('-') and os.path.isdir(match[1]):
        return message(match[1], 'a folder alone is no option', f'say --data.root {match[1]}')
    dashes = '--' * ('unrecognized arguments' in match.string)  # as on the command line, not in a file
    close = [f'{dashes}{each}' for each in _nearest_keys(key, _keys(parser))]
    return message(match[1], 'there is no such option', meant(close) or (
        'see python -m lightning_app fit --print_config for all there are' if _has_data(parser)
        else f'see {parser.prog} --help for all there are'))


def _unknown_class_option(match: re.Match[str], parser: ArgumentParser) -> str:
    module, _, name = match[1].rpartition('.')
    valid = [parameter.name for parameter in get_signature_parameters(getattr(import_module(module), name))]
    option = re.split(r'[= ]', match[2].lstrip('-'))[0]
    if option == 'class_path':  # something stands beside class_path and init_args
        beside = re.findall(r"'(\w+)':", match.string.rpartition('Given value: ')[2])
        return message(f'{name}: {", ".join(key for key in beside if key not in ("class_path", "init_args"))}',
                       'it stands beside class_path', 'put the options of a class under init_args')
    if option.startswith('augment.'):
        return _unknown_key(re.match(r'(.*)', f'data.{option}'), parser)  # type: ignore[arg-type]
    return message(f'{name}: {match[2].lstrip("-")}', f'{match[1]} has no such option',
                   _suggest(option, valid, f'valid: {", ".join(valid)}' if valid else
                            'it has none; those of a class stand behind the --config, or the option, that names it'))


def _group(match: re.Match[str], parser: ArgumentParser) -> str:
    """What a group got in place of its options, one of which may have been meant."""
    key, value = match[1], match[2]
    options = [each for each in _keys(parser) if f'.{key}.' in f'.{each}']
    if key == 'model' and re.fullmatch(r'(\w+\.)+[A-Z]\w*', value):
        return _class_of_model(f'{key}: {value}', value.rpartition('.')[2])
    name = next((each for each in options if each.endswith(f'{key}.name')), None)
    return message(f'{key}: {value}', 'it is a group of options, and this is no file with them',
                   f'did you mean --{name}={value}?' if name else f'give each by its name, such as {options[0]}')


def _class_of_model(given: str, name: str) -> str:
    return message(given, 'the class of the model is none of the options',
                   f'run a script of yours that calls lightning_app.cli.main(model_class={name}), see README.md')


def _mapping(match: re.Match[str], parser: ArgumentParser) -> str:
    return message(f'{match[1]}: {match[2]}', 'it takes names with their values',
                   f"say --{match[1]}.NAME=VALUE for each, or --{match[1]} '{{NAME: VALUE, ...}}'")


def _distill(match: re.Match[str], parser: ArgumentParser) -> str:
    return message(f'model.distill: {match[1]}', 'it is a group of options, and this is no file with them',
                   "say --model.distill.teacher=NAME, one of timm's networks, and --model.distill.network "
                   "'{pretrained: true}', or '{checkpoint_path: FILE}'")


def _wrong_value(match: re.Match[str], parser: ArgumentParser) -> str:
    choices = re.findall(r"'([^']+)'", match[2]) if 'Literal' in match[2] else []
    wanted = f'it must be one of {", ".join(choices)}' if choices else f'it must be {_type_name(match[2])}'
    return message(f'{match[1]}: {match[3]}', wanted,
                   _suggest(match[3], choices, 'correct the value'))


def _wrong_choice(match: re.Match[str], parser: ArgumentParser) -> str:
    choices = dict.fromkeys(re.findall(r"'([\w.-]+)'", ' '.join(re.findall(r'Literal\[[^]]*\]', match[0]))))
    choices |= dict.fromkeys(('true', 'false') if re.search("Subtypes: .*<class 'bool'>", match[0]) else ())
    return message(f'{match[1]}: {match[2]}', f'it must be one of {", ".join(choices)}',
                   _suggest(match[2], choices, 'correct the value'))


def _unknown_class(match: re.Match[str], parser: ArgumentParser) -> str:
    key, given = match[1], match[2]
    if key == 'data':
        return _unknown_data(given)
    module = key.rpartition('.')[2]
    kind, names = CLASSES.get(module, ('class', ()))
    close = [*nearest(given.rpartition('.')[2], names), *names]
    example = f', such as lightning_app.{module}.{close[0]}' if close else ''
    return message(f'{key}: {given}', f'there is no such {kind}', f'name a class by its import path{example}')


def _number_of_values(match: re.Match[str], parser: ArgumentParser) -> str:
    return message(f'{match[1]}: {match[3]}', f'it takes {match[2]} values', 'give as many, in brackets')


def _wrong_values(match: re.Match[str], parser: ArgumentParser) -> str:
    return message(f'{match[1]}: {match[3]}', f'it must be a {match[2]}', 'correct the values')


def _list(match: re.Match[str], parser: ArgumentParser) -> str:
    count = match[2].count(',') + 1 if match[2].startswith('tuple') else 1
    given = '[' + ', '.join([match[3].strip()] * count) + ']'
    # an option of a data module is named without its group
    key = next((key for key in _keys(parser) if f'.{key}'.endswith(f'.{match[1]}')), match[1])
    return message(f'{key}: {match[3]}', 'it takes a list', f"put it in brackets, such as --{key} '{given}'")


def _type_name(text: str) -> str:
    named = {"<class 'float'>": 'a number', "<class 'int'>": 'a whole number', "<class 'bool'>": 'true or false',
             "<class 'str'>": 'a text'}
    return named.get(text, text)


def _incomplete(match: re.Match[str], parser: ArgumentParser) -> str:
    return message(f'{match[1]} without {match[2]}', 'it is the one setting of this group that must be given',
                   f'say --{match[1]}.{match[2]} too, or leave {match[1]} out')


def _no_value(match: re.Match[str], parser: ArgumentParser) -> str:
    if match[1] == '--data':  # the parser forgets which of them it was
        return message('an option of the data without a value', 'each takes one', 'say --data.NAME=VALUE')
    if match[1] == '--model.distill':  # or which of its own
        return message('an option of model.distill without a value', 'each takes one', 'say --model.distill.NAME=VALUE')
    return message(f'{match[1]} without a value', 'it takes one', f'say {match[1]}=VALUE')


def _linked(match: re.Match[str], parser: ArgumentParser) -> str:
    return linked_key(match[1], 'on the command line')


def _missing_file(match: re.Match[str], parser: ArgumentParser) -> str:
    return message(f'config: {match[1]}', 'there is no such file',
                   nearby(Path(match[1]), 'name a config, such as configs/quickstart.yaml'))


def _unknown_command(match: re.Match[str], parser: ArgumentParser) -> str:
    commands = [*re.findall(r"'?(\w+)'?", match[2]), *VERBS]
    return message(match[1], 'there is no such command', _suggest(match[1], commands, f'valid: {", ".join(commands)}'))


def _unknown_data(given: str) -> str:
    classes = [name for name in data.__all__ if name.endswith('DataModule') and name != 'ImageDataModule']
    return message(f'data: {given}', 'there is no such data module',
                   _suggest(given.rpartition('.')[2], classes, f'valid: {", ".join(classes)}'))


def _missing_data(match: re.Match[str], parser: ArgumentParser) -> str:
    return message('data: none', 'the command needs images',
                   'say --config configs/quickstart.yaml, or --data ImageNetDataModule --data.root DIR')


def _missing_argument(match: re.Match[str], parser: ArgumentParser) -> str:
    name = _positional(parser) or match[1]
    return message(f'no {name}', 'the command needs it', f'give it; see {parser.prog} --help')


# what a key takes, by the module that has some of them, and their names, the likeliest first
CLASSES: dict[str, tuple[str, Iterable[str]]] = {
    'logger': ('logger', ('CsvLogger', 'WandbLogger')),
    'callbacks': ('callback', ('Throughput', *callbacks.__all__))}
# what the parser says of an option of a class, within what it says of all that may be given in place of the class
_OF_A_CLASS = re.compile(
    r'Parser key "([\w.]+)":\n(?:.*\n)*?.*class_path .*:\n( +)Parser key "([\w.]+)":\n((?:\2 +.*(?:\n|$))+)')
# the parser's text (most telling first) -> what is said of it
_CASES: dict[str, Callable[[re.Match[str], ArgumentParser], str]] = {
    r'Parser key "([\w.]+)":\s+Does not validate[^$\[]*Subtypes: \[[^\n]*?((?:list|tuple)\[(?:str|int|float)[^\]]*)'
    r'[^$]*?Given value: (?!\[)(\S+)': _list,
    r'Parser key "([\w.]+)":\s+Expected a <class \'(list|tuple)\'>\. Got value: (?!\[)([^\n]*)': _list,
    r'Parser key "([\w.]+)":[^$]*Expected a tuple with (\d+) elements[^$]*Given value: ([^\n]*)': _number_of_values,
    r'Parser key "([\w.]+)":[^$]*Subtypes: \[(?:<class .NoneType.>, )?((?:list|tuple)\[(?:str|int|float)[^]]*\])'
    r'[^$]*Expected a <class [^$]*'
    r'Given value: (\[[^\n]*)': _wrong_values,
    r"class_path '([\w.]+)':\s+Option '([\w.]+)' is not accepted": _unknown_class_option,
    r"class_path '([\w.]+)':\s+unrecognized arguments: (\S+)": _unknown_class_option,
    r"does not accept option '([\w.]+)'": _unknown_key,
    r'unrecognized arguments: (\S+)': _unknown_key,
    r'Parser key "([\w.]+)":\s+Unable to load config \'([^\']*)\'': _group,
    r'Parser key "([\w.]+)":\s+Expected an? <class \'dict\'>\. Got value: ([^\n]*)': _mapping,
    r'Parser key "([\w.]+)":[^$]*Subtypes: \[(?:<class .NoneType.>, )?dict\[str[^$]*Given value: ([^$]*)': _mapping,
    r'argument (?:-\w/)?(--[\w.]+): expected one argument': _no_value,
    r'argument .*--> ([\w.]+):': _linked,
    r'Linked "([\w.]+)" must be given': _linked,
    r'Parser key "([\w.]+)":\s+Expected an? (.+?)\. Got value: ([^\n]*)': _wrong_value,
    r'Parser key "([\w.]+)":[^$]*the following arguments are required: (\w+)': _incomplete,
    r'Parser key "([\w.]+)":[^$]*Subtypes: \[(?:<class .NoneType.>, )?(?:<class .int.>, )?'
    r'(<class .(?:int|float|bool|str).>)(?:, <class .NoneType.>)?\][^$]*Given value: (\S+)': _wrong_value,
    r'Parser key "model.distill":[^$]*import path[^$]*Given value: ([^$]*)': _distill,
    r"File does not exist: '([^']*)'": _missing_file,
    r"invalid choice: '(\w+)' \(choose from ([^)]*)\)": _unknown_command,
    r'Parser key "(data)":[^$]*(?:import path string|class path): (\S+)': _unknown_class,
    r'Parser key "([\w.]+)":[^$]*class_path \'([\w.]+)\':\s+(?:module|No module|Import|Unable)': _unknown_class,
    r'Parser key "([\w.]+)":[^$]*Expected a dot import path string: (\S+)': _unknown_class,
    r'Parser key "([\w.]+)":[^$]*does not correspond to a subclass[^$]*Given value: (\S+)': _unknown_class,
    r'--([\w.]+)\.help: (?:module .* attribute |No module named |Expected a dot import path string: )?["\']?'
    r'([\w.]+)': _unknown_class,
    r'Parser key "([\w.]+)":[^$]*Literal[^$]*Given value: (\S+)': _wrong_choice,
    r'arguments are required: \w*\.?data': _missing_data,
    r'arguments are required: (\w+)': _missing_argument,
}
