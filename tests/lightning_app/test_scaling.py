"""The arithmetic of many machines, and the page that has its tables."""
import dataclasses
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lightning_app.scaling import (
    BUCKET,
    GPUS,
    Assumptions,
    Link,
    all_reduce,
    growing,
    main,
    meanings,
    networks,
    recipe,
    step_time,
    synchronised,
    tables,
)
from se_timm.fused.processes import joint_moments
from se_timm.paper import NETWORKS

PAGE = Path(__file__).parents[2] / 'docs' / 'scaling.md'
EXACT = Assumptions(reached=1., inside_us=1e-9, between_us=1e-9)  # no latency


@pytest.fixture(scope='module')
def net():
    return networks(Assumptions())[0]


@pytest.fixture(scope='module')
def found():
    return tables(Assumptions())


def test_page_has_the_tables_of_the_program(found):
    text = PAGE.read_text()
    assert re.findall(r'<!-- (?!end)(.*) -->', text) == list(found)
    for name, content in found.items():
        assert f'<!-- {name} -->\n{content}\n<!-- end -->' in text


def test_every_assumption_is_told():
    assert list(meanings()) == [field.name for field in dataclasses.fields(Assumptions)]
    assert all(len(text) > 10 for text in meanings().values())


def test_networks_are_those_of_the_paper():
    for each in networks(Assumptions()):
        assert each.parameters == NETWORKS[each.name].parameters
        assert 0 < each.parameters - each.plain_parameters < each.parameters / 10
    assert len(each.channels) == 157


def test_ring_sends_twice_the_bytes_but_for_the_own_share():
    link = Link(speed=1e9, latency=1e-3)
    assert link.ring(8e6, 4) == pytest.approx(2 * 3 / 4 * 8e-3 + 6e-3)
    assert link.ring(8e6, 1) == 0


def test_sum_is_one_ring_in_a_machine_and_one_between():
    size, inside = 2 * BUCKET, 450e9
    assert all_reduce(size, 8, 100, EXACT) == pytest.approx(2 * 7 / 8 * size / inside)
    assert all_reduce(size, 32, 100, EXACT) == pytest.approx(2 * 7 / 8 * size / inside + 2 * 3 / 4 * size / 12.5e9)
    # latency: once a bucket, 6 steps between four machines
    late = dataclasses.replace(EXACT, between_us=50.)
    assert all_reduce(size, 32, 100, late) - all_reduce(size, 32, 100, EXACT) == pytest.approx(2 * 6 * 50e-6)


def test_sums_hide_behind_the_backward_pass_but_for_the_last_bucket(net):
    compute, sums = 128 / net.speed, all_reduce(4 * net.parameters, 64, 400, Assumptions())
    assert sums < 0.8 * 2 / 3 * compute
    buckets = -(-4 * net.parameters // BUCKET)
    assert step_time(net, 64, 128, 400, Assumptions()) == pytest.approx(compute + sums / buckets)
    bare = dataclasses.replace(Assumptions(), hidden=1e-12)
    assert step_time(net, 64, 128, 400, bare) == pytest.approx(compute + sums)
    assert step_time(net, 64, 128, 100, bare, 'bfloat16') < step_time(net, 64, 128, 100, bare)


def test_host_sets_the_pace_where_images_are_few(net):
    fast = dataclasses.replace(EXACT, nvlink=1e12)
    assert step_time(net, 8, 1, 100, fast) == pytest.approx(53 * 300e-6)


def test_batch_norm_sends_what_the_fused_one_sends(net, monkeypatch):
    sent = []
    gather = dist.all_gather
    monkeypatch.setattr(dist, 'all_gather', lambda every, own, group: (sent.append(own), gather(every, own, group)))
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        for channels in net.channels:
            joint_moments(torch.zeros(channels), torch.ones(channels), torch.ones(()), None)
    finally:
        dist.destroy_process_group()
    gathered = 4 * sum(own.numel() for own in sent)
    none = dataclasses.replace(EXACT, small_us=1e-12)
    assert synchronised(net, 8, 100, none) == pytest.approx(8 * gathered / 450e9, rel=1e-3)
    assert synchronised(net, 64, 100, none) == pytest.approx(64 * gathered / 12.5e9, rel=1e-3)


def test_more_gpus_take_less_time_with_a_growing_batch(net):
    steps = [step_time(net, gpus, 128, 400, Assumptions()) / gpus for gpus in GPUS]
    assert steps == sorted(steps, reverse=True)


def test_batch_of_more_images_than_there_are_has_no_steps(net):
    large = Assumptions(images_per_gpu=4096)
    for table, column in ((recipe([net], large), -3), (growing(net, large), -2)):
        last = table.splitlines()[-1].split('|')
        assert last[1].strip() == '1,024'
        assert last[column].strip() == '-'


def test_options_reach_the_tables(found, capsys, tmp_path):
    assert main(['--speed-50', '2510', '--epochs', '50']) == 0
    printed = capsys.readouterr().out
    assert re.search(r'\| `se_resnet50` \| 28,088,024 \| 112\.4 \| 56\.2 \| 102\.2 \| 51\.0 \|', printed)
    assert '| `--epochs` | 50 |' in printed
    page = tmp_path / 'page.md'
    page.write_text('before\n<!-- recipe -->\nold\n<!-- end -->\nafter\n')
    assert main(['--markdown', str(page)]) == 0
    assert page.read_text() == (
        f'before\n<!-- recipe -->\n{found["recipe"]}\n<!-- end -->\nafter\n')


def test_help_has_the_defaults(capsys):
    with pytest.raises(SystemExit):
        main(['--help'])
    text = ' '.join(capsys.readouterr().out.split())
    assert 'GPUs of a machine (default: 8)' in text
    assert text.count('(default: ') == len(meanings())


@pytest.mark.parametrize(('arguments', 'given', 'why', 'do'), [
    (['--nvlink', '0'], '--nvlink 0', 'above 0', 'leave it out'),
    (['--epochs', 'many'], 'invalid int value', 'cannot be read', '--help'),
    (['--gpus-per-machine', '3'], '--gpus-per-machine 3', 'whole machines', 'power of two'),
    (['--reached', '1.2'], '--reached 1.2', 'it is a share', 'up to 1'),
    (['--markdown', 'nowhere.md'], '--markdown nowhere.md', 'No such file', 'docs/scaling.md'),
    (['--markdown', 'picture.png'], '--markdown picture.png', "can't decode", 'docs/scaling.md'),
    (['--markdown', 'page.md'], '--markdown page.md', 'no place for a table', 'docs/scaling.md'),
])
def test_what_cannot_be_is_said(arguments, given, why, do, capsys, check_three_lines, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('picture.png').write_bytes(b'\x89PNG')
    Path('page.md').write_text('A page.\n')
    assert main(arguments) == 2
    check_three_lines(capsys.readouterr().err.strip(), given, why, do)
