"""`python -m se_timm.zoo`: every network beside the paper."""
import csv
import re

import pytest
import timm

from se_timm import zoo
from se_timm.measure import our_networks
from se_timm.paper import NETWORKS


@pytest.mark.slow
def test_every_network_is_in_the_table(capsys):
    assert zoo.main([]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    shown = {line[0]: line[1:] for line in lines if line and line[0] in NETWORKS}
    assert sorted(shown) == sorted(our_networks()) == sorted(NETWORKS)
    for name, network in NETWORKS.items():
        assert shown[name][0] == f'{network.parameters:,}'


def test_numbers_stand_beside_the_papers():
    (entry,) = zoo.entries(['se_resnet50'])
    assert (entry.parameters, entry.se_parameters, entry.image) == (28_088_024, 2_514_944 + 16_048, 224)
    assert (entry.paper_gflops, entry.paper_plain_gflops) == (3.87, 3.86)
    assert entry.gflops == pytest.approx(3.8605, abs=1e-4)
    assert entry.plain_gflops == pytest.approx(3.8580, abs=1e-4)
    assert entry.difference == pytest.approx(3.8605 / 3.87 - 1, abs=1e-4)
    assert entry.weights['ra2_in1k'] == 'huggingface.co/timm/seresnet50.ra2_in1k'
    assert set(entry.weights) == {name.split('.')[1] for name in timm.list_pretrained('se_resnet50.*')}


@pytest.mark.parametrize('name', [name for name, network in NETWORKS.items() if network.gflops])
def test_multiply_adds_are_within_one_per_cent_of_the_papers_or_it_says_why(name):
    (entry,) = zoo.entries([name])
    assert (abs(entry.difference) < 0.01) is (entry.why == '')


def test_reasons_of_differences_stand_below_the_table(capsys):
    assert zoo.main(['se_inception_resnet_v2']) == 0
    out = capsys.readouterr().out
    assert re.search(r'se_inception_resnet_v2\s+64,387,444\s+8,543,980\s+299\s+13\.1643', out)
    assert f'\n\ndifferences:\nse_inception_resnet_v2: {NETWORKS["se_inception_resnet_v2"].why}\n' in out
    assert zoo.main(['se_bn_inception']) == 0
    assert 'differences:' not in capsys.readouterr().out


def test_cifar_networks_are_counted_on_their_images(capsys):
    assert zoo.main(['se_resnet20_cifar']) == 0
    out = capsys.readouterr().out
    assert re.search(r'se_resnet20_cifar\s+274,847\s+2,373\s+32\s+0\.04', out)
    assert 'weights:' not in out


def test_table_has_the_digits_that_the_paper_prints(capsys):
    assert zoo.main(['se_mobilenetv1_100', 'se_vgg16_bn']) == 0
    assert re.search(r'0\.5692\s+0\.572\s+-0\.49 %\s+0\.5687\s+0\.569', out := capsys.readouterr().out)
    assert re.search(r'15\.4705\s+15\.48\s+-0\.06 %\s+15\.4703\s+15\.47', out)


def test_csv(tmp_path):
    assert zoo.main(['se_resnet18', 'se_resnet20*', '--csv', str(tmp_path / 'zoo.csv')]) == 0
    with (tmp_path / 'zoo.csv').open() as file:
        rows = {row['name']: row for row in csv.DictReader(file)}
    assert list(rows) == ['se_resnet18', 'se_resnet20_cifar']
    assert rows['se_resnet18']['parameters'] == '11778592'
    assert rows['se_resnet18']['weights'] == 'in1k'
    assert rows['se_resnet20_cifar']['paper_gflops'] == ''


@pytest.mark.parametrize(('arguments', 'given', 'remedy'), [
    (['resnet50'], "network: 'resnet50'", 'did you mean se_resnet50'),
    (['--csv', f'{__file__}/zoo.csv'], f'--csv {__file__}', 'name a folder to which you can write'),
    (['--csv', f'{"a" * 300}.csv'], '--csv aaa', 'name another'),
    (['--csv', f'{"a" * 300}/zoo.csv'], '--csv aaa', 'name another'),
    (['--cs', 'zoo.csv'], 'unrecognized arguments: --cs', 'python -m se_timm.zoo --help'),
])
def test_what_cannot_be_used_is_said(arguments, given, remedy, capsys):
    assert zoo.main(arguments) == 2
    first, why, do = capsys.readouterr().err.splitlines()
    assert first.startswith(f'error: {given}')
    assert why.startswith('  why: ')
    assert remedy in do


def test_table_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys):
    assert zoo.main(['se_resnet20_cifar', '--csv', str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f'error: --csv {tmp_path}\n  why: it is a folder\n')


def test_home_is_meant_by_a_tilde_after_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    assert zoo.main(['se_resnet20_cifar', '--csv=~/zoo.csv']) == 0
    assert (tmp_path / 'zoo.csv').is_file()


def test_folders_of_the_table_are_made(tmp_path):
    assert zoo.main(['se_resnet20_cifar', '--csv', str(tmp_path / 'new' / 'zoo.csv')]) == 0
    assert (tmp_path / 'new' / 'zoo.csv').read_text().count('\n') == 2
