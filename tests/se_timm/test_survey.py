"""`add_se` over the networks of timm, and the page that tells of them."""
import re
from pathlib import Path

import pytest
import timm
import torch

from se_timm import add_se
from se_timm.errors import message
from se_timm.survey import REDUCTION, Finding, closed, examine, families, main, markdown

PAGE = Path(__file__).parents[2] / 'docs' / 'add_se.md'
ROWS = re.findall(r'^\| (\w+) \| ([\w ]+) \| (?:slot|before|after|end)', PAGE.read_text(), re.MULTILINE)
PROVEN = [(family, name) for family, names in ROWS for name in names.split()]
QUICK = {  # timm's -> where its gates stand
    'test_resnet': 'slot', 'test_convnext': 'before', 'regnetx_002': 'before', 'densenet121': 'after',
    'mobilenetv2_035': 'before', 'resnest14d': 'after', 'ghostnet_050': 'after', 'test_vit': 'before',
    'mambaout_femto': 'before', 'dla46_c': 'after', 'resnetv2_18': 'before',
}
pytestmark = [pytest.mark.filterwarnings('ignore:.torch.jit:FutureWarning')]


@pytest.mark.parametrize('name', QUICK)
def test_network_computes_the_same_until_it_is_trained_and_after_removal(name):
    finding = examine('', name)
    assert finding == Finding('', name, finding.gates, QUICK[name], finding.share, finding.scripts)
    assert finding.gates > 2
    assert finding.scripts is (True if QUICK[name] == 'slot' else None)


@pytest.mark.slow  # one of each family; all of the page take a quarter of an hour by the command
@pytest.mark.parametrize(('family', 'name'), dict(reversed(PROVEN)).items())
def test_network_of_the_page_works(family, name):
    finding = examine(family, name)
    assert not finding.problem
    assert finding.scripts is not False


def test_a_gate_that_is_not_at_the_end_of_a_branch_is_found():
    net = timm.create_model('test_resnet').eval()
    add_se(net, 'layer3.0.bn2', reduction=4, identity_start=True)
    assert closed(net, torch.randn(1, 3, 64, 64)) == 'layer3.0.bn3.bias is not in a gated branch'


def test_page_has_the_families_that_it_should():
    assert len(PROVEN) >= 150
    assert len({family for family, _ in PROVEN}) >= 25
    assert {family for family, _ in PROVEN} <= set(families())


def test_survey_prints_and_writes_what_it_finds(tmp_path, capsys):
    assert main(['cpubone', 'efficientvim', '--count', '1', '--markdown', str(tmp_path / 'page.md')]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith('se_timm ')
    assert re.match(r'cpubone: cpubone_\w+: \d+ gates \(before\), \d+\.\d % of the parameters$', lines[1])
    assert re.match(r'efficientvim: efficientvim_\w+: none of its .* it runs 4 times in a forward pass', lines[2])
    page = (tmp_path / 'page.md').read_text()
    assert '1 networks of\n1 families' in page
    assert re.search(r'^\| cpubone \| cpubone_\w+ \| before \| \d+\.\d \|  \|$', page, re.M)
    assert re.search(r'^\| efficientvim \| efficientvim_\w+ .*\| none of its .* \|$', page, re.M)


def test_page_joins_what_is_the_same_in_a_family():
    page = markdown([
        Finding('a', 'a1', 3, 'slot', 0.01, True), Finding('a', 'a2', 4, 'after slot', 0.02, False),
        Finding('a', 'a3', problem='no'), Finding('a', 'a4', problem='no'), Finding('b', 'b1', problem='never')])
    assert '| a | a1 a2 | after slot | 1.0 to 2.0 | no |\n' in page
    assert '| a | a3 a4 | no |\n| b | b1 | never |\n' in page
    assert str(REDUCTION) in page


@pytest.mark.parametrize(('arguments', 'error'), [
    (['resent'], message("family: 'resent'", 'there is no such family', 'did you mean resnet')[:60]),
    (['--count', '0'], '--count 0\n  why: it is a number of networks'),
    (['--markdown', f'{__file__}/page.md'], f'--markdown {__file__}\n  why: {__file__} is a file'),
])
def test_survey_says_what_cannot_be(arguments, error, capsys):
    assert main(arguments) == 2
    assert error in capsys.readouterr().err
