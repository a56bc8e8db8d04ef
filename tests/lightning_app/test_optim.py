"""Optimiser, learning rate and schedule from plain settings."""
import math
import typing

import pytest
import timm
import torch
from timm.optim import Lookahead, list_optimizers
from torch import nn

from lightning_app.classifier import COUNTERS
from lightning_app.optim import (
    WITHOUT_END,
    Optim,
    Schedule,
    build_optimizer,
    build_schedule,
    check_optimizer,
    scaled_lr,
    with_clipping,
    without_effect,
)

SCHEDULES = typing.get_args(typing.get_type_hints(Schedule)['name'])
USABLE = [name for name in list_optimizers() if name != 'adahessian']
CUDA_ONLY = [name for name in USABLE if name.startswith(('bnb', 'fused'))]


@pytest.fixture
def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)).eval()


def rates(schedule, lr, epochs, times):
    """Return the learning rates at `times`, in epochs, as a trainer would ask: on building, then step by step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = build_schedule(optimizer, schedule, epochs)
    found = [optimizer.param_groups[0]['lr']] if times[0] == 0 else []
    for time in times[len(found):]:
        scheduler.step(time)
        found.append(optimizer.param_groups[0]['lr'])
    return found


# Optimiser


@pytest.mark.parametrize('name', USABLE)
def test_every_optimiser_of_timm_is_accepted(name):
    check_optimizer(Optim(name=name))


@pytest.mark.parametrize('name', sorted(set(USABLE) - set(CUDA_ONLY)))
@pytest.mark.filterwarnings('ignore:.*opt_einsum')  # kron
def test_every_optimiser_of_timm_is_built(net, name):
    net(torch.zeros(1, 3, 8, 8))
    optimizer = build_optimizer(net, Optim(name=name), 0.125)
    assert {group['lr'] for group in optimizer.param_groups} == {0.125}
    assert sum(len(group['params']) for group in optimizer.param_groups) == 6


@pytest.mark.parametrize('name', CUDA_ONLY)
@pytest.mark.skipif(torch.cuda.is_available(), reason='for machines without CUDA')
def test_optimisers_for_cuda_are_refused_without(net, refused, name):
    net(torch.zeros(1, 3, 8, 8))
    with refused('model.optim: ', 'CUDA', name):
        build_optimizer(net, Optim(name=name), 0.1)


@pytest.mark.parametrize(('name', 'near'), [
    ('adamm', 'adam'), ('addamw', 'adamw'), ('SGD', 'sgd'), ('momentun', 'momentum')])
def test_unknown_optimiser(refused, name, near):
    with refused(f"model.optim.name: '{name}'", 'there is no such', f'did you mean {near}'):
        check_optimizer(Optim(name=name))
    with refused(f"model.optim.name: '{name}'", 'there is no such', f'did you mean {near}'):
        build_optimizer(nn.Linear(1, 1), Optim(name=name), 0.1)


@pytest.mark.parametrize(('option', 'value'), [('rho', 0.9), ('betas', (0.9, 0.99)), ('eps', 1e-3)])
def test_an_option_the_optimiser_does_not_take(refused, option, value):
    with refused('model.optim', option, 'for the optimiser momentum'):
        build_optimizer(nn.Linear(1, 1), Optim(options={option: value}), 0.1)


def test_an_option_out_of_range(refused):
    with refused('model.optim: ', 'nvalid', 'for the optimiser adamw'):
        build_optimizer(nn.Linear(1, 1), Optim(name='adamw', options={'betas': (1.9, 0.99)}), 0.1)


def test_options_arrive():
    group, = build_optimizer(
        nn.Linear(1, 1, bias=False), Optim(name='adamw', options={'betas': (0.8, 0.9), 'eps': 1e-3}), 0.1).param_groups
    assert (group['betas'], group['eps']) == ((0.8, 0.9), 1e-3)


@pytest.mark.parametrize('scaled', [False, True])
def test_lookahead_around_a_fused_optimiser(net, scaled):
    optim = Optim(name='lookahead_adamw', options={'fused': True}, clip_grad=1.0)
    optimizer = build_optimizer(net, optim, 0.1, scaled=scaled)
    assert optimizer._base_optimizer.defaults['fused']


def test_lookahead_around_an_optimiser(net, refused):
    optimizer = build_optimizer(net, Optim(name='lookahead_adamw', options={'betas': [0.8, 0.9]}), 0.1)
    assert isinstance(optimizer, Lookahead)
    assert tuple(optimizer.param_groups[0]['betas']) == (0.8, 0.9)
    with refused("model.optim.name: 'adamv'", 'there is no such', 'did you mean adam'):
        check_optimizer(Optim(name='lookahead_adamv'))


def test_the_default_is_the_paper_s():
    optimizer = build_optimizer(nn.Linear(1, 1, bias=False), Optim(), Optim().lr)
    group, = optimizer.param_groups
    assert type(optimizer) is torch.optim.SGD
    assert (group['lr'], group['momentum'], group['nesterov'], group['weight_decay']) == (0.6, 0.9, False, 1e-4)


def test_sgd_with_momentum_by_hand():
    # v <- 0.9 v + g + wd w; w <- w - lr v
    weight, velocity = 2.0, 0.0
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, weight)
    optimizer = build_optimizer(layer, Optim(weight_decay=0.1), 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.tensor([[3.0]])).sum().backward()
        optimizer.step()
        velocity = 0.9 * velocity + 3 + 0.1 * weight
        weight -= 0.5 * velocity
    assert layer.weight.item() == pytest.approx(weight, rel=1e-5)


@pytest.mark.parametrize('decay_all', [False, True])
def test_weight_decay_of_biases_and_batch_norm(net, decay_all):
    net(torch.zeros(1, 3, 8, 8))
    optimizer = build_optimizer(net, Optim(decay_bias_and_norm=decay_all, weight_decay=0.01), 0.1)
    decay = {id(parameter): group['weight_decay'] for group in optimizer.param_groups for parameter in group['params']}
    found = {name: decay[id(parameter)] for name, parameter in net.named_parameters()}
    other = 0.01 if decay_all else 0
    assert found == {'0.weight': 0.01, '0.bias': other, '1.weight': other, '1.bias': other, '4.weight': 0.01,
                     '4.bias': other}


def test_layer_decay():
    net = timm.create_model('test_resnet', num_classes=2)
    optimizer = build_optimizer(net, Optim(layer_decay=0.5), 0.8)
    scale = {id(parameter): group['lr_scale'] for group in optimizer.param_groups for parameter in group['params']}
    assert scale[id(net.fc.weight)] == 1
    assert scale[id(next(net.parameters()))] < 0.5  # the stem
    scheduler = build_schedule(optimizer, Schedule('constant'), 2)
    scheduler.step(1)
    assert {group['lr'] for group in optimizer.param_groups} == {0.8 * value for value in set(scale.values())}


# Learning rate


@pytest.mark.parametrize(('scaling', 'batch', 'expected'), [
    ('none', 1024, 0.1), ('none', None, 0.1), ('linear', 256, 0.1), ('linear', 1024, 0.4), ('linear', 64, 0.025),
    ('sqrt', 256, 0.1), ('sqrt', 1024, 0.2), ('sqrt', 64, 0.05)])
def test_scaling_with_the_batch(scaling, batch, expected):
    assert scaled_lr(Optim(lr=0.1, lr_scaling=scaling, lr_batch=256), batch) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize('scaling', ['linear', 'sqrt'])
def test_scaling_without_a_batch_size(refused, scaling):
    with refused(f'model.optim.lr_scaling: {scaling}', 'batch size', 'lr_scaling: none'):
        scaled_lr(Optim(lr_scaling=scaling), None)


# Schedule


def test_the_paper_s_schedule():
    schedule = Schedule('step', decay_epochs=30, decay_rate=0.1)
    found = rates(schedule, 0.6, 100, list(range(101)))
    expected = [0.6] * 30 + [0.06] * 30 + [0.006] * 30 + [0.0006] * 11
    assert found == pytest.approx(expected, rel=1e-12)


def test_the_paper_s_schedule_drops_at_the_first_step_of_an_epoch():
    steps = 1251  # 1,281,167 images in batches of 1,024
    schedule = Schedule('step', decay_epochs=30, decay_rate=0.1)
    times = [step / steps for drop in (30, 60, 90) for step in (drop * steps - 1, drop * steps)]
    assert rates(schedule, 0.6, 100, times) == pytest.approx([0.6, 0.06, 0.06, 0.006, 0.006, 0.0006], rel=1e-12)


def test_multistep():
    schedule = Schedule('multistep', decay_milestones=(2, 5), decay_rate=0.5)
    assert rates(schedule, 1.0, 6, [0, 1.99, 2, 4.99, 5, 6]) == [1, 1, 0.5, 0.5, 0.25, 0.25]


def test_cosine_with_warmup():
    schedule = Schedule('cosine', warmup_epochs=5, warmup_lr=0.01, min_lr=0.001)
    found = rates(schedule, 0.5, 100, [0, 2.5, 5, 52.5, 99.99, 100])
    assert found == pytest.approx([0.01, 0.255, 0.5, 0.2505, 0.001, 0.001], abs=1e-6)


def test_cosine_by_hand():
    times = [0, 0.1, 3.7, 9.9]
    expected = [0.1 + 0.5 * 1.9 * (1 + math.cos(math.pi * time / 10)) for time in times]
    assert rates(Schedule('cosine', min_lr=0.1), 2.0, 10, times) == pytest.approx(expected, rel=1e-9)


# Of lr 1 over 100 epochs, no warm-up, min_lr 0.001: at the start, in the middle, shortly before and at the end
POINTS = {
    'cosine': (1, 0.5005, 0.001, 0.001),
    'step': (1, 0.01, 0.0001, 0.0001),  # by 10 every 20 epochs
    'multistep': (1, 0.1, 0.001, 0.001),  # by 10 at 30, 60, 90
    'poly': (1, 0.001 + 0.999 * 0.5 ** 0.1, 0.001 + 0.999 * 0.0001 ** 0.1, 0.001),
    'tanh': (1, 0.001 + 0.4995 * (1 + math.tanh(2)), 0.001 + 0.4995 * (1 - math.tanh(3)), 0.001),
    'wsd': (1, 1, 0.001, 0.001),
    'constant': (1, 1, 1, 1),
}


@pytest.mark.parametrize('name', [name for name in SCHEDULES if name != 'rsqrt'])
def test_every_schedule(name):
    schedule = Schedule(name, min_lr=0 if name in WITHOUT_END else 0.001, decay_epochs=20, decay_rate=0.1)
    found = rates(schedule, 1.0, 100, [0, 50, 99.99, 100])
    assert found == pytest.approx(POINTS[name], abs=0.025 if name == 'wsd' else 0.0001)  # wsd ends by a square root
    assert found == sorted(found, reverse=True)


def test_rsqrt():
    # lr * sqrt(warm-up / time) up to the decay, which is linear
    schedule = Schedule('rsqrt', warmup_epochs=5, min_lr=0.001, decay_epochs=20)
    found = rates(schedule, 1.0, 100, [5, 20, 50, 80, 99.99, 100])
    assert found == pytest.approx([1, 0.5, 0.1 ** 0.5, 0.25, 0.001, 0.001], abs=0.0002)


def test_rsqrt_without_warmup(refused):
    with refused('model.schedule', 'warm', 'warmup_epochs'):
        rates(Schedule('rsqrt'), 0.5, 100, [0])


@pytest.mark.parametrize('name', SCHEDULES)
def test_every_schedule_reaches_lr_after_warmup(name):
    schedule = Schedule(name, warmup_epochs=4, warmup_lr=0.1, decay_epochs=8)
    # tanh begins a millionth below
    assert rates(schedule, 0.5, 20, [0, 1, 2, 4]) == pytest.approx([0.1, 0.2, 0.3, 0.5], rel=1e-5)


@pytest.mark.parametrize('name', [name for name in SCHEDULES if name not in ('constant', 'step', 'multistep')])
def test_schedules_with_warmup_end_with_the_training(name):
    # at min_lr, and not sooner
    schedule = Schedule(name, warmup_epochs=4, min_lr=0.01, decay_epochs=8)
    before, after = rates(schedule, 0.5, 20, [19.9, 20])
    assert before > after == pytest.approx(0.01, rel=1e-9)


@pytest.mark.parametrize('name', ['step', 'multistep'])
def test_drops_count_from_the_start_of_the_training_and_not_of_the_warmup(name):
    schedule = Schedule(name, warmup_epochs=2, decay_epochs=10, decay_milestones=[10])
    assert rates(schedule, 1.0, 20, [9.99, 10]) == pytest.approx([1.0, 0.1])


@pytest.mark.parametrize(('warmup', 'epochs'), [(5, 5), (6, 5), (1, 1)])
@pytest.mark.parametrize('name', SCHEDULES)
def test_warmup_as_long_as_the_training(refused, name, warmup, epochs):
    with refused(f'model.schedule.warmup_epochs: {warmup}', f'max_epochs is {epochs}', f'fewer than {epochs}'):
        rates(Schedule(name, warmup_epochs=warmup), 0.5, epochs, [0])


@pytest.mark.parametrize('name', ['wsd', 'rsqrt'])
def test_a_decay_longer_than_the_training(refused, name):
    with refused('model.schedule', 'decay_epochs', 'decay_epochs'):
        rates(Schedule(name, warmup_epochs=2, decay_epochs=30), 0.5, 20, [0])


# What cannot be meant


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=pytest.mark.slow if name in ('kron', 'kronc') else ())  # which compile their steps
    for name in sorted(set(USABLE) - set(CUDA_ONLY))])
@pytest.mark.filterwarnings('ignore')  # of optimisers that have become deprecated, or miss a library
def test_what_optimisers_count_is_no_setting(name):
    # on a resume the settings that are given win over the checkpoint's; what was counted must not begin anew
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    optimizer = build_optimizer(net, Optim(name=name), 0.01)
    given = [dict(group) for group in optimizer.param_groups]
    for _ in range(8):
        optimizer.zero_grad()
        net(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
    changed = {key for group, before in zip(optimizer.param_groups, given, strict=True) for key in before
               if key != 'params' and group[key] != before[key]}
    assert changed <= set(COUNTERS)


def test_lookahead_counts_in_its_groups(net):
    assert set(COUNTERS) <= set(build_optimizer(nn.Linear(1, 1), Optim('lookahead_momentum'), 0.1).param_groups[0])


def test_second_derivatives_are_not_computed(refused):
    with refused('model.optim.name: adahessian', 'second derivatives', 'another optimiser'):
        check_optimizer(Optim(name='adahessian'))


@pytest.mark.parametrize('batch', [0, -1])
def test_learning_rate_for_no_batch(refused, batch):
    with refused(f'model.optim.lr_batch: {batch}', 'batch size', 'from 1'):
        scaled_lr(Optim(lr_scaling='linear', lr_batch=batch), 256)


@pytest.mark.parametrize('schedule', SCHEDULES)
@pytest.mark.parametrize(('setting', 'value'), [
    ('decay_epochs', 7), ('decay_rate', 0.3), ('decay_milestones', [3, 5]), ('warmup_lr', 0.01)])
def test_settings_without_effect_are_those_that_change_no_rate(schedule, setting, value):
    given = {'step': {'decay_epochs': 4}, 'multistep': {'decay_milestones': [9]}, 'rsqrt': {'warmup_epochs': 1}}.get(
        schedule, {})
    one, other = Schedule(schedule, **given), Schedule(schedule, **{**given, setting: value})
    times = [epoch / 2 for epoch in range(40)]
    same = rates(one, 0.5, 20, times) == rates(other, 0.5, 20, times)
    told = [text for text in without_effect(Optim(), other, 20) if text.startswith(f'model.schedule.{setting} has no ')]
    assert bool(told) == same
    assert not without_effect(Optim(), one, 20)


def test_batch_size_of_a_learning_rate_that_does_not_scale():
    assert without_effect(Optim(lr_batch=1024), Schedule(), 20) == [
        'model.optim.lr_batch has no effect: lr_scaling is none']
    assert not without_effect(Optim(lr_batch=1024, lr_scaling='sqrt'), Schedule(), 20)


def test_least_epochs_that_are_more_than_there_are():
    assert without_effect(Optim(), Schedule(), 3, 4) == ['trainer.min_epochs has no effect: trainer.max_epochs is 3']
    assert not without_effect(Optim(), Schedule(), 3, 3)


def test_drops_after_the_end_of_the_training():
    schedule = Schedule('multistep', decay_milestones=[3, 9])
    assert without_effect(Optim(), schedule, 3) == [
        'model.schedule.decay_milestones has no effect: trainer.max_epochs is 3']
    assert not without_effect(Optim(), schedule, 4)
    assert without_effect(Optim(), Schedule('step', decay_epochs=30), 30) == [
        'model.schedule.decay_epochs has no effect: trainer.max_epochs is 30']
    assert not without_effect(Optim(), Schedule('step', decay_epochs=30), 31)


@pytest.mark.parametrize(('given', 'text'), [
    (Optim(lr=math.inf), 'lr: inf'), (Optim(lr=math.nan), 'lr: nan'), (Optim(lr=-1.0), 'lr: -1.0'),
    (Optim(weight_decay=math.inf), 'weight_decay: inf'), (Optim(layer_decay=0.0), 'layer_decay: 0.0'),
    (Optim(layer_decay=1.5), 'layer_decay: 1.5'), (Optim(momentum=1.0), 'momentum: 1.0'),
    (Optim(momentum=-0.1), 'momentum: -0.1')])
def test_numbers_with_which_nothing_trains(refused, given, text):
    with refused(f'model.optim.{text}', 'stand still, or run away', 'take a number'):
        build_optimizer(nn.Linear(1, 1), given, 0.1)


@pytest.mark.parametrize('schedule', [
    Schedule('step', decay_epochs=-1), Schedule('step', decay_epochs=2, decay_rate=-1.0),
    Schedule('multistep', decay_milestones=[3], decay_rate=math.nan), Schedule('multistep', decay_milestones=[-1, 3])])
def test_drops_that_are_none(refused, schedule):
    with refused('model.schedule.decay_', '', ''):
        rates(schedule, 0.5, 5, [0])


def test_polynomial_is_a_line_by_default():
    assert rates(Schedule('poly'), 1.0, 4, [0, 1, 2, 3]) == pytest.approx([1, 0.75, 0.5, 0.25])


@pytest.mark.parametrize(('schedule', 'given', 'why'), [
    (Schedule('step', min_lr=0.1, decay_epochs=1), 'min_lr: 0.1', 'the schedule step does not decay to one'),
    (Schedule('cosine', min_lr=2), 'min_lr: 2', 'the learning rate is 1, and would rise'),
    (Schedule('cosine', warmup_epochs=-1), 'warmup_epochs: -1', 'too small'),
    (Schedule('cosine', min_lr=math.nan), 'min_lr: nan', 'it is no number'),
    (Schedule('multistep', decay_milestones=[6, 3]), 'decay_milestones: [6, 3]', 'later than the one before'),
], ids=str)
def test_schedules_that_make_no_sense(refused, schedule, given, why):
    with refused(f'model.schedule.{given}', why, ''):
        rates(schedule, 1.0, 9, [0])


def test_lowest_rate_may_be_the_rate_itself_or_above_that_of_some_layers():
    assert rates(Schedule('cosine', min_lr=1.0), 1.0, 4, [0, 2]) == [1, 1]
    weights = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{'params': weights[:1], 'lr': 0.1}, {'params': weights[1:], 'lr': 1.0}])
    build_schedule(optimizer, Schedule('cosine', min_lr=0.5), 4)


@pytest.mark.parametrize(('option', 'value'), [('weight_decay', -1), ('momentum', 1.5), ('momentum', -0.1)])
def test_optimisers_that_make_no_sense(net, refused, option, value):
    with refused(f'model.optim.{option}: {value}', '', 'take a number from 0'):
        build_optimizer(net, Optim(**{option: value}), 0.1)


# Clipping


@pytest.mark.parametrize(('optim', 'trainer', 'clipped'), [
    ({}, (), (None, 'norm')), ({}, (0,), (None, 'norm')), ({}, (2.0,), (2.0, 'norm')),
    ({}, (2.0, 'value'), (2.0, 'value')), ({'clip_grad': 0.1, 'clip_mode': 'agc'}, (), (0.1, 'agc')),
    ({'clip_grad': 1.0}, (0.0,), (1.0, 'norm'))])
def test_clipping_is_that_of_the_settings_or_of_the_trainer(optim, trainer, clipped):
    found = with_clipping(Optim(**optim), *trainer)
    assert (found.clip_grad, found.clip_mode) == clipped


@pytest.mark.parametrize(('optim', 'trainer', 'given', 'why'), [
    ({'clip_grad': 0.0}, (), 'model.optim.clip_grad: 0.0', 'clipped to nothing'),
    ({}, (-1.0,), 'trainer.gradient_clip_val: -1.0', 'clipped to nothing'),
    ({'clip_grad': 1.0}, (1.0,), 'model.optim.clip_grad: 1.0 with trainer.gradient_clip_val', 'both clip'),
    ({'clip_mode': 'agc'}, (), 'model.optim.clip_mode: agc', 'nothing is clipped'),
    ({}, (None, 'value'), 'trainer.gradient_clip_algorithm: value', 'nothing is clipped')])
def test_clipping_that_makes_no_sense(refused, optim, trainer, given, why):
    with refused(given, why, ''):
        with_clipping(Optim(**optim), *trainer)


@pytest.mark.parametrize('length', [None, 0])
def test_steps_of_no_length(refused, length):
    with refused(f'model.schedule.decay_epochs: {length}', 'drops every so many epochs', 'decay_epochs 30'):
        rates(Schedule('step', decay_epochs=length), 0.5, 5, [0])


def test_first_step_of_momentum_with_dampening_is_not_dampened():
    torch.manual_seed(0)
    changes = []
    for fused in (False, True):
        layer = torch.nn.Linear(3, 2, bias=False)
        before = layer.weight.detach().clone()
        optimizer = build_optimizer(
            layer, Optim('momentum', lr=0.1, weight_decay=0, fused=fused, options={'dampening': 0.5}), 0.1)
        layer(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        changes.append(layer.weight.detach() - before)
    torch.testing.assert_close(*changes)
