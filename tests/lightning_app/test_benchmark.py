"""The benchmark of the loop runs every row, on the same steps."""
import pytest

from lightning_app.cli import main

pytestmark = pytest.mark.usefixtures('in_tmp_path')


def test_every_row_is_timed(capsys):
    ratios = main(['benchmark', '--name=test_resnet', '--batch_size=2', '--size=32', '--steps=8', '--rounds=1',
                   '--accelerator=cpu'])
    shown = capsys.readouterr()
    assert 'round 1 of 1' in shown.err
    assert ratios.pop('bare PyTorch') == 1
    assert len(ratios) == 6
    assert all(ratio > 0 for ratio in ratios.values())
    text = shown.out
    assert 'test_resnet, batches of 2 images of 32 px' in text
    assert all(row in text for row in ratios)


def test_validation_with_and_without_gates(capsys):
    ratios = main(['benchmark', '--stage=validate', '--name=se_resnet20_cifar', '--batch_size=2', '--size=32',
                   '--steps=8', '--rounds=1', '--accelerator=cpu'])
    assert list(ratios) == ['without', 'with Gates']
    assert ratios['without'] == 1
    assert ratios['with Gates'] > 0
    assert 'a step of validate' in capsys.readouterr().out


def test_unknown_option(cli_error):
    assert 'rounds' in cli_error(['benchmark', '--round=3'])[2]


@pytest.mark.parametrize(('option', 'do'), [
    ('--steps=5', 'take a number from 6'), ('--rounds=0', 'from 1'), ('--batch_size=0', 'from 1'),
    ('--size=0', 'from 1'), ('--threads=0', 'from 1'), ('--precision=16-mixed', 'bf16-mixed'),
    ('--accelerator=foo', 'correct')])
def test_what_cannot_be_measured(option, do, cli_error):
    assert do in cli_error(['benchmark', option])[2]


@pytest.mark.parametrize(('options', 'given', 'why'), [
    (['--name=test_vit3', '--size=32'], 'size: 32', 'does not take such images'),
    (['--name=se_resnet18', '--batch_size=1', '--size=32'], 'batch_size: 1 with size: 32', 'more than 1 value'),
    (['--name=test_resnet', '--size=32', '--stage=validate'], 'name: test_resnet with stage: validate', 'no SE')])
def test_network_that_cannot_be_measured(options, given, why, cli_error):
    lines = cli_error(['benchmark', *options])
    assert lines[0] == given
    assert why in lines[1]
