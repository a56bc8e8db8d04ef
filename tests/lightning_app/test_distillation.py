"""A student that learns from a teacher: the loss by hand, and nothing of the teacher anywhere else."""
import copy

import pytest
import timm
import torch
from lightning.pytorch.callbacks import Callback
from torch.nn import functional as F

from lightning_app import ImageClassifier
from lightning_app.callbacks import WeightEMA
from lightning_app.cli import main
from lightning_app.distillation import Distill, Teacher, check_distill
from lightning_app.optim import Optim

NORMALISATION = {'mean': (0.1, 0.2, 0.3), 'std': (0.2, 0.3, 0.4)}


@pytest.fixture
def trained(tmp_path):
    """Return a function that gives a teacher: arguments of `Distill`, and the network itself."""
    def make(num_classes=3, **arguments):
        torch.manual_seed(1)
        net = timm.create_model('test_resnet', num_classes=num_classes).eval()
        file = tmp_path / 'teacher.pth'
        torch.save(net.state_dict(), file)
        network = {'checkpoint_path': str(file), 'num_classes': num_classes}
        return Distill('test_resnet', network, **arguments), net

    return make


@pytest.mark.parametrize('settings', [{}, {'temperature': 4.0, 'weight': 0.9}, {'hard': True}, {'weight': 1.0}])
def test_loss_by_hand(trained, settings):
    distill, net = trained(**settings)
    teacher = Teacher(distill, 3, NORMALISATION, torch.device('cpu'), torch.contiguous_format)
    images, logits = torch.randn(4, 3, 32, 32), torch.randn(4, 3)
    mean, std = (torch.tensor(NORMALISATION[name]).view(3, 1, 1) for name in ('mean', 'std'))
    cfg = net.pretrained_cfg
    own = (images * std + mean - torch.tensor(cfg['mean']).view(3, 1, 1)) / torch.tensor(cfg['std']).view(3, 1, 1)
    theirs = net(own).detach()
    temperature = distill.temperature
    expected = F.cross_entropy(logits, theirs.argmax(1)) if distill.hard else temperature ** 2 * (
        (theirs / temperature).softmax(1) * ((theirs / temperature).log_softmax(1)
                                             - (logits / temperature).log_softmax(1))).sum(1).mean()
    expected = (1 - distill.weight) * 7.0 + distill.weight * expected
    torch.testing.assert_close(teacher.loss(images, logits, torch.tensor(7.0)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('other', ['mean', 'std'])
def test_teacher_whose_images_differ_in_one_of_both(trained, other):
    distill, net = trained(weight=1.0, hard=True)
    own = {name: net.pretrained_cfg[name] for name in ('mean', 'std')}
    teacher = Teacher(distill, 3, {**own, other: NORMALISATION[other]}, torch.device('cpu'), torch.contiguous_format)
    seen, images = [], torch.rand(4, 3, 32, 32)
    mean, std, theirs = (torch.tensor(values).view(3, 1, 1)
                         for values in (own['mean'], own['std'], NORMALISATION[other]))
    teacher.net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    teacher.loss((images - theirs) / std if other == 'mean' else (images - mean) / theirs, torch.randn(4, 3),
                 torch.tensor(0.0))
    torch.testing.assert_close(seen[0], (images - mean) / std, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(('name', 'size', 'why', 'do'), [
    ('test_vit3', 32, "doesn't match", 'img_size=32'), ('densenet121', 16, 'Output size is too small', 'image_size')])
def test_teacher_of_another_size_of_images(name, size, why, do, tmp_path, refused):
    torch.save(timm.create_model(name, num_classes=3).state_dict(), tmp_path / 'teacher.pth')
    distill = Distill(name, {'checkpoint_path': str(tmp_path / 'teacher.pth'), 'num_classes': 3})
    teacher = Teacher(distill, 3, NORMALISATION, torch.device('cpu'), torch.contiguous_format)
    with refused(f'model.distill.teacher: {name} with images of {size} px', why, do):
        teacher.loss(torch.randn(2, 3, size, size), torch.randn(2, 3), torch.tensor(0.0))


def test_error_of_a_teacher_that_is_not_of_the_size_of_images(trained):
    distill, _ = trained()
    teacher = Teacher(distill, 3, NORMALISATION, torch.device('cpu'), torch.contiguous_format)
    with pytest.raises(RuntimeError, match='size of tensor'):
        teacher.loss(torch.randn(2, 5, 32, 32), torch.randn(2, 3), torch.tensor(0.0))


def test_training_logs_the_loss_and_keeps_the_teacher_out_of_everything(trained, make_trainer, photo_data):
    distill, _ = trained()
    model = ImageClassifier('test_resnet', num_classes=3, optim=Optim(lr=0.01), distill=distill)
    keys, average = set(model.state_dict()), WeightEMA()
    losses = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            logits = copy.deepcopy(pl_module.net)(batch[0])
            losses.append(pl_module.teacher.loss(batch[0], logits, F.cross_entropy(logits, batch[1])).item())

        def on_train_batch_end(self, trainer, pl_module, *_):
            assert trainer.callback_metrics['train/loss'].item() == pytest.approx(losses[-1], rel=1e-5)

    trainer = make_trainer(callbacks=[average, Look()])
    trainer.fit(model, photo_data())
    assert len(losses) == 3
    assert set(model.state_dict()) == keys
    assert sum(len(group['params']) for group in trainer.optimizers[0].param_groups) == len(list(model.parameters()))
    assert set(average._average_model.module.state_dict()) == keys
    assert copy.deepcopy(model).teacher is model.teacher
    assert not any(parameter.requires_grad for parameter in model.teacher.net.parameters())
    assert not model.teacher.net.training
    assert model.hparams.distill['teacher'] == 'test_resnet'


@pytest.mark.parametrize('precision', ['bf16-mixed', 'bf16-true', '64-true'])
def test_teacher_has_the_precision_of_the_training(trained, make_trainer, photo_data, precision):
    distill, _ = trained()
    model = ImageClassifier('test_resnet', num_classes=3, optim=Optim(lr=0.01), distill=distill)
    trainer = make_trainer(precision=precision, limit_train_batches=1)
    trainer.fit(model, photo_data(mean=(0.1, 0.2, 0.3)))
    assert trainer.callback_metrics['train/loss'].isfinite()
    assert {value.dtype for value in model.teacher.net.parameters()} == {value.dtype for value in model.parameters()}


@pytest.mark.parametrize('network', [
    {}, {'num_classes': 3},  # whose classifier would begin anew
    {'num_classes': 3, 'checkpoint_path': '', 'pretrained': True}], ids=['other', 'anew', 'pretrained'])
def test_teacher_of_other_classes_is_refused(trained, make_trainer, photo_data, refused, network):
    distill, _ = trained(num_classes=5)
    overlay = {'pretrained_cfg_overlay': {'file': distill.network['checkpoint_path'], 'num_classes': 5}}
    network = {**distill.network, **network, **(overlay if 'pretrained' in network else {})}
    with refused('test_resnet with weights of 5 classes', 'it teaches has 3', 'the same classes'):
        make_trainer().fit(ImageClassifier('test_resnet', num_classes=3, distill=Distill('test_resnet', network)),
                           photo_data())


@pytest.fixture
def own_teacher(on_photos, in_tmp_path):
    """A teacher that was trained by this program, on images of another normalisation than its network has."""
    main(['fit', *on_photos, '--data.mean=[0,0,0]', '--data.std=[0.02,0.02,0.02]'])
    file = next(in_tmp_path.rglob('*.ckpt'))
    return file, Distill('test_resnet', {'checkpoint_path': str(file), 'num_classes': 3}, weight=1.0)


def test_teacher_of_this_program_sees_images_as_it_was_trained(own_teacher, make_trainer, photo_data):
    """It is of as many classes as it was trained on, without a word."""
    file, _ = own_teacher
    distill = Distill('test_resnet', {'checkpoint_path': str(file)}, weight=1.0)
    model = ImageClassifier('test_resnet', num_classes=3, distill=distill)
    make_trainer(limit_train_batches=1).fit(model, photo_data())
    net, images = ImageClassifier.load_from_checkpoint(file).net.eval(), torch.rand(4, 3, 32, 32)
    mean, std = (torch.tensor(model.net.pretrained_cfg[name]).view(3, 1, 1) for name in ('mean', 'std'))
    seen = []
    model.teacher.net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.teacher.loss((images - mean) / std, torch.randn(4, 3), torch.tensor(0.0))
    torch.testing.assert_close(seen[0], images / 0.02, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.teacher.net(images / 0.02), net(images / 0.02))


def test_teacher_of_other_classes_of_the_same_number_is_refused(
        own_teacher, make_trainer, photo_data, photos, refused):
    for split in ('train', 'val'):
        (photos / split / 'bee').rename(photos / split / 'dog')  # then cat is the second
    with refused('checkpoint_path: ', 'class 1 was bee when it was trained, and is cat here', 'the same classes'):
        make_trainer().fit(ImageClassifier('test_resnet', num_classes=3, distill=own_teacher[1]), photo_data())


@pytest.mark.parametrize(('distill', 'given'), [
    (Distill('resnet50'), 'resnet50 without weights'),
    (Distill('resnet50', {'pretrained': True}, weight=0), 'weight 0'),
    (Distill('resnet50', {'pretrained': True}, temperature=0), 'temperature 0'),
    (Distill('resnet50', {'pretrained': True}, temperature=4.0, hard=True), 'temperature: 4.0 with hard')])
def test_settings_that_mean_nothing(refused, distill, given):
    with refused(given, '', ''):
        check_distill(distill)
