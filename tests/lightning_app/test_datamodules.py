"""The data modules: global batch sizes, classes, transforms from the network, CIFAR, digits, and their settings."""
import dataclasses
import hashlib
import importlib
import io
import pickle
import shutil
import sys
from enum import Enum, IntEnum
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from jsonargparse.typing import PositiveFloat, PositiveInt
from lightning.pytorch import Trainer
from PIL import Image
from torchvision import datasets, transforms

from lightning_app import (
    CIFAR10DataModule,
    CIFAR100DataModule,
    DigitsDataModule,
    ImageClassifier,
    ImageNetDataModule,
)
from lightning_app.data import Augment, ImageDataModule, base
from lightning_app.data.augment import INTERPOLATIONS
from lightning_app.data.cifar import PixelSource
from lightning_app.data.splits import open_split
from se_timm.errors import InputError

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def trainer(**options):
    return Trainer(**{
        'accelerator': 'cpu', 'devices': 1, 'logger': False, 'enable_checkpointing': False,
        'enable_progress_bar': False, 'enable_model_summary': False, 'use_distributed_sampler': False, **options})


def set_up(datamodule, stage='fit', **options):
    """Return `datamodule` as a trainer with `options` would set it up, in its first process."""
    if options:
        datamodule.trainer = trainer(**options)
    datamodule.prepare_data()
    datamodule.setup(stage)
    return datamodule


def imagenet(root, **options):
    return ImageNetDataModule(**{
        'root': str(root), 'batch_size': 4, 'num_workers': 0, 'image_size': 32, **options})


def expected_image(image, size, crop, mean, std, mode='bilinear'):
    return transforms.Compose([
        transforms.Resize(size, transforms.InterpolationMode(mode)), transforms.CenterCrop(crop),
        transforms.ToTensor(), transforms.Normalize(mean, std)])(image)


# Batches


@pytest.mark.parametrize(('processes', 'accumulated', 'expected'), [
    (1, 1, 8), (2, 1, 4), (1, 2, 4), (2, 2, 2), (4, 2, 1)])
def test_batch_size_is_that_of_a_step(pets, processes, accumulated, expected):
    datamodule = set_up(imagenet(pets, batch_size=8), devices=processes, strategy='ddp' if processes > 1 else 'auto',
                        accumulate_grad_batches=accumulated)
    loader = datamodule.train_dataloader()
    assert loader.batch_size == expected
    assert len(loader) == accumulated  # one whole step of 8; the 4 images that are left would be half a step
    images, labels = next(iter(loader))
    assert images.shape == (expected, 3, 32, 32)
    assert labels.shape == (expected,)


@pytest.mark.parametrize(('batch_size', 'processes', 'accumulated', 'valid'), [
    (7, 2, 1, 'multiple of 2, such as 6 or 8'), (10, 2, 2, 'multiple of 4, such as 8 or 12'),
    (1, 2, 1, 'multiple of 2, such as 2 or 4')])
def test_batch_size_that_cannot_be_divided(pets, refused, batch_size, processes, accumulated, valid):
    with refused(f'data.batch_size: {batch_size}', f'{processes} processes, each accumulating {accumulated}', valid):
        set_up(imagenet(pets, batch_size=batch_size), devices=processes, accumulate_grad_batches=accumulated,
               strategy='ddp' if processes > 1 else 'auto')


def test_batch_size_in_which_some_images_are_not_repeated(pets, refused):
    with refused('data.repeats: 3, with data.batch_size 8', 'so many times in a step', 'a multiple of 3'):
        set_up(imagenet(pets, batch_size=8, repeats=3))


def test_batch_size_that_leaves_no_step(pets, refused):
    set_up(imagenet(pets, batch_size=12))
    with refused('data.batch_size: 13', 'with 12 training images not one step', 'at most 12'):
        set_up(imagenet(pets, batch_size=13))


@pytest.mark.parametrize(('name', 'value', 'least'), [
    ('batch_size', 0, 1), ('batch_size', -8, 1), ('eval_batch_size', 0, 1), ('num_workers', -1, 0),
    ('image_size', 0, 1), ('eval_size', 0, 1), ('eval_size', -32, 1)])
@pytest.mark.parametrize('stage', ['fit', 'validate', 'test', 'predict'])
def test_numbers_too_small(pets, refused, stage, name, value, least):
    with refused(f'data.{name}: {value}', f'at least {least}', 'leave it out'):
        set_up(imagenet(pets, images=str(pets / 'val'), **{name: value}), stage)


@pytest.mark.parametrize('crop_pct', [0, -0.5, 2, 87.5])
def test_crop_larger_than_the_image(pets, refused, crop_pct):
    with refused(f'data.crop_pct: {crop_pct}', 'shorter side', '0.875'):
        set_up(imagenet(pets, crop_pct=crop_pct), 'validate')


@pytest.mark.parametrize(('name', 'values'), [
    ('mean', (123.7, 116.3, 103.5)), ('mean', (-0.5, 0.5, 0.5)), ('std', (58.4, 57.1, 57.4)), ('std', (0.2, 0, 0.2)),
    ('std', (float('nan'), 0.2, 0.2))])
def test_normalisation_of_other_pixels(pets, refused, name, values):
    with refused(f'data.{name}: {list(values)}', 'pixels from 0 to 1', 'by 255'):
        set_up(imagenet(pets, **{name: values}), 'validate')


def test_unknown_interpolation(pets, refused):
    with refused("data.interpolation: 'cubic'", 'no such', 'did you mean bicubic?'):
        set_up(imagenet(pets, interpolation='cubic'))


@pytest.mark.parametrize('interpolation', INTERPOLATIONS)
def test_interpolations(pets, interpolation):
    datamodule = set_up(imagenet(pets, interpolation=interpolation))
    assert datamodule.training[0][0].shape == datamodule.validation[0][0].shape == (3, 32, 32)


@pytest.mark.parametrize(('processes', 'accumulated', 'expected'), [(1, 1, 12), (1, 3, 4), (2, 1, 6), (2, 3, 2)])
def test_evaluation_batches_are_as_large_as_those_of_the_training(pets, processes, accumulated, expected):
    datamodule = set_up(imagenet(pets, batch_size=12), devices=processes, accumulate_grad_batches=accumulated,
                        strategy='ddp' if processes > 1 else 'auto')
    assert datamodule.val_dataloader().batch_size == datamodule.train_dataloader().batch_size == expected


class Forgetful(ImageNetDataModule):
    def __init__(self, flavour: str = 'sweet', **common):
        super().__init__(**common)


class Flavour(Enum):
    SWEET, SOUR = 1, 2


class Whole(IntEnum):
    ONE = 1


@dataclasses.dataclass
class Mixture:
    first: Flavour
    count: int


class Text(str):
    pass


class Flavoured(ImageNetDataModule):
    def __init__(self, flavour: object = 'sweet', **common):
        super().__init__(**common)
        self.flavour = flavour


@pytest.mark.parametrize(('flavour', 'kept'), [
    (np.float64(3), 3.0), ([np.int64(1)], [1]), (Path('a'), 'a'), ({'b': (np.bool_(True),)}, {'b': (True,)}),
    (PositiveInt(3), 3), ([PositiveFloat(3)], [3.0]), (Text('a'), 'a'), ({np.int64(1): 2}, {1: 2}), ({1, 2}, {1, 2}),
    ({np.int64(1)}, {1}), ({'a', None}, {'a', None})])
def test_arguments_of_a_subclass_are_kept_in_plain_values(pets, flavour, kept, tmp_path):
    settings = set_up(Flavoured(flavour=flavour, root=pets, batch_size=4)).settings()
    assert settings['init_args']['flavour'] == kept
    assert type(settings['init_args']['flavour']) is type(kept)
    torch.save(settings, tmp_path / 'settings')
    assert torch.load(tmp_path / 'settings', weights_only=True) == settings


@pytest.mark.parametrize('flavour', [
    Flavoured, np.zeros(3), torch.zeros(3), [len], (np.zeros(3), 1), {'a': [torch.zeros(3)]}, Flavour.SOUR,
    [Whole.ONE], Mixture(Flavour.SOUR, 3), {(1, 2)}, {(1, 2): 3}])
def test_argument_of_a_subclass_that_no_checkpoint_can_hold_is_left_out(pets, flavour, caplog):
    data = set_up(Flavoured(flavour=flavour, root=pets, batch_size=4))
    assert 'checkpoints are without flavour, ' in caplog.text
    assert data.flavour is flavour
    assert data.settings()['init_args'].keys() == ImageNetDataModule(root=pets).settings()['init_args'].keys()


def test_module_that_does_not_keep_its_arguments_is_refused_before_the_training(pets, refused):
    with refused('Forgetful without an attribute flavour', 'a checkpoint holds', 'self.flavour = flavour'):
        set_up(Forgetful(root=str(pets), num_workers=0), 'fit')


@pytest.mark.filterwarnings('ignore:You requested to overfit but enabled .* dataloader shuffling:UserWarning')
def test_overfit_batches(pets):
    model = ImageClassifier('test_resnet', num_classes=3)
    run = trainer(overfit_batches=1, max_epochs=2, log_every_n_steps=1)
    run.fit(model, imagenet(pets, batch_size=4))
    assert run.global_step == 2


def test_repeats_have_no_place_in_batches_that_lightning_reads_in_order(pets, refused):
    with refused('data.repeats: 2, with trainer.overfit_batches', 'each once', 'leave out one'):
        trainer(overfit_batches=1).fit(ImageClassifier('test_resnet', num_classes=3), imagenet(pets, repeats=2))


def test_prefetch_without_workers_is_said():
    with pytest.warns(UserWarning, match='data.prefetch has no effect'):
        set_up(DigitsDataModule(batch_size=64, num_workers=0, prefetch=4))


def test_smaller_gradient_of_the_last_step_is_told(pets):
    with pytest.warns(UserWarning, match='the last step has 1 of 2'):
        set_up(imagenet(pets, batch_size=4), accumulate_grad_batches=2, limit_train_batches=3)


def test_an_incomplete_training_batch_is_left_out(pets):
    loader = set_up(imagenet(pets, batch_size=5)).train_dataloader()
    assert [len(labels) for _, labels in loader] == [5, 5]


@pytest.mark.parametrize(('eval_batch_size', 'expected'), [(None, [5, 5, 2]), (7, [7, 5])])
@pytest.mark.parametrize('stage', ['validate', 'test', 'fit'])
def test_evaluation_batches_hold_all_images_in_order(pets, stage, eval_batch_size, expected):
    datamodule = set_up(imagenet(pets, batch_size=5, eval_batch_size=eval_batch_size), stage)
    loader = datamodule.test_dataloader() if stage == 'test' else datamodule.val_dataloader()
    labels = [labels for _, labels in loader]
    assert [len(batch) for batch in labels] == expected
    assert torch.cat(labels).tolist() == [0] * 5 + [1] * 4 + [2] * 3


def test_five_processes_evaluate_each_image_once(pets):
    datamodule = imagenet(pets, batch_size=5)
    shares = []
    for rank in range(5):
        datamodule.trainer = trainer(devices=5, strategy='ddp')
        datamodule.trainer.strategy.cluster_environment.set_global_rank(rank)  # as in the process of that rank
        datamodule.setup('validate')
        shares.append([labels.tolist() for _, labels in datamodule.val_dataloader()])
    # images 0, 5 and 10 go to the first; of 12 images the last three processes have padding in place of a third
    assert shares == [[[0], [1], [2]], [[0], [1], [2]], [[0], [1], [-1]], [[0], [1], [-1]], [[0], [2], [-1]]]


def test_two_processes_train_on_the_batches_of_one(pets):
    datamodule = set_up(imagenet(pets))
    one = epochs_of(datamodule)
    parts = []
    for rank in range(2):
        datamodule.trainer = trainer(devices=2, strategy='ddp')
        datamodule.trainer.strategy.cluster_environment.set_global_rank(rank)
        parts.append(epochs_of(datamodule))
    assert torch.equal(torch.stack(parts, 2).flatten(1, 2), one)


def test_more_processes_than_a_batch_has_images(pets):
    datamodule = set_up(imagenet(pets, batch_size=4, eval_batch_size=1), 'validate', devices=4, strategy='ddp')
    assert datamodule.val_dataloader().batch_size == 1


def test_prediction_gives_indices(pets):
    datamodule = set_up(imagenet('nowhere', images=str(pets / 'val')), 'predict')
    assert datamodule.num_classes is None
    batches = list(datamodule.predict_dataloader())
    assert torch.cat([index for _, index in batches]).tolist() == list(range(12))
    expected = expected_image(Image.open(pets / 'val' / 'cat' / '3.png'), 36, 32, *IMAGENET)
    assert torch.equal(datamodule.normalisation(batches[0][0][3]), expected)


def test_prediction_without_images(pets, refused):
    with refused('data.images: none', 'needs images', '--data.images FOLDER'):
        set_up(imagenet(pets), 'predict')


def test_an_unreadable_image_to_predict_is_left_out(pets):
    (pets / 'val' / 'cat' / '1.png').write_bytes(b'')
    datamodule = set_up(imagenet(pets, images=str(pets / 'val')), 'predict')
    assert torch.cat([index for _, index in datamodule.predict_dataloader()]).tolist() == [0, -3, *range(2, 12)]


@pytest.mark.parametrize('stage', ['validate', 'test'])
def test_allow_unreadable(pets, refused, stage):
    (pets / 'val' / 'cat' / '1.png').write_bytes(b'')

    def labels(**options):
        datamodule = set_up(imagenet(pets, **options), stage)
        loader = datamodule.val_dataloader() if stage == 'validate' else datamodule.test_dataloader()
        return torch.cat([labels for _, labels in loader]).tolist()

    assert labels(allow_unreadable=True) == [0, -1, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    with refused(f'image: {pets}/val/cat/1.png', 'it cannot be read', 'data.allow_unreadable=true'):
        labels()


def epochs_of(datamodule, count=2):
    """Return the images of `count` epochs, shuffled as a trainer would."""
    loader = datamodule.train_dataloader()
    images = []
    for epoch in range(count):
        loader.sampler.set_epoch(epoch)
        images += [images for images, _ in loader]
    return torch.stack(images)


def test_epochs_are_the_same_for_any_number_of_workers(pets):
    # persistent workers, too, must hear of the new epoch
    one, two = (epochs_of(set_up(imagenet(pets, num_workers=workers))) for workers in (0, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one[:3], one[3:])


def test_the_seed_of_the_run_counts(pets, monkeypatch):
    def epoch(seed):
        monkeypatch.setenv('PL_GLOBAL_SEED', str(seed))
        return epochs_of(set_up(imagenet(pets)), 1)

    first = epoch(1)
    assert torch.equal(first, epoch(1))
    assert not torch.equal(first, epoch(2))


def test_training_says_what_it_sees(pets, caplog):
    for path in pets.rglob('*.png'):
        Image.open(path).save(path.with_suffix('.jpg'))
        path.unlink()
    caplog.set_level('INFO')
    datamodule = set_up(imagenet(pets))
    set_up(DigitsDataModule(num_workers=0))
    assert caplog.messages == [
        f'12 training and 12 validation images, JPEG files decoded by {datamodule.training.decoder}',
        '1,433 training and 364 validation images']


# Classes


@pytest.mark.parametrize('tar', [False, True])
def test_classes_are_found(pets, pack, tar):
    if tar:
        for split in ('train', 'val'):
            pack(pets / split)
            (pets / split).rename(pets / f'{split}_unpacked')
    datamodule = imagenet(pets)
    assert datamodule.class_names == ['cat', 'dog', 'eel']
    assert datamodule.num_classes == 3


def test_classes_are_those_of_validation_where_there_is_no_training(tmp_path, write_images):
    write_images(tmp_path / 'val')
    datamodule = set_up(imagenet(tmp_path), 'validate')
    assert datamodule.class_names == ['cat', 'dog', 'eel']
    assert len(datamodule.validation) == 12


def test_validation_is_not_taken_where_training_is_broken(pets, refused):
    (pets / 'train' / 'fox').mkdir()
    with refused(f'images: {pets}/train', 'no image in class fox', 'each with images'):
        imagenet(pets).num_classes  # noqa: B018


def test_labels_that_are_numbered_otherwise_are_refused(pets, refused):
    class Own(ImageNetDataModule):
        def open(self, split):
            return open_split(self.root, split)

    datamodule = Own(root=str(pets))
    datamodule.use_classes(['cat', 'dog', 'eel'])
    set_up(datamodule, 'validate')
    datamodule.use_classes(['ant', 'cat', 'dog', 'eel'])
    with refused('Own.open: images with 3 classes', 'labels would be wrong', 'self.class_names'):
        set_up(datamodule, 'validate')


def test_given_number_of_classes(pets, refused):
    assert set_up(imagenet(pets, num_classes=3)).num_classes == 3
    with refused('data.num_classes: 1000', 'have 3 classes', 'leave data.num_classes out'):
        set_up(imagenet(pets, num_classes=1000))


def test_missing_root_is_told_when_classes_are_asked_for(tmp_path, refused):
    with refused(f'data.root: {tmp_path}/pets', 'no such folder', 'name the folder that holds train/'):
        imagenet(tmp_path / 'pets').num_classes  # noqa: B018


def test_names_of_splits(pets, write_images):
    (pets / 'train').rename(pets / 'training')
    (pets / 'val').rename(pets / 'validation')
    write_images(pets / 'testing', {'eel': 1})
    datamodule = imagenet(pets, train_split='training', val_split='validation', test_split='testing')
    assert len(set_up(datamodule).training) == 12
    assert [label for _, label in set_up(datamodule, 'test').testing] == [2]


@pytest.mark.parametrize('none', [0, 0.0])
def test_training_without_validation_needs_no_images_for_it(pets, none, caplog):
    shutil.rmtree(pets / 'val')
    datamodule = set_up(imagenet(pets), limit_val_batches=none)
    assert '12 training and no validation images' in caplog.text
    with pytest.raises(InputError, match='it holds neither val/'):
        datamodule.val_dataloader()
    with pytest.raises(InputError, match='it holds neither val/'):
        set_up(datamodule, limit_val_batches=1)


def test_a_test_without_a_split_of_its_own_is_of_the_validation_images(pets):
    datamodule = set_up(imagenet(pets), 'test')
    assert datamodule.testing.source.name(0) == f'{pets}/val/cat/0.png'


# Transforms


@pytest.mark.parametrize(('options', 'resized', 'cropped'), [
    ({}, 256, 224), ({'interpolation': 'bicubic'}, 256, 224), ({'image_size': 32}, 36, 32),
    ({'eval_size': 299, 'crop_pct': 0.849}, 352, 299), ({'image_size': 64, 'eval_size': 96, 'crop_pct': 1.0}, 96, 96)])
def test_evaluation_without_a_network_is_imagenet_s(pets, options, resized, cropped):
    datamodule = set_up(ImageNetDataModule(root=str(pets), batch_size=4, num_workers=0, **options), 'validate')
    images, _ = next(iter(datamodule.val_dataloader()))
    expected = expected_image(Image.open(pets / 'val' / 'cat' / '0.png'), resized, cropped, *IMAGENET,
                              options.get('interpolation', 'bilinear'))
    assert torch.equal(datamodule.normalisation(images[0]), expected)


def test_training_and_evaluation_sizes(pets):
    datamodule = set_up(imagenet(pets, image_size=24, eval_size=48))
    assert next(iter(datamodule.train_dataloader()))[0].shape == (4, 3, 24, 24)
    assert next(iter(datamodule.val_dataloader()))[0].shape == (4, 3, 48, 48)


@pytest.mark.parametrize('given', [{}, {'mean': (0.1, 0.2, 0.3), 'std': (0.2, 0.2, 0.2)}, {'crop_pct': 0.5},
                                   {'image_size': 48}, {'interpolation': 'bicubic'}])
@pytest.mark.filterwarnings('ignore:.*does not have many workers')
def test_settings_come_from_the_network_unless_given(pets, given):
    cfg = timm.get_pretrained_cfg('test_resnet')
    assert cfg.mean != IMAGENET[0]  # else this would show nothing
    datamodule = ImageNetDataModule(root=str(pets), batch_size=4, num_workers=0, **given)
    results, = trainer().validate(ImageClassifier('test_resnet', num_classes=3), datamodule=datamodule, verbose=False)
    assert 0 < results['val/loss'] < 10
    size = given.get('image_size', 160)
    expected = expected_image(
        Image.open(pets / 'val' / 'cat' / '0.png'), int(size / given.get('crop_pct', 0.95)), size,
        given.get('mean', cfg.mean), given.get('std', cfg.std), given.get('interpolation', cfg.interpolation))
    assert torch.equal(datamodule.normalisation(datamodule.validation[0][0]), expected)


@pytest.mark.filterwarnings('ignore:.*does not have many workers')
@pytest.mark.parametrize(('given', 'crop_pct'), [(None, 1.0), ('center', 1.0), ('center', 1.15)])
def test_crop_mode_comes_from_the_network_unless_given(pets, given, crop_pct):
    model = ImageClassifier('test_resnet', num_classes=3, network={
        'pretrained_cfg_overlay': {'crop_mode': 'squash', 'crop_pct': crop_pct}})
    datamodule = ImageNetDataModule(root=str(pets), batch_size=4, num_workers=0, crop_mode=given)
    trainer().validate(model, datamodule=datamodule, verbose=False)
    expected = timm.data.create_transform(**{
        **timm.data.resolve_model_data_config(model.net), **({'crop_mode': given} if given else {})})(
            Image.open(pets / 'val' / 'cat' / '0.png'))
    assert torch.allclose(datamodule.normalisation(datamodule.validation[0][0]), expected, atol=1e-5)
    again = ImageNetDataModule(**datamodule.settings()['init_args'])  # as out of a checkpoint
    trainer().validate(model, datamodule=again, verbose=False)


@pytest.mark.filterwarnings('ignore:.*does not have many workers')
def test_a_training_takes_its_settings_from_the_network(pets):
    datamodule = ImageNetDataModule(root=str(pets), batch_size=6, num_workers=0, crop_pct=1.0)
    model = ImageClassifier('se_resnet20_cifar', num_classes=3)
    fit = trainer(max_epochs=1, log_every_n_steps=1)
    fit.fit(model, datamodule=datamodule)
    assert fit.global_step == 2
    assert datamodule.training[0, 0][0].shape == (3, 32, 32)
    cfg = model.net.pretrained_cfg
    expected = expected_image(Image.open(pets / 'val' / 'cat' / '0.png'), 32, 32, cfg['mean'], cfg['std'])
    assert torch.equal(datamodule.normalisation(datamodule.validation[0][0]), expected)


# CIFAR


def write_cifar(root, monkeypatch, dataset, name, keys):
    """Write a few images as torchvision wants CIFAR: pickled batches, whose MD5 sums it checks."""
    folder = Path(root, dataset.base_folder)
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)

    def write(file, content):
        data = pickle.dumps(content)
        (folder / file).write_bytes(data)
        return hashlib.md5(data, usedforsecurity=False).hexdigest()

    def batches(files, count):
        return [[file, write(file, {
            'data': generator.integers(0, 256, (count, 3072), dtype=np.uint8),
            keys[0]: generator.integers(0, len(name), count).tolist()})] for file, _ in files]

    train = batches(dataset.train_list, 20 // len(dataset.train_list))
    test = batches(dataset.test_list, 6)
    monkeypatch.setattr(dataset, 'train_list', train)
    monkeypatch.setattr(dataset, 'test_list', test)
    meta = dict(dataset.meta, md5=write(dataset.meta['filename'], {keys[1]: name}))
    monkeypatch.setattr(dataset, 'meta', meta)
    return root


CIFAR = {
    'cifar10': (CIFAR10DataModule, datasets.CIFAR10, 10, ('labels', 'label_names')),
    'cifar100': (CIFAR100DataModule, datasets.CIFAR100, 100, ('fine_labels', 'fine_label_names')),
}


@pytest.fixture(params=CIFAR)
def cifar(request, tmp_path, monkeypatch):
    """Return a CIFAR data module on fake images, and torchvision's data set class."""
    module, dataset, count, keys = CIFAR[request.param]
    # CIFAR100 has lists of its own: patching one class leaves the other alone
    root = write_cifar(tmp_path / 'cifar', monkeypatch, dataset, [f'class {index}' for index in range(count)], keys)
    return module(root=str(root), batch_size=4, num_workers=0), dataset, count


def test_cifar_classes(cifar):
    datamodule, _, count = cifar
    assert datamodule.class_names == [f'class {index}' for index in range(count)]
    assert datamodule.num_classes == count


def test_cifar_evaluation(cifar):
    datamodule, dataset, _ = cifar
    set_up(datamodule)
    theirs = dataset(datamodule.root, train=False)
    assert len(datamodule.validation) == len(theirs) == 6
    for (image, label), (expected, expected_label) in zip(datamodule.validation, theirs, strict=False):
        assert torch.equal(datamodule.normalisation(image), expected_image(expected, 32, 32, *IMAGENET))
        assert label == expected_label
    assert [label for _, label in set_up(datamodule, 'test').testing] == theirs.targets


def test_cifar_training(cifar):
    datamodule, dataset, _ = cifar
    set_up(datamodule)
    theirs = dataset(datamodule.root, train=True)
    assert datamodule.training.source.labels == theirs.targets
    np.testing.assert_array_equal(datamodule.training.source.load(13), theirs[13][0])
    batches = list(datamodule.train_dataloader())
    assert len(batches) == 5
    assert all(images.shape == (4, 3, 32, 32) and len(labels) == 4 for images, labels in batches)


@pytest.mark.parametrize('module', [CIFAR10DataModule, CIFAR100DataModule])
def test_missing_cifar(tmp_path, refused, module):
    name, folder = module.dataset.__name__, module.dataset.base_folder
    with refused(f'data.root: {tmp_path}', f'no complete copy of {name}', f'the folder that holds {folder}/'):
        module(root=str(tmp_path)).num_classes  # noqa: B018


@pytest.mark.parametrize('inside', [True, False])
def test_cifar_in_a_folder_near_by(cifar, refused, inside):
    datamodule, dataset, _ = cifar
    root = Path(datamodule.root)
    given = root / dataset.base_folder if inside else root.parent
    with refused(f'data.root: {given}', 'no complete copy', f'did you mean {root}?'):
        type(datamodule)(root=str(given)).num_classes  # noqa: B018


def test_incomplete_cifar(cifar, refused):
    datamodule, dataset, _ = cifar
    Path(datamodule.root, dataset.base_folder, dataset.train_list[0][0]).write_bytes(b'')
    with refused(f'data.root: {datamodule.root}', 'no complete copy', 'data.download=true'):
        set_up(datamodule)


@pytest.mark.parametrize('module', [CIFAR10DataModule, CIFAR100DataModule])
def test_cifar_that_cannot_be_downloaded(tmp_path, refused, module):
    with refused('data.download: true', 'cannot be had', module.dataset.base_folder):
        module(root=str(tmp_path / 'new'), download=True).num_classes  # noqa: B018


def test_cifar_that_would_be_downloaded_to_a_file(tmp_path, refused):
    Path(tmp_path, 'a_file').touch()
    with refused('data.download: true', 'File exists', 'copy'):
        CIFAR10DataModule(root=str(tmp_path / 'a_file'), download=True).num_classes  # noqa: B018


def test_cifar_in_the_home(fake_cifar, own_home, in_tmp_path):
    fake_cifar.rename(own_home / 'cifar')
    datamodule = CIFAR10DataModule(root='~/cifar', download=True)
    assert datamodule.num_classes == 10
    (own_home / 'cifar').rename(in_tmp_path / 'elsewhere')
    with pytest.raises(InputError, match='cannot be had'):
        datamodule.prepare_data()
    assert (own_home / 'cifar').is_dir()
    assert not Path('~').exists()


def test_cifar_that_is_there_is_not_downloaded_again(fake_cifar):
    assert CIFAR10DataModule(root=str(fake_cifar), download=True).num_classes == 10


def test_cifar_need_not_be_there_for_prediction(pets):
    datamodule = set_up(CIFAR10DataModule(root='nowhere', images=str(pets / 'val'), num_workers=0), 'predict')
    assert datamodule.num_classes is None
    assert len(datamodule.prediction) == 12


# Digits


@pytest.fixture(scope='module')
def digits():
    pytest.importorskip('sklearn')
    datamodule = DigitsDataModule(batch_size=64)
    datamodule.setup('fit')
    return datamodule


def test_digits_need_scikit_learn(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, 'sklearn', None)
    with refused('data: digits', 'the package sklearn is not installed', "pip install 'se-timm[quickstart]'"):
        DigitsDataModule().open('train')


def test_digits_are_all_there_and_none_is_held_out_and_trained_on(digits):
    from sklearn.datasets import load_digits
    train, val = digits.training.source, digits.validation.source
    assert (len(train.labels), len(val.labels)) == (1433, 364)
    ours = sorted([
        (label, source.load(index).resize((8, 8), Image.Resampling.NEAREST).getchannel(0).tobytes())
        for source in (train, val) for index, label in enumerate(source.labels)])
    pixels = (load_digits().images * (255 / 16)).round().astype(np.uint8)
    assert ours == sorted(zip(load_digits().target.tolist(), [image.tobytes() for image in pixels], strict=True))


def test_held_out_digits_are_a_balanced_fifth(digits):
    counts = np.bincount(digits.validation.source.labels, minlength=10)
    whole = counts + np.bincount(digits.training.source.labels, minlength=10)
    np.testing.assert_array_equal(counts, np.ceil(whole / 5))


def test_digits_are_images_of_digits(digits):
    images, labels = digits.on_after_batch_transfer(next(iter(digits.train_dataloader())), 0)
    assert images.shape == (64, 3, 32, 32)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    image = np.asarray(digits.validation.source.load(0))
    assert image.shape == (32, 32, 3)
    assert (image[::4, ::4].repeat(4, 0).repeat(4, 1) == image).all()
    assert (digits.validation.source.pixels.min(), digits.validation.source.pixels.max()) == (0, 255)
    assert digits.class_names == list('0123456789')
    assert digits.num_classes == 10


def test_digits_are_not_flipped_by_default():
    assert DigitsDataModule().augment == Augment(crop='pad', hflip=0.0)


# Settings


MODULES = [
    ImageNetDataModule(root='somewhere', train_split='a', val_split='b', test_split='c', batch_size=7),
    ImageNetDataModule(
        eval_batch_size=3, num_workers=5, image_size=96, eval_size=128, crop_pct=0.9, interpolation='bicubic',
        mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), num_classes=12, images='photos', allow_unreadable=True,
        augment=Augment(auto_augment='rand-m9', scale=(0.2, 1.0))),
    CIFAR10DataModule(root='elsewhere', download=True, batch_size=128),
    CIFAR100DataModule(num_classes=100, augment=Augment(crop='pad', padding=2)),
    DigitsDataModule(batch_size=64, image_size=24),
]
IDS = [f'{type(module).__name__}-{index}' for index, module in enumerate(MODULES)]


def rebuild(settings):
    module, _, name = settings['class_path'].rpartition('.')
    return getattr(importlib.import_module(module), name)(**settings['init_args'])


def attributes(datamodule):
    return {name: value for name, value in vars(datamodule).items() if not name.startswith('_') and name != 'trainer'}


@pytest.mark.parametrize('datamodule', MODULES, ids=IDS)
def test_settings_rebuild_an_equal_module_from_a_checkpoint(datamodule):
    file = io.BytesIO()
    torch.save(datamodule.settings(), file)
    file.seek(0)
    again = rebuild(torch.load(file, weights_only=True))
    assert type(again) is type(datamodule)
    assert attributes(again) == attributes(datamodule)
    assert again.settings() == datamodule.settings()


@pytest.mark.parametrize('datamodule', MODULES, ids=IDS)
def test_settings_rebuild_an_equal_module_from_yaml(datamodule):
    text = yaml.safe_dump(datamodule.settings())
    again = rebuild(yaml.safe_load(text))
    assert yaml.safe_dump(again.settings()) == text


@pytest.mark.parametrize('datamodule', MODULES, ids=IDS)
def test_settings_name_every_argument_that_is_valid(datamodule):
    assert datamodule.settings()['init_args'].keys() >= {
        'batch_size', 'eval_batch_size', 'num_workers', 'image_size', 'eval_size', 'crop_pct', 'interpolation', 'mean',
        'std', 'augment', 'num_classes', 'images', 'allow_unreadable'}


def test_settings_are_those_given_and_those_of_the_networks_configuration(pets):
    datamodule = imagenet(pets, mean=(0.1, 0.2, 0.3))
    before = datamodule.settings()['init_args']
    set_up(datamodule)
    assert datamodule.num_classes == 3
    found = {'std': (0.229, 0.224, 0.225), 'interpolation': 'bilinear', 'crop_pct': 0.875, 'crop_mode': 'center'}
    assert datamodule.settings()['init_args'] == {**before, **found}
    assert before['num_classes'] is None


@pytest.mark.parametrize('module', [ImageNetDataModule, CIFAR10DataModule])
def test_settings_are_plain_where_paths_were_given(tmp_path, module):
    # from Python, pathlib's paths are natural; in a checkpoint they could not be loaded with weights_only=True
    settings = module(root=tmp_path, images=tmp_path).settings()
    file = io.BytesIO()
    torch.save(settings, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == settings
    assert yaml.safe_load(yaml.safe_dump(settings))['init_args']['root'] == str(tmp_path)


def test_arguments_of_a_subclass_are_its_own(make_trainer, tmp_path):
    class Arrays(ImageDataModule):
        def __init__(self, pixels, labels, keep=len, **common):
            super().__init__(**common)
            self.pixels, self.labels, self.keep = pixels, labels, keep

        def find_classes(self):
            return ['a', 'b', 'c']

        def open(self, split):
            return PixelSource('own', self.pixels, self.labels.tolist(), self.find_classes())

    pixels = np.zeros((8, 32, 32, 3), dtype=np.uint8)
    data = Arrays(pixels, np.arange(8) % 3, batch_size=np.int64(4), image_size=32, num_workers=0)
    trainer = make_trainer()
    trainer.fit(ImageClassifier('test_resnet', 3), data)
    assert data.pixels is pixels
    assert type(data.settings()['init_args']['batch_size']) is int
    trainer.save_checkpoint(tmp_path / 'a.ckpt')
    content = torch.load(tmp_path / 'a.ckpt', weights_only=True)
    assert 'pixels' not in content['data']['init_args']
    assert content['data_left_out'] == ['keep', 'labels', 'pixels']


# Real photos


def test_imagenette(real_data):
    datamodule = set_up(ImageNetDataModule(
        root=str(real_data / 'imagenette224'), batch_size=16, num_workers=0, image_size=64, eval_size=96))
    classes = [line.split('\t')[0] for line in (real_data / 'imagenette224' / 'classes.txt').read_text().splitlines()]
    assert datamodule.class_names == classes
    assert np.bincount(datamodule.training.source.labels).tolist() == [500] * 10
    assert np.bincount(datamodule.validation.source.labels).tolist() == [150] * 10
    images, labels = next(iter(datamodule.train_dataloader()))
    assert images.shape == (16, 3, 64, 64)
    assert len(labels.unique()) > 3
    images, labels = next(iter(datamodule.val_dataloader()))
    assert images.shape == (16, 3, 96, 96)
    assert labels.tolist() == [0] * 16
    images = datamodule.normalisation(images)  # photos: mean near 0, standard deviation near 1
    assert abs(images.mean()) < 0.7
    assert 0.6 < images.std() < 1.6


def test_cifar_in_a_tar_file(real_data):
    source = open_split(real_data / 'cifar10', 'test')
    assert len(source.classes) == 10
    assert np.bincount(source.labels).tolist() == [1000] * 10
    assert source.load(9999).size == (32, 32)


@pytest.mark.parametrize(('exact', 'trained', 'evaluated'), [
    (None, 'simplejpeg-fast', 'simplejpeg'), (False, 'simplejpeg-fast', 'simplejpeg-fast')])
def test_evaluation_has_accurate_pixels_unless_told_otherwise(pets, exact, trained, evaluated):
    datamodule = set_up(imagenet(pets, batch_size=2, decoder='simplejpeg-fast', exact=exact, images=str(pets)))
    assert datamodule.training.decoder == trained
    assert datamodule.validation.decoder == evaluated
    assert set_up(datamodule, 'test').testing.decoder == evaluated
    assert set_up(datamodule, 'predict').prediction.decoder == evaluated


def test_fastest_decoder_is_looked_for_once(pets, monkeypatch):
    looked = []
    choose = base.choose_decoder
    monkeypatch.setattr(base, 'choose_decoder', lambda *args, **given: looked.append(given) or choose(*args, **given))
    datamodule = set_up(imagenet(pets))
    assert datamodule.training.decoder == datamodule.validation.decoder
    assert len(looked) == 1


def test_fast_pixels_are_not_exact(pets, refused):
    with refused('data.decoder: simplejpeg-fast, with data.exact: true', 'not exact', 'take simplejpeg, or leave'):
        set_up(imagenet(pets, decoder='simplejpeg-fast', exact=True))
