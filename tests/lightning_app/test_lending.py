"""Memory of batches is used again, and never while a tensor makes use of it."""
import os
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_app.data import lending
from lightning_app.data.collate import collate
from lightning_app.data.erase import Erased
from lightning_app.data.lending import FREE, LENT, SPARE, Inline, Lent, stack


@pytest.fixture
def pieces(monkeypatch):
    """Be a worker, and return its memory."""
    monkeypatch.setattr(lending, '_pieces', [])
    monkeypatch.setattr(lending, 'get_worker_info', lambda: 'a worker')
    return lending._pieces


def images(number=0, size=8, count=4):
    return [torch.full((size, size, 3), number, dtype=torch.uint8) for _ in range(count)]


def passed_on(sent):
    """Return what arrives in the training."""
    return pickle.loads(ForkingPickler.dumps(sent))


@pytest.mark.parametrize('dtype', [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize('order', [(0, 1, 2, 3), (0, 3, 1, 2)])
def test_batches_arrive_as_torch_stacks_them(pieces, dtype, order):
    parts = [torch.randint(0, 255, (5, 6, 3)).to(dtype) for _ in range(4)]
    expected = torch.stack(parts).permute(order)
    received = passed_on(Lent(stack(parts).permute(order)))
    assert torch.equal(received, expected)
    assert received.stride() == expected.stride()


def test_memory_is_used_again_when_the_last_tensor_is_gone(pieces):
    batch = passed_on(Lent(stack(images(1))))
    piece, = pieces
    part = batch[2:].float(), batch[2:, 0].requires_grad_(False)
    assert piece[-1] == LENT
    del batch
    assert piece[-1] == LENT
    assert torch.equal(part[1], torch.ones(2, 8, 3, dtype=torch.uint8))
    del part
    assert piece[-1] == FREE
    again = stack(images(2))
    assert again.data_ptr() == piece.data_ptr()
    assert len(pieces) == 1


def test_memory_that_autograd_keeps_is_not_used_again(pieces):
    batch = passed_on(Lent(stack([image.float() for image in images(3)])))
    weight = torch.ones(3, requires_grad=True)
    loss = (batch * weight).sum()
    del batch
    stack([image.float() for image in images(5)])
    loss.backward()
    assert weight.grad.tolist() == [3 * 4 * 64] * 3
    del loss
    assert len(pieces) == 2


def test_batch_that_never_arrives_keeps_its_memory(pieces):
    stack(images(1))
    stack(images(2))
    assert [int(each[0]) for each in pieces] == [1, 2]


def test_few_pieces_are_kept_that_nobody_uses(pieces):
    held = [passed_on(Lent(stack(images(number)))) for number in range(6)]
    assert [int(each[0, 0, 0, 0]) for each in held] == list(range(6))
    assert len(pieces) == 6
    held.clear()
    assert torch.equal(passed_on(Lent(stack(images(7)))), torch.stack(images(7)))
    assert len(pieces) == 1 + SPARE


def test_smaller_batches_fit_and_larger_ones_have_other_memory(pieces):
    for size, same in ((16, False), (8, True), (16, True), (24, False), (16, True)):
        before = {each.data_ptr() for each in pieces}
        batch = passed_on(Lent(stack(images(size, size))))
        assert torch.equal(batch, torch.stack(images(size, size)))
        assert ({each.data_ptr() for each in pieces} == before) == same
        del batch
    assert len(pieces) == 1


def test_batch_of_an_evaluation_is_given_back_after_it(pieces):
    with torch.inference_mode():
        batch = passed_on(Lent(stack(images(1))))
    del batch
    assert pieces[0][-1] == FREE


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='this system forks no processes')
def test_forked_process_gives_nothing_back(pieces):
    batch = passed_on(Lent(stack(images(1))))
    child = os.fork()
    if child == 0:
        del batch
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert pieces[0][-1] == LENT
    del batch
    assert pieces[0][-1] == FREE


def test_small_tensors_travel_in_the_message():
    labels = torch.tensor([3, 1, -1])
    assert b'multiprocessing' not in bytes(ForkingPickler.dumps(Inline(labels)))
    assert torch.equal(passed_on(Inline(labels)), labels)


# Within a loader


class Numbered(Dataset):
    """Images that hold their index, of another size in the second half; labels are the pieces of memory."""

    def __init__(self, channels_last, dtype=torch.uint8):
        self.channels_last, self.dtype = channels_last, dtype

    def __len__(self):
        return 46

    def __getitem__(self, index):
        size = 16 if index < 24 else 20
        image = torch.full((size, size, 3) if self.channels_last else (3, size, size), index, dtype=self.dtype)
        return image.permute(2, 0, 1) if self.channels_last else image, len(lending._pieces)


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('dtype', [torch.uint8, torch.float32])
@pytest.mark.parametrize('held', [False, True])
def test_batches_of_a_loader(workers, channels_last, dtype, held):
    loader = DataLoader(Numbered(channels_last, dtype), 4, num_workers=workers, collate_fn=collate,
                        persistent_workers=workers > 0)
    for _ in range(3):
        batches = list(loader) if held else loader
        for number, (batch, labels) in enumerate(batches):
            assert batch.dtype == dtype
            assert batch.permute(0, 2, 3, 1).is_contiguous() == channels_last
            assert labels.dtype == torch.int64
            assert batch.amin((1, 2, 3)).tolist() == batch.amax((1, 2, 3)).tolist() == list(
                range(4 * number, min(4 * number + 4, 46)))
            if not held:
                # prefetched; being made, on its way and in use; spare
                assert labels.max() <= (workers > 0) * (2 + 3 + SPARE)


def test_images_of_different_sizes_are_no_batch():
    with pytest.raises(RuntimeError, match='equal size'):
        next(iter(DataLoader(Numbered(True), 46, num_workers=1, collate_fn=collate)))


class Whole(Numbered):
    """Images of which nothing is to be erased."""

    def __getitem__(self, index):
        image, pieces = super().__getitem__(index)
        return Erased.of(image), pieces


def test_memory_of_images_to_erase_is_used_again():
    for batch, labels in DataLoader(Whole(True), 4, num_workers=1, collate_fn=collate):
        assert batch.images.permute(0, 2, 3, 1).is_contiguous()
        assert labels.max() <= 2 + 3 + SPARE
