"""Samples depend on nothing but seed, epoch and position; each counts once; unreadable ones are dealt with."""
import itertools
import logging
import os
import random
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lightning_app.data import Augment
from lightning_app.data import picture as picture_module
from lightning_app.data import samples as samples_module
from lightning_app.data.augment import Normalisation, evaluation_transform, training_transform
from lightning_app.data.collate import collate
from lightning_app.data.jpeg import DECODERS
from lightning_app.data.samples import IGNORE, EvaluationSamples, PadToMultiple, SeededSampler, TrainingSamples, seeded
from lightning_app.data.sources import FolderSource, TarSource
from lightning_app.data.splits import open_split
from lightning_app.messages import three_lines
from lightning_app.prepare import prepare
from se_timm.errors import InputError

LENGTH = 26
# random in Python's, NumPy's and PyTorch's generator
AUGMENT = Augment(grayscale_prob=0.4, auto_augment='rand-m9-mstd0.5', random_erasing=0.5)
NORMALISE = Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def random_transform():
    return training_transform(AUGMENT, 16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation='bilinear')


def plain_transform():
    return evaluation_transform(16, 1.0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation='bilinear')


@pytest.fixture
def source(tmp_path, write_images):
    return FolderSource(write_images(tmp_path / 'train', {'cat': 10, 'dog': 9, 'eel': 7}))


@pytest.fixture
def damaged(tmp_path, source):
    """Return a source with an empty and a truncated image, numbers 3 and 12, and the numbers."""
    for index in (3, 12):
        with open(source.name(index), 'r+b') as file:
            file.truncate(0 if index == 3 else 200)
    return source, (3, 12)


@pytest.fixture
def mixed(damaged, noise):
    """Return the same with JPEG files among the PNG files: larger ones, a grey one, one in CMYK, a truncated one."""
    source, unreadable = damaged
    for index, mode in {0: 'RGB', 2: 'L', 5: 'CMYK', 8: 'RGB', 13: 'RGB', 21: 'RGB'}.items():
        noise(index, (200, 150) if index > 10 else (40, 32)).convert(mode).save(source.name(index), 'JPEG')
    with open(source.name(8), 'r+b') as file:
        file.truncate(os.path.getsize(source.name(8)) * 2 // 3)
    return source, (*unreadable, 8)


def loader(samples, batch_size=4, workers=0, replicas=1, rank=0, seed=7, epoch=0):
    sampler = SeededSampler(len(samples), replicas, rank, seed)
    sampler.set_epoch(epoch)
    return DataLoader(
        samples, batch_size, sampler=sampler, num_workers=workers, drop_last=True, collate_fn=collate)


def epoch_of(*args, **options):
    """Return the images and labels of one epoch, batch by batch."""
    images, labels = zip(*loader(*args, **options), strict=True)
    return torch.stack([NORMALISE(batch) for batch in images]), torch.stack(labels)


def keys(replicas=1, rank=0, seed=7, epoch=0, length=LENGTH):
    sampler = SeededSampler(length, replicas, rank, seed)
    sampler.set_epoch(epoch)
    return list(sampler)


def random_states():
    numpy = np.random.get_state()
    return random.getstate(), numpy[1].tolist(), numpy[2:], torch.get_rng_state().tolist()


# The same batches


@pytest.mark.parametrize('workers', [1, 2])
def test_any_number_of_workers_gives_the_same_batches(source, workers):
    samples = TrainingSamples(source, random_transform())
    expected = epoch_of(samples)
    random.seed(1), np.random.seed(2), torch.manual_seed(3)  # as a worker's generators, it must not matter
    images, labels = epoch_of(samples, workers=workers)
    assert torch.equal(images, expected[0])
    assert torch.equal(labels, expected[1])


def test_a_batch_is_the_same_whatever_came_before_it(source):
    samples = TrainingSamples(source, random_transform())
    whole = [samples[key] for key in keys()]
    for position in (11, 4, 25):
        assert torch.equal(NORMALISE(samples[keys()[position]][0]), NORMALISE(whole[position][0]))


@pytest.mark.parametrize('replicas', [2, 4])
@pytest.mark.parametrize('epoch', [0, 3])
def test_global_batches_are_the_same_for_any_number_of_processes(replicas, epoch):
    ranks = [keys(replicas, rank, epoch=epoch) for rank in range(replicas)]
    shares = [[share[start:start + 8 // replicas] for start in range(0, len(share), 8 // replicas)] for share in ranks]
    union = [set(itertools.chain(*batch)) for batch in zip(*shares, strict=True)][:LENGTH // 8]
    one = keys(epoch=epoch)
    assert union == [set(one[start:start + 8]) for start in range(0, 24, 8)]


def test_global_batches_of_two_processes_hold_the_same_pixels(source):
    samples = TrainingSamples(source, random_transform())
    one, labels = epoch_of(samples, batch_size=8)
    parts = [epoch_of(samples, batch_size=4, replicas=2, rank=rank) for rank in range(2)]
    # positions are dealt out in turn: 0, 2, 4, 6 to the first process
    assert torch.equal(torch.stack([images for images, _ in parts], 2).flatten(1, 2), one)
    assert torch.equal(torch.stack([labels for _, labels in parts], 2).flatten(1, 2), labels)


def test_an_epoch_holds_each_image_once():
    assert sorted(key.image for key in keys()) == list(range(LENGTH))
    assert len({key.seed for key in keys()}) == LENGTH


@pytest.mark.parametrize('replicas', [2, 3, 4])
def test_processes_get_equally_many_images_and_none_twice(replicas):
    shares = [keys(replicas, rank) for rank in range(replicas)]
    assert {len(share) for share in shares} == {LENGTH // replicas}
    indices = [key.image for share in shares for key in share]
    assert len(set(indices)) == len(indices)
    assert all(len(SeededSampler(LENGTH, replicas, rank, 0)) == LENGTH // replicas for rank in range(replicas))


@pytest.mark.parametrize('replicas', [1, 2, 4])
def test_an_epoch_can_be_cut_to_whole_steps(replicas):
    # of several accumulated batches each
    samplers = [SeededSampler(LENGTH, replicas, rank, 7, multiple=8) for rank in range(replicas)]
    assert {len(sampler) for sampler in samplers} == {len(list(sampler)) for sampler in samplers} == {24 // replicas}
    assert set(itertools.chain(*samplers)) == set(keys()[:24])


@pytest.mark.parametrize('replicas', [1, 2, 4])
def test_epoch_can_be_gone_on_with(replicas):
    for rank in range(replicas):
        sampler = SeededSampler(LENGTH, replicas, rank, 7, start=(1, 8))
        sampler.set_epoch(1)
        assert list(sampler) == keys(replicas, rank, epoch=1)[8 // replicas:]
        assert len(sampler) == LENGTH // replicas  # Lightning counts in whole epochs
        for other in (0, 2):
            sampler.set_epoch(other)
            assert list(sampler) == keys(replicas, rank, epoch=other)


@pytest.mark.parametrize('replicas', [1, 2])
def test_repeated_images_stand_in_a_row_with_seeds_of_their_own(replicas):
    ranks = [list(SeededSampler(LENGTH, replicas, rank, 7, repeats=2)) for rank in range(replicas)]
    order = list(itertools.chain(*zip(*ranks, strict=True)))
    assert [key.image for key in order] == [key.image for key in keys()[:LENGTH // 2] for _ in range(2)]
    assert len({key.seed for key in order}) == LENGTH


def test_size_of_the_crops_follows_the_epoch_also_in_workers_that_stay(source):
    def transform_of(size):
        return training_transform(Augment(), size, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation='bilinear')

    samples = TrainingSamples(source, transform_of(16), transform_of)
    sampler = SeededSampler(len(samples), 1, 0, 7, size_of_epoch=lambda epoch: 8 + 4 * epoch)
    batches = DataLoader(samples, 13, sampler=sampler, num_workers=2, persistent_workers=True)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert {images.shape[-1] for images, _ in batches} == {8 + 4 * epoch}


def test_another_order_has_another_digest():
    def digest(**changed):
        sampler = SeededSampler(**{'length': LENGTH, 'num_replicas': 2, 'rank': 0, 'seed': 7, **changed})
        sampler.set_epoch(3)
        return sampler.digest()

    assert digest() == digest(rank=1)
    assert len({digest(), digest(seed=8), digest(length=LENGTH - 1)}) == 3


def test_same_images_have_the_same_digest_in_each_form(source, tmp_path, pack):
    (tmp_path / 'train' / 'cat' / '3.png').rename(tmp_path / 'train' / 'cat' / '3.a.png')
    folders = FolderSource(tmp_path / 'train')
    prepare(str(tmp_path), str(tmp_path / 'shards'), splits=['train'], workers=1)
    for other in (TarSource(pack(tmp_path / 'train', 'below/')), open_split(tmp_path / 'shards', 'train')):
        assert TrainingSamples(other, plain_transform()).digests == TrainingSamples(folders, plain_transform()).digests


def test_other_files_or_labels_have_another_digest(source, tmp_path):
    first = TrainingSamples(source, plain_transform()).digest
    assert TrainingSamples(FolderSource(tmp_path / 'train'), plain_transform()).digest == first
    (tmp_path / 'train' / 'cat' / '3.png').rename(tmp_path / 'train' / 'cat' / '3_.png')
    assert TrainingSamples(FolderSource(tmp_path / 'train'), plain_transform()).digest != first
    source.labels[0] = 1
    assert TrainingSamples(source, plain_transform()).digest != first


def test_seeds_of_positions_do_not_depend_on_how_many_follow():
    few, many = (SeededSampler(length, 1, 0, seed=7).seeds() for length in (100, 1000))
    assert few.tolist() == many[:100].tolist()
    assert len(set(many.tolist())) == 1000
    assert 0 <= many.min() < 2 ** 26  # over all of 32 bits, as np.random.seed takes them
    assert 2 ** 32 - 2 ** 26 < many.max() < 2 ** 32


@pytest.mark.parametrize('other', [{'epoch': 1}, {'seed': 8}])
def test_epochs_and_seeds_differ(source, other):
    assert [key.image for key in keys()] != [key.image for key in keys(**other)]
    assert {key.seed for key in keys()}.isdisjoint(key.seed for key in keys(**other))
    samples = TrainingSamples(source, random_transform())
    assert not torch.equal(epoch_of(samples)[0], epoch_of(samples, **other)[0])


def test_the_same_image_is_augmented_anew_in_each_epoch(source):
    samples = TrainingSamples(source, random_transform())
    images = [NORMALISE(samples[key][0]) for epoch in range(4) for key in keys(epoch=epoch) if key[0] == 5]
    assert len(images) == 4
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(images, 2))


def test_labels_belong_to_the_images(source):
    samples = TrainingSamples(source, plain_transform())
    for index, seed, _ in keys():
        image, label = samples[index, seed]
        assert torch.equal(image, plain_transform()(source.load(index)))
        assert label == source.labels[index]


@pytest.mark.parametrize('augment', [Augment(), Augment(hflip=0.0), Augment(vflip=0.5), AUGMENT])
@pytest.mark.parametrize(('ahead', 'cut'), [(4, 1), (4, 3), (64, 16)])
def test_batches_are_made_of_the_samples_of_their_keys(mixed, augment, ahead, cut, monkeypatch):
    """However many are drawn before the first is decoded; unreadable ones are replaced and counted once."""
    monkeypatch.setattr(samples_module, 'AHEAD', ahead)
    monkeypatch.setattr(samples_module, 'CUT', cut)
    source, unreadable = mixed
    transform = training_transform(augment, 16, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation='bilinear')
    samples, together = (TrainingSamples(source, transform) for _ in range(2))
    one_by_one = [samples[key] for key in keys()]
    batch = together.__getitems__(list(keys()))
    assert [label for _, label in batch] == [label for _, label in one_by_one]
    assert all(torch.equal(NORMALISE(a), NORMALISE(b)) for (a, _), (b, _) in zip(batch, one_by_one, strict=True))
    assert samples.unreadable == together.unreadable == len(unreadable)


def test_every_image_is_read_once(mixed, monkeypatch):
    """Also those whose size only their decoding tells; those that cannot be read again, for the message."""
    read = []
    monkeypatch.setattr(mixed[0], 'read', lambda index, read_it=mixed[0].read: read.append(index) or read_it(index))
    transform = training_transform(Augment(), 16, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation='bilinear')
    TrainingSamples(mixed[0], transform).__getitems__(list(keys()))
    assert {index for index in read if read.count(index) > 1} <= {each for bad in mixed[1] for each in (bad, bad + 1)}


def test_many_decoded_images_are_never_held(mixed, monkeypatch):
    """Of what is read ahead only files are, and small parts of what they show."""
    decoded = []

    def watched(function):
        def decode(*args):
            # one that was decoded for its size, and the same at a half of that
            assert sum(reference() is not None for reference in decoded) <= 2
            decoded.append(weakref.ref(result := function(*args)))
            return result
        return decode

    monkeypatch.setattr(picture_module, 'decode', watched(picture_module.decode))
    monkeypatch.setitem(DECODERS, 'pillow', DECODERS['pillow']._replace(pixels=watched(DECODERS['pillow'].pixels)))
    transform = training_transform(Augment(), 16, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation='bilinear')
    assert len(TrainingSamples(mixed[0], transform).__getitems__(list(keys()))) == LENGTH
    assert len(decoded) >= LENGTH


# The random state of the process


def test_loading_leaves_the_random_state_alone(source):
    batches = iter(loader(TrainingSamples(source, random_transform())))  # makes one draw, workers or not: PyTorch's
    before = random_states()
    assert len(list(batches)) == LENGTH // 4
    assert random_states() == before


def test_seeded_seeds_all_and_restores_after_an_error():
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    before, second = random_states(), []
    with seeded(5):
        first = draw()
    with pytest.raises(ZeroDivisionError), seeded(5):
        second.append(draw()) or 1 / 0
    assert second == [first]
    assert random_states() == before
    with seeded(6):
        assert not set(draw()) & set(first)


# Each evaluation sample once


@pytest.mark.parametrize('replicas', [1, 2, 3, 4, 5])
@pytest.mark.parametrize('length', [1, 7, 12])
def test_evaluation_counts_each_image_once(tmp_path, write_images, replicas, length):
    source = FolderSource(write_images(tmp_path / 'val', {'cat': length}))
    source.labels = list(range(length))  # to know each image by its label
    padded = PadToMultiple(EvaluationSamples(source, plain_transform()), replicas)
    shares = []
    for rank in range(replicas):
        sampler = DistributedSampler(padded, replicas, rank, shuffle=False)
        shares.append([label for _, labels in DataLoader(padded, 3, sampler=sampler) for label in labels.tolist()])
    assert len({len(share) for share in shares}) == 1
    everything = sorted(itertools.chain(*shares))
    assert everything == [IGNORE] * (len(padded) - length) + list(range(length))
    assert len(padded) - length < replicas


def test_padding_has_the_shape_of_the_images(source):
    padded = PadToMultiple(EvaluationSamples(source, plain_transform()), 4)
    assert len(padded) == 28
    assert padded[27][0].shape == padded[0][0].shape
    assert padded[27][1] == IGNORE


# Unreadable images


def test_an_unreadable_image_is_named_counted_and_replaced_in_training(damaged, caplog):
    source, (empty, truncated) = damaged
    samples = TrainingSamples(source, plain_transform())
    with caplog.at_level(logging.WARNING):
        image, label = samples[empty, 0]
        assert torch.equal(samples[truncated, 0][0], samples[truncated + 1, 0][0])
    assert torch.equal(image, samples[empty + 1, 0][0])
    assert label == source.labels[empty + 1]
    assert samples.unreadable == 2
    first, second = (record.getMessage() for record in caplog.records)
    assert 'unreadable image 1, replaced' in first
    assert source.name(empty) in first
    assert 'unreadable image 2, replaced' in second
    assert source.name(truncated) in second


def test_misnamed_images_are_read_and_named(source, caplog):
    """As ImageNet's PNG file with the ending of a JPEG file."""
    samples = TrainingSamples(source, plain_transform())
    expected = [samples[index][0] for index in range(LENGTH)]
    for index in (2, 5):
        Path(source.name(index)).rename(Path(source.name(index)).with_suffix('.JPEG'))
    source = FolderSource(source.root)
    samples = TrainingSamples(source, plain_transform())
    with caplog.at_level(logging.WARNING):
        for _ in range(2):  # named once
            assert all(torch.equal(samples[index][0], expected[index]) for index in range(LENGTH))
    assert samples.unreadable == 0
    assert [record.getMessage() for record in caplog.records] == [
        f'misnamed image, no JPEG file, and read as what it is: {source.name(index)}' for index in (2, 5)]


def test_the_last_image_is_replaced_by_the_first(source):
    with open(source.name(LENGTH - 1), 'wb'):
        pass
    samples = TrainingSamples(source, plain_transform())
    image, label = samples[LENGTH - 1, 0]
    assert torch.equal(image, samples[0, 0][0])
    assert label == source.labels[0]


@pytest.mark.parametrize('workers', [0, 2])
def test_unreadable_images_are_counted_over_the_workers(damaged, workers):
    samples = TrainingSamples(damaged[0], plain_transform())
    images, _ = epoch_of(samples, batch_size=LENGTH, workers=workers)
    assert images.shape == (1, LENGTH, 3, 16, 16)
    assert samples.unreadable == 2


@pytest.mark.parametrize('workers', [1, 2])
def test_unreadable_images_are_named_by_worker_processes(damaged, tmp_path, workers):
    handler = logging.FileHandler(tmp_path / 'log')  # pytest's own handler keeps records in memory: the worker's
    logging.getLogger('lightning_app').addHandler(handler)
    try:
        epoch_of(TrainingSamples(damaged[0], plain_transform()), batch_size=LENGTH, workers=workers)
    finally:
        logging.getLogger('lightning_app').removeHandler(handler)
        handler.close()
    told = (tmp_path / 'log').read_text().splitlines()
    assert len(told) == 2
    assert all(any(damaged[0].name(index) in line for line in told) for index in damaged[1])


def test_a_vanished_image_is_unreadable(source):
    samples = TrainingSamples(source, plain_transform())
    expected = samples[4, 0][0]
    os.remove(source.name(3))
    assert torch.equal(samples[3, 0][0], expected)
    assert samples.unreadable == 1


def test_training_ends_with_an_error_if_nothing_can_be_read(source, refused):
    for index in range(LENGTH):
        with open(source.name(index), 'wb'):
            pass
    samples = TrainingSamples(source, plain_transform())
    with refused(f'training images: {source.name(2)} and all others', 'none of them can be read', 'look at the log'):
        samples[2, 0]
    assert samples.unreadable == LENGTH


def test_an_unreadable_image_stops_an_evaluation(damaged, refused):
    samples = EvaluationSamples(damaged[0], plain_transform())
    samples[2]
    with refused(f'image: {damaged[0].name(3)}', 'it cannot be read', 'data.allow_unreadable=true'):
        samples[3]


def test_the_error_of_a_worker_process_has_three_lines_within(damaged, check_three_lines):
    samples = EvaluationSamples(damaged[0], plain_transform())
    with pytest.raises(InputError) as caught:
        list(DataLoader(samples, 4, num_workers=1))
    text = three_lines(str(caught.value))
    check_three_lines(text, f'image: {damaged[0].name(3)}', 'it cannot be read', 'data.allow_unreadable=true')
    assert text.startswith('image: ')


@pytest.mark.parametrize('workers', [0, 1])
def test_unreadable_images_can_be_left_out_of_an_evaluation(damaged, workers):
    source, numbers = damaged
    samples = EvaluationSamples(source, plain_transform(), allow_unreadable=True)
    images, labels = zip(*DataLoader(samples, 5, num_workers=workers), strict=True)
    assert torch.cat(images).shape == (LENGTH, 3, 16, 16)
    expected = [IGNORE if index in numbers else label for index, label in enumerate(source.labels)]
    assert torch.cat(labels).tolist() == expected
    assert samples.unreadable == 2


def test_images_left_out_are_named(damaged, caplog):
    samples = EvaluationSamples(damaged[0], plain_transform(), allow_unreadable=True)
    samples[3]
    assert 'unreadable image 1, left out' in caplog.text
    assert damaged[0].name(3) in caplog.text


def test_padding_does_not_count_an_unreadable_image_again(source):
    with open(source.name(LENGTH - 1), 'wb'):
        pass
    samples = EvaluationSamples(source, plain_transform(), allow_unreadable=True)
    padded = PadToMultiple(samples, 4)
    assert [padded[index][1] for index in range(LENGTH - 1, len(padded))] == [IGNORE] * 3
    assert samples.unreadable == 1


def test_unreadable_images_in_a_tar_file(tmp_path, damaged, pack):
    source = TarSource(pack(tmp_path / 'train'))
    samples = EvaluationSamples(source, plain_transform(), allow_unreadable=True)
    assert [index for index in range(LENGTH) if samples[index][1] == IGNORE] == list(damaged[1])
