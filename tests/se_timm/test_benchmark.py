"""`python -m se_timm.benchmark`: what it measures, prints and writes; never how fast anything is."""
import csv
import dataclasses
import json
import statistics
import sys

import pytest
import timm
import torch

from se_timm import benchmark, measure
from se_timm.fused.function import REFERENCE
from se_timm.fused.inductor import available
from se_timm.measure import Comparison, Result, Spread

TINY = ('--batch-size', '2', '--img-size', '32', '--rounds', '2', '--warmup', '1', '--threads', '1', '--device', 'cpu')
CIFAR = ('--model', 'se_resnet20_cifar', *TINY)


@pytest.fixture
def uncompiled(monkeypatch):
    """Compute the fused tail by plain torch: compiling its passes takes half a minute."""
    monkeypatch.setattr('se_timm.residual_tail.passes_for', lambda x: REFERENCE)


@pytest.fixture
def error(capfd):
    """Return a function that runs options which must be refused, and returns the three lines of the error."""
    def run(*arguments):
        assert benchmark.main(arguments) == 2
        out, err = capfd.readouterr()
        assert out == ''
        first, why, remedy = err.splitlines()
        assert first.startswith('error: ')
        assert why.startswith('  why: ')
        assert remedy.startswith('  do:  ')
        return first.removeprefix('error: '), why, remedy

    return run


def lines_of(folder):
    with (folder / 'results.csv').open(newline='') as file:
        return {(line['mode'], line['variant']): line for line in csv.DictReader(file)}


def results_of(comparison, **seconds):
    return {label: Result(comparison, label, each) for label, each in seconds.items()}


TRAIN = Comparison('se_resnet50', 'train', 2, 32, 'fp32', False, ())


def test_training_inference_and_tail(uncompiled, tmp_path, capfd):
    variants = ('--variants', 'ours/*/eager', 'ours/*/fused', 'ours/*/folded', 'timm/*/eager')
    arguments = (*CIFAR, '--mode', 'train', 'infer', 'tail', *variants, '--output', str(tmp_path))
    assert benchmark.main(arguments) == 0
    lines = lines_of(tmp_path)
    ours = [f'ours/{net}/{mode}' for net in ('plain', 'se') for mode in ('eager', 'fused', 'folded')]
    assert {key for key, line in lines.items() if not line['problem']} == {
        *(('train', label) for label in ours if 'folded' not in label),
        *(('infer', label) for label in ours if 'fused' not in label),
        *(('tail', label) for label in ('timm/plain/eager', 'timm/se/eager', 'ours/plain/fused', 'ours/se/fused'))}
    assert lines['train', 'timm/plain/eager']['problem'] == 'timm has no counterpart of se_resnet20_cifar'

    line = lines['train', 'ours/se/fused']
    assert (line['model'], line['train_batch_size'], line['train_img_size']) == ('se_resnet20_cifar', '2', '32')
    assert float(line['train_samples_per_sec']) == pytest.approx(2e3 / float(line['train_step_time']), rel=1e-2)
    assert (line['precision'], line['memory_format'], line['threads']) == ('fp32', 'contiguous', '1')
    assert (line['torch'], line['timm'], line['infer_step_time']) == (torch.__version__, timm.__version__, '')
    parameters = sum(p.numel() for p in timm.create_model('se_resnet20_cifar').parameters())
    assert float(line['param_count']) == round(parameters / 1e6, 2)
    assert float(lines['infer', 'ours/se/folded']['infer_samples_per_sec']) > 0
    assert lines['tail', 'ours/se/fused']['bytes_moved'] == str(11 * 2 * 256 * 8 * 8 * 4)
    assert lines['train', 'ours/se/fused']['bytes_moved'] == ''  # nothing counts those of a network

    environment = json.loads((tmp_path / 'environment.json').read_text())
    assert environment['command'][3:] == list(arguments)
    seconds = environment['rounds'][0]['seconds']
    taxes = [se / plain - 1 for se, plain in zip(seconds['ours/se/fused'], seconds['ours/plain/fused'], strict=True)]
    tax = statistics.median(taxes)
    assert float(line['se_tax']) == pytest.approx(tax, abs=1e-4)
    assert line['baseline'] == 'ours/plain/eager'
    assert lines['train', 'ours/plain/fused']['se_tax'] == ''
    out = capfd.readouterr().out
    printed = next(line for line in out.splitlines() if line.startswith('ours/se/fused'))
    assert f'{100 * tax:+.1f} %' in printed
    assert (tmp_path / 'results.png').read_bytes().startswith(b'\x89PNG')


def test_bytes_saved_are_less_where_the_tail_is_fused(uncompiled, tmp_path):
    arguments = (*TINY, '--img-size', '128', '--mode', 'tail', '--variants', '*/se/eager', '*/fused')
    assert benchmark.main((*arguments, '--output', str(tmp_path))) == 0
    saved = {variant: float(line['peak_memory']) for (_, variant), line in lines_of(tmp_path).items()}
    full = 2 * 256 * 32 * 32 * 4 / 2**20
    assert saved['ours/se/fused'] == pytest.approx(2 * full, rel=0.1)  # x and y
    assert saved['timm/se/eager'] == pytest.approx(3 * full, rel=0.1)  # the output of batch norm, too


def test_saved_bytes_of_something_known():
    x = torch.randn(3, 5, requires_grad=True)
    net = torch.nn.Linear(5, 2)
    work = measure.Work(net, lambda: (net(x) * net(x)).sum(), lambda loss: loss.backward(), x.device)
    assert measure.saved_bytes(work) == x.nbytes + 2 * 3 * 2 * 4  # x once, both outputs, no weights


@pytest.mark.parametrize('model', ['se_resnet50', 'se_senet154'])
@pytest.mark.parametrize('se', [True, False], ids=['se', 'plain'])
def test_both_sides_have_the_same_convolutions(model, se):
    with torch.device('meta'):
        ours, timms = (measure.network(model, who, se) for who in ('ours', 'timm'))
    assert type(timms) is timm.models.ResNet
    kinds = ('kernel_size', 'stride', 'groups', 'in_channels', 'out_channels')
    convolutions = [[[getattr(module, kind) for kind in kinds] for module in net.modules()
                     if isinstance(module, torch.nn.Conv2d) and module.bias is None] for net in (ours, timms)]
    assert convolutions[0] == convolutions[1]
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in timms.parameters())


def test_a_wrong_variant_is_not_timed(monkeypatch, tmp_path, capfd):
    def wrong(net, recompute):
        net.fc.bias = torch.nn.Parameter(torch.arange(10.))

    monkeypatch.setattr(measure, 'fused', wrong)
    assert benchmark.main((*CIFAR, '--variants', 'ours/se/eager', 'ours/se/fused', '--output', str(tmp_path))) == 1
    lines = lines_of(tmp_path)
    assert 'away from that of the modules' in lines['train', 'ours/se/fused']['problem']
    assert lines['train', 'ours/se/fused']['train_step_time'] == ''
    assert lines['train', 'ours/se/eager']['train_step_time'] != ''
    assert 'not measured: ours/se/fused: ArithmeticError' in capfd.readouterr().out


def test_inference_of_one_small_image_has_statistics():
    """Maps of 1x1 of a single image have no variance, with which torch's batch norms refuse to be calibrated."""
    comparison = Comparison('se_resnet18', 'infer', 1, 32, 'fp32', False, ())
    images = torch.randn(1, 3, 32, 32)
    work, _ = measure.infer_work(comparison, 'ours/se/eager', [images], torch.device('cpu'))
    assert work.forward().isfinite().all()


def test_inference_in_half_precision_may_be_as_far_from_float32_as_the_modules_are():
    comparison = Comparison('se_resnet20_cifar', 'infer', 4, 32, 'bf16', False, ())
    device = torch.device('cpu')
    data = measure.tensors(comparison, device)
    work, expected = measure.infer_work(comparison, 'ours/se/folded', data, device)
    single, exact = measure.infer_work(dataclasses.replace(comparison, precision='fp32'), 'ours/se/eager', data, device)
    assert torch.equal(expected.value, exact.value)
    assert 0.5 > expected.tolerance >= measure.TOLERANCE['bf16']
    measure.check(work, work(), expected)
    with pytest.raises(ArithmeticError, match='away from that of the modules'):
        measure.check(single, 2 * single(), exact)


@pytest.mark.parametrize('task', ['train', 'tail'])
def test_wrong_gradients_are_found(task):
    comparison = Comparison('se_resnet20_cifar', task, 4, 32, 'fp32', False, ())
    device = torch.device('cpu')
    data = measure.tensors(comparison, device)
    label = 'ours/se/fused' if task == 'tail' else 'ours/se/eager'
    work, expected = measure.WORKS[task](comparison, label, data, device)
    measure.check(work, work(), expected)
    wrong = work._replace(finish=lambda result: work.finish(1.2 * result if task == 'train' else result.detach() + (
        1.2 * (result - result.detach()))))
    with pytest.raises(ArithmeticError, match='the norm of its first gradients'):
        measure.check(wrong, wrong(), expected)


def test_gradients_that_are_not_finite_are_found():
    net = torch.nn.Linear(2, 2)
    work = measure.Work(
        net, lambda: net(torch.ones(2)).sum(), lambda loss: (loss * torch.inf).backward(), net.weight.device)
    with pytest.raises(ArithmeticError, match='not finite'):
        measure.check(work, work(), measure.Expected(work.forward(), 0.1))


def test_what_does_not_fit_into_the_budget_is_left_out_and_said(uncompiled, capfd):
    variants = ('--variants', 'ours/se/eager', 'ours/se/compiled')
    assert benchmark.main((*CIFAR, *variants, '--budget', '10')) == 0
    out = capfd.readouterr().out
    assert 'not measured: ours/se/compiled: for lack of time: it would take about' in out
    assert '\nours/se/eager  ' in out


@pytest.mark.parametrize(('left', 'rounds'), [(None, 10), (100., 10), (12., 6), (4., 4), (0.5, 0), (-3., 0)])
def test_rounds_that_fit(left, rounds, monkeypatch):
    budget = measure.Budget(None if left is None else 1.)
    monkeypatch.setattr(budget, 'left', lambda: left)
    assert budget.rounds(10, 1.) == rounds


# Presets


def test_preset_prints_each_row_with_its_limit(uncompiled, capfd):
    arguments = ('--preset', 'gpu', *CIFAR, '--no-channels-last', '--jobs', '0', '--precision', 'fp32',
                 '--variants', '*/eager', 'ours/*/fused')
    assert benchmark.main(arguments) == 0
    out = capfd.readouterr().out
    rows = out[out.index('\nlimit ') + 1:].partition('\n\n')[0].splitlines()[1:]
    assert len(rows) == len(benchmark.GPU_ROWS)
    tax, bandwidth = rows[0], rows[6]
    assert ' '.join(tax.split()).startswith('SE tax of training, equally fused se_resnet20_cifar ')
    assert '<= +5.0 %' in tax
    assert tax.endswith('ours/se/fused over ours/plain/fused')
    assert '>= 60 %' in bandwidth
    assert bandwidth.endswith('ours/se/fused')
    assert rows[5].endswith('its variants are not measured, see above')
    assert rows[7].endswith('it was not asked for')
    assert 'today' in out


def test_presets_name_variants_and_networks_that_exist():
    for preset in benchmark.PRESETS.values():
        assert set(preset.models) <= set(measure.our_networks())
        plan = preset.comparisons(preset.models)
        for comparison in plan:
            assert set(comparison.labels) <= set(measure.all_labels(comparison.task))
        for row in preset.rows:
            planned = {label for each in plan if each.task == row.task for label in each.labels}
            assert {*row.over, *row.under} - planned <= {'ours/se/fused+recomputed'}


def test_row_takes_the_best_of_each_side():
    row = benchmark.Row('', 'train', 'time', benchmark.OURS, benchmark.EAGER, 1.0, 0.9)
    results = results_of(TRAIN, **{
        'ours/se/fused': [2., 4.], 'ours/se/fused+compiled': [1., 2.], 'timm/plain/eager': [2., 2.]})
    assert benchmark.evaluate(row, results, 1.) == (
        Spread(0.75, 0.625, 0.875), 'ours/se/fused+compiled over timm/plain/eager')
    results['timm/plain/eager'].seconds = []
    assert benchmark.evaluate(row, results, 1.) is None


def test_tax_compares_modes_that_both_sides_have():
    row = benchmark.Row('', 'train', 'tax', benchmark.OURS, benchmark.OURS_PLAIN, 0.05, 0.01)
    results = results_of(TRAIN, **{
        'ours/se/fused': [4.], 'ours/se/fused+compiled': [1.], 'ours/plain/fused': [2.]})
    assert benchmark.evaluate(row, results, 1.) == (Spread(1., 1., 1.), 'ours/se/fused over ours/plain/fused')


@pytest.mark.parametrize(('quantity', 'value', 'verdict'), [
    ('time', 0.8, 'stretch met'), ('time', 0.9, 'stretch met'), ('time', 0.95, 'met'), ('time', 1.01, 'MISSED'),
    ('share', 1.1, 'stretch met'), ('share', 0.95, 'MISSED')])
def test_verdict(quantity, value, verdict):
    limit, stretch = (1.0, 0.9) if quantity == 'time' else (1.0, 1.1)
    assert benchmark.met(benchmark.Row('', 'train', quantity, (), (), limit, stretch), value) == verdict


def test_command_that_compiles_ahead_is_understood():
    comparison = Comparison('se_resnet50', 'train', 2, 32, 'bf16', True, ('ours/se/compiled',))
    command = benchmark.alone(comparison, 'ours/se/compiled', torch.device('cpu'))
    assert command[1:3] == ('-m', 'se_timm.benchmark')
    options = benchmark.parse(command[3:])
    assert benchmark.planned(options) == [comparison]
    assert options.jobs == 0


def test_variant_without_memory_beside_others_is_compiled_again_alone(monkeypatch, tmp_path, capfd):
    """Processes as they are started, but for what they do: a device whose memory is too small at the first time."""
    def command(comparison, label, device):
        mark = tmp_path / label.replace('/', '-')
        return sys.executable, '-c', (
            f"import pathlib; mark = pathlib.Path({str(mark)!r}); print({measure.OUT_OF_MEMORY!r}, ': not measured', "
            "sep='') if mark.exists() < 1 else None; mark.write_text(mark.read_text() + 'a' if mark.exists() else 'a')")

    monkeypatch.setattr(benchmark, 'alone', command)
    compared = Comparison('se_resnet50', 'train', 2, 32, 'fp32', False, ('ours/se/compiled', 'ours/se/eager'))
    benchmark.compile_ahead([compared], torch.device('cpu'), 2, 60)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [('ours-se-compiled', 'aa')]
    assert '1 are compiled' in capfd.readouterr().err


# Errors


@pytest.mark.parametrize(('arguments', 'given', 'remedy'), [
    (('--model', 'se_resnet5'), "model: 'se_resnet5'", 'did you mean se_resnet50'),
    (('--model', 'resnet50'), "model: 'resnet50'", 'se_resnet50'),
    (('--mode', 'training'), "mode: 'training'", 'did you mean train'),
    (('--precision', 'float16'), "precision: 'float16'", 'bf16'),
    (('--preset', 'tpu'), "preset: 'tpu'", 'cpu'),
    (('--device', 'gpu'), "device: 'gpu'", 'cuda'),
    (('--batch-size', '0'), "argument --batch-size: '0' is no whole number from 1 up", '--help'),
    (('--rounds', '1.5'), "argument --rounds: '1.5' is no whole number from 1 up", '--help'),
    (('--budget', 'inf'), "argument --budget: 'inf' is no number from 1 up", '--help'),
    (('--batchsize', '2'), "option: '--batchsize'", 'did you mean --batch-size'),
    (('--variants', 'ours/se/fussed'), "variant: 'ours/se/fussed'", 'ours/se/fused'),
    (('--variants', 'ours/se/folded'), '--variants ours/se/folded', 'leave one of them out'),
    (('--preset', 'cpu', '--mode', 'infer'), '--preset cpu --mode infer', 'leave one of them out'),
])
def test_errors(arguments, given, remedy, error):
    first, _, last = error(*arguments)
    assert first == given
    assert remedy in last


def test_cuda_without_a_gpu(error, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert error('--device', 'cuda')[0] == 'device: cuda'
    assert error('--preset', 'gpu')[0] == 'device: cuda'


def test_output_that_is_a_file(error, tmp_path):
    (tmp_path / 'file').touch()
    assert error('--output', str(tmp_path / 'file'))[0] == f'output: {tmp_path / "file"}'


def test_output_without_matplotlib(error, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)  # as Python marks what cannot be imported
    given, why, remedy = error('--output', str(tmp_path))
    assert given == f'output: {tmp_path}'
    assert 'matplotlib' in why
    assert 'se-timm[benchmark]' in remedy


@pytest.mark.parametrize(('load', 'warned'), [(0.1, False), (3.7, True)])
def test_busy_machine_is_told(load, warned, monkeypatch):
    monkeypatch.setattr(measure.os, 'getloadavg', lambda: (load, 0., 0.))
    monkeypatch.setattr(measure.os, 'cpu_count', lambda: 4)
    assert bool(measure.busy()) == warned


# With compilers


@pytest.mark.slow
@pytest.mark.skipif(not available(), reason='needs a C++ compiler')
def test_all_modes(tmp_path):
    arguments = (*CIFAR, '--mode', 'train', 'infer', 'tail', '--variants', '*', '--output', str(tmp_path))
    assert benchmark.main(arguments) == 0
    lines = lines_of(tmp_path)
    measured = {key for key, line in lines.items() if not line['problem']}
    assert measured == {(task, label) for task in measure.MODES for label in measure.all_labels(task)
                        if task == 'tail' or label.startswith('ours')}
    assert float(lines['train', 'ours/se/compiled']['compile_seconds']) > 0
