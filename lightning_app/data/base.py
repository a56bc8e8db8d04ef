"""What the data modules share: loaders, batch sizes, transforms, and their place in a distributed run."""
from __future__ import annotations

import dataclasses
import inspect
import os
import shutil
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import distributed
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from se_timm.errors import InputError, message, unknown

from ..settings import as_group, check_choices, is_plain, plain_values
from .augment import INTERPOLATIONS, Augment, Normalisation, evaluation_transform, training_transform
from .collate import collate
from .device_decoding import Encoded, check_device_decoding, decode
from .jpeg import ACCURATE, choose_decoder, is_jpeg
from .samples import (
    EvaluationSamples,
    PadToMultiple,
    PredictionSamples,
    SeededSampler,
    TrainingSamples,
    run_seed,
    set_seed,
)
from .sources import ImageFolder, Source, first_files
from .workers import Loader, cores, start_method, start_server

__all__ = ['ImageDataModule', 'data_of', 'evaluation_settings']

# as our ImageNet networks; mean, std and crop are timm's defaults
WITHOUT_NETWORK = {'input_size': (3, 224, 224), 'interpolation': 'bilinear'}
CONFIGURED = ('mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')  # beside sizes, what networks have settings of
LEAST = {'batch_size': 1, 'eval_batch_size': 1, 'num_workers': 0, 'image_size': 1, 'eval_size': 1, 'repeats': 1,
         'prefetch': 1}
PREFETCH = 2
# settings of the Trainer with which nothing would be computed, or by which something is divided
NOT_ZERO = {'accumulate_grad_batches': 'batches', 'check_val_every_n_epoch': 'epochs',
            'val_check_interval': 'batches, or a share of an epoch'}
ARCHIVES = tuple(ending for _, endings, _ in shutil.get_unpack_formats() for ending in endings)


class ImageDataModule(LightningDataModule):
    """Base of the data modules: images with labels, for training, validation, test, and a folder for prediction.

    Batches are pairs of images `(N, 3, H, W)`, float, normalised, and labels `(N,)`, int64; those of its loaders by
    themselves are bytes, which `on_after_batch_transfer` normalises. A label of -1 does not count (padding that makes
    all processes equally long).

    Args:
        batch_size: Images in one optimiser step, over all processes and accumulated batches, so that a recipe is the
            same for any number of devices but for batch norm, whose statistics are those of a device's share.
        eval_batch_size: Images in one evaluation step, over all processes; where not given, as many in each process
            as in training.
        num_workers: Worker processes that load images, in each training process; where not given, one a core, at
            most 8.
        image_size: Side of the training images in pixels; where not given, as the network's configuration says.
        eval_size: Side of the centre crop in evaluation, in pixels; as `image_size` where not given.
        crop_pct: Crop side / shorter side of the resized image in evaluation: 0.875 is 224 of 256, 0.849 is 299 of
            352; where not given, as the network's configuration says.
        crop_mode: What is resized in evaluation: the shorter side (`center`), both, whatever their ratio (`squash`), or
            the longer, with borders (`border`); where not given, as the network's configuration says.
        interpolation: `bilinear`, `bicubic` or another of timm's; where not given, as the network's configuration says.
        mean: Mean of each channel, of pixels from 0 to 1, that is subtracted; where not given, as the network's
            configuration says.
        std: Standard deviation of each channel to divide by; where not given, as the network's configuration says.
        augment: Training augmentation.
        repeats: How many times each image stands in a step, augmented anew (Hoffer et al., repeated augmentation); an
            epoch has as many steps, and as fewer images.
        eval_views: What evaluation sees of an image: `center`, `flip` (the centre crop and its mirror image), or `ten`
            (centre and corners, and their mirror images); probabilities are averaged. Memory and time grow with them.
        num_classes: Number of classes; found from the data where not given.
        images: A folder of images, or one image, for prediction.
        allow_unreadable: Leave unreadable images out of an evaluation instead of stopping it.
        decoder: Of JPEG files: `auto` (the one that is the fastest with these files here), `nvimgcodec`, `simplejpeg`,
            `torchcodec`, `torchvision` or `pillow`. All give the same pixels; `nvimgcodec` decodes no more of a file
            than its crop needs. `simplejpeg-fast` takes a fifth less time than `simplejpeg`, and differs by up to 2
            levels on average; of training images only, where `exact` is not false.
        exact: Crop and resize as timm does, by Pillow, to the pixel, or faster, within a level or two of it: where not
            given evaluations are exact and trainings fast.
        decode_on_device: Leave decoding, cropping and resizing of training images to the GPU, for machines with few
            cores. Needs TorchCodec (nvJPEG), whose pixels are not the others' to the bit; crops and flips only.
        prefetch: Batches that each worker has ready, for storage that is slow at times; they take memory.
    """

    def __init__(
            self,
            batch_size: int = 256,
            eval_batch_size: int | None = None,
            num_workers: int | None = None,
            image_size: int | None = None,
            eval_size: int | None = None,
            crop_pct: float | None = None,
            crop_mode: Literal['center', 'squash', 'border'] | None = None,
            interpolation: str | None = None,
            mean: tuple[float, float, float] | None = None,
            std: tuple[float, float, float] | None = None,
            augment: Augment = Augment(),  # noqa: B008  (frozen)
            repeats: int = 1,
            eval_views: Literal['center', 'flip', 'ten'] = 'center',
            num_classes: int | None = None,
            images: str | None = None,
            allow_unreadable: bool = False,
            decoder: Literal[
                'auto', 'nvimgcodec', 'simplejpeg', 'simplejpeg-fast', 'torchcodec', 'torchvision', 'pillow',
            ] = 'auto',
            exact: bool | None = None,
            decode_on_device: bool = False,
            prefetch: int = PREFETCH,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.image_size = image_size
        self.eval_size = eval_size
        self.crop_pct = crop_pct
        self.crop_mode: str | None = crop_mode
        self.interpolation = interpolation
        self.mean = mean
        self.std = std
        self.augment = as_group('data.augment', augment, Augment)
        check_choices('data.augment', self.augment, Augment)
        self.repeats = repeats
        self.eval_views = eval_views
        self.given_num_classes = num_classes
        self.images = images and os.path.expanduser(images)
        self.allow_unreadable = allow_unreadable
        self.decoder: str = decoder
        self.exact = exact
        self.decode_on_device = decode_on_device
        self.prefetch = prefetch
        self._fastest: str | None = None  # decoder, once it was looked for
        self._found: dict[str, Any] = {}  # settings that the network's configuration has where none are given
        self._begin_anew()

    # What a data module must provide

    @abstractmethod
    def open(self, split: str) -> Source:
        """Return the images of `split`: `train`, `val` or `test`."""

    @abstractmethod
    def find_classes(self) -> list[str] | None:
        """Return the names of the classes in label order, or None if there is no labelled data here."""

    def use_classes(self, names: list[str]) -> None:
        """Number labels as in `names`, those of a checkpoint that is evaluated, where the data alone do not say how."""

    # What it gets

    @cached_property
    def class_names(self) -> list[str] | None:
        """Names of the classes in label order; None if there is no labelled data."""
        return self.find_classes()

    @property
    def num_classes(self) -> int | None:
        """Number of classes, given or found; None if neither."""
        if self.given_num_classes is not None:
            return self.given_num_classes
        return len(self.class_names) if self.class_names else None

    def prepare_transforms(self) -> None:
        """Complete the settings by the network's configuration, and make the transforms."""
        net = getattr(getattr(self.trainer, 'lightning_module', None), 'net', None)
        cfg, self.train_size = evaluation_settings(vars(self), getattr(net, 'pretrained_cfg', None))
        self._found = {**{name: cfg[name] for name in CONFIGURED}, 'image_size': self.train_size}
        normalisation = {name: cfg[name] for name in ('mean', 'std', 'interpolation')}
        self.input_size = cfg['input_size']
        self.normalisation_settings = normalisation
        self.normalisation = Normalisation(normalisation['mean'], normalisation['std'])
        self.transform_of_size = partial(
            training_transform, self.augment, exact=bool(self.exact), **normalisation)
        self.training_transform = self.transform_of_size(self.train_size)  # type: ignore[call-arg]
        self.evaluation_transform = evaluation_transform(
            self.input_size[-1], cfg['crop_pct'], self.eval_views, self._exact_evaluation, cfg['crop_mode'],
            **normalisation)

    def _begin_anew(self) -> None:
        """Forget what a checkpoint, or a callback, said of an earlier training."""
        self.start = (0, 0)  # epoch and images of it that a checkpoint has behind it
        self.given_accumulation: int | None = None  # where a checkpoint needs another
        self.size_of_epoch: Callable[[int], int] | None = None  # side of the training crops in an epoch

    def setup(self, stage: str) -> None:
        """Open what `stage` (fit, validate, test or predict) needs."""
        if (self.trainer and self.trainer.state.status == TrainerStatus.RUNNING
                and getattr(self.trainer, 'datamodule', None) is self and data_of(self.trainer) is not self):
            return  # Lightning calls that of an earlier training, too
        self._check_settings()
        if self._start_method == 'forkserver':
            start_server()
        self.prepare_transforms()
        if stage == 'fit':
            self._begin_anew()  # before callbacks and checkpoints have their say
            self.settings()  # a checkpoint will hold them
            if left_out := self.left_out:
                rank_zero_info(f'data: checkpoints are without {", ".join(left_out)}, not being plain values')
            source = self._checked(self.open('train'))
            self.training = TrainingSamples(
                source, self.training_transform, self.transform_of_size, self._decoder_of(source),
                self.decode_on_device)
            if self.decode_on_device:
                check_device_decoding(self.training_transform)
            self._check_training_step()
            self.validation: EvaluationSamples | None = None
        if stage == 'validate' or (stage == 'fit' and not (self.trainer and self.trainer.limit_val_batches == 0)):
            self.validation = self._evaluation(self.open('val'))
        if stage == 'fit':
            rank_zero_info(self._described())
        if stage == 'test':
            self.testing = self._evaluation(self.open('test'))
        if stage == 'predict':
            if self.images is None:
                raise InputError(message(
                    'data.images: none', 'prediction needs images', 'say --data.images FOLDER'))
            if str(self.images).lower().endswith(ARCHIVES) and Path(self.images).is_file():
                raise InputError(message(
                    f'data.images: {self.images}', 'it is an archive, not an image or a folder of images',
                    'unpack it, and name the folder'))
            folder = ImageFolder(self.images)
            self.prediction = PredictionSamples(
                folder, self.evaluation_transform, self._decoder_of(folder, self._exact_evaluation))

    def train_dataloader(self) -> DataLoader[Any]:
        """Return shuffled training batches; an incomplete last step is left out."""
        self.sampler = sampler = SeededSampler(
            len(self.training), self._world_size, self._rank, run_seed(), multiple=self.batch_size, start=self.start,
            repeats=self.repeats, size_of_epoch=self.size_of_epoch)
        if self.trainer:  # Lightning says it to the sampler too, but after workers have begun to fetch by it
            epochs: Any = self.trainer.fit_loop.epoch_progress.current
            sampler.set_epoch(epochs.processed)
        return self._loader(self.training, sampler, self._process_batch_size, drop_last=True)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Return a batch on the device; images that are still files are decoded there.

        What a subclass draws in `on_after_batch_transfer` is seeded here, if the module seeds what a step draws.
        """
        if self.trainer and self.trainer.training and getattr(self.trainer.lightning_module, 'seeds_steps', False):
            loop = self.trainer.fit_loop.epoch_loop
            set_seed(run_seed(), self.trainer.current_epoch, loop.batch_idx + 1, self.trainer.global_rank, 1)
        if isinstance(batch, torch.Tensor):  # an example of Lightning's `to_onnx` and such
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        images, labels = batch
        if not isinstance(images, Encoded):
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        return list(decode(images, labels, device, self.training.transform_of, self.training.__getitem__))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Normalise the images, which arrive as bytes, a quarter of the size, and line up the versions of them.

        Versions `(N, S, 3, H, W)` become `(S * N, 3, H, W)`, all first ones first, as timm's JSD loss has it.
        """
        if isinstance(batch, torch.Tensor):
            return batch
        images, labels = batch
        dtype: Any = self.trainer.lightning_module.dtype if self.trainer else torch.float32
        images = self.normalisation(images, dtype)
        if images.dim() == 5 and self.trainer and self.trainer.training:
            images = images.transpose(0, 1).flatten(0, 1)
        return images, labels

    def check_order(self) -> None:
        """Raise `InputError` if another process has other training images, another order, or stands elsewhere.

        Collective, three numbers.
        """
        if self.trainer is None or self.trainer.world_size == 1 or not hasattr(self, 'sampler'):  # of a subclass
            return
        own = torch.tensor(
            [self.trainer.global_step, self.training.digest, self.sampler.digest()],
            device=self.trainer.strategy.root_device)
        every = [torch.empty_like(own) for _ in range(self.trainer.world_size)]
        distributed.all_gather(every, own)
        first_step, *firsts = every[0].tolist()
        for rank, (step, *theirs) in enumerate(each.tolist() for each in every):
            if step != first_step:
                raise InputError(message(
                    f'ckpt_path: process {rank} stands at step {step}, and process 0 at step {first_step}',
                    'they go on from checkpoints of other steps', 'name the checkpoint: where a shared file system '
                    'is slow, auto and last find others on other machines'))
            for what, number, first in zip(('images', 'order of images'), theirs, firsts, strict=True):
                if number != first:
                    raise InputError(message(
                        f'data: process {rank} has another {what} than process 0',
                        'they would train on some images several times and never on others',
                        'give all machines the same data.root, the same seed_everything and the same packages'))

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the validation images in order."""
        if self.validation is None:  # the Trainer was to validate nothing, and does, as in `lr_find`
            self.validation = self._evaluation(self.open('val'))
        return self._evaluation_loader(self.validation)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the test images in order."""
        return self._evaluation_loader(self.testing)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the images to predict in order; the labels are their indices."""
        return self._evaluation_loader(self.prediction)

    # How a run is divided

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def _accumulated(self) -> int:
        return self.trainer.accumulate_grad_batches if self.trainer else 1

    @property
    def _process_batch_size(self) -> int:
        """Images in one training batch of one process."""
        parts = self._world_size * self._accumulated
        if self.batch_size % parts:
            below = max(self.batch_size // parts, 1) * parts
            raise InputError(message(
                f'data.batch_size: {self.batch_size}',
                f'it is divided among {self._world_size} processes, each accumulating {self._accumulated} batches',
                f'take a multiple of {parts}, such as {below} or {below + parts}'))
        return self.batch_size // parts

    @property
    def images_per_batch(self) -> int:
        """Images in one training batch over all processes: a step's, divided by the batches that are accumulated."""
        return self.batch_size // self._accumulated

    @property
    def _process_workers(self) -> int:
        """Worker processes of one process."""
        if self.num_workers is not None:
            return self.num_workers
        local = int(os.environ.get('LOCAL_WORLD_SIZE') or 0) or (self.trainer.num_devices if self.trainer else 1)
        return min(8, max(cores() // local, 1))

    @property
    def _start_method(self) -> str | None:
        """How workers are started, if there are any."""
        return start_method(self._world_size) if self._process_workers else None

    def _check_settings(self) -> None:
        for name in (*inspect.signature(ImageDataModule).parameters, 'given_num_classes'):
            if isinstance(value := vars(self).get(name), (np.generic, np.ndarray)):
                setattr(self, name, value.tolist())  # loaders, comparisons and checkpoints want Python's numbers
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise InputError(message(
                    f'data.{name}: {value}', f'it must be at least {least}', 'correct it, or leave it out'))
        for name, what in NOT_ZERO.items():
            if type(value := getattr(self.trainer, name, None)) is int and value == 0:  # a share of 0 is each batch
                raise InputError(message(
                    f'trainer.{name}: 0', f'it is a number of {what}', 'take a number from 1, or leave it out'))
        if any(isinstance(each, GradientAccumulationScheduler) for each in getattr(self.trainer, 'callbacks', [])):
            raise InputError(message(
                'trainer.callbacks: GradientAccumulationScheduler',
                'a batch of the loader is a part of data.batch_size, the images of a step, and may not change',
                'say trainer.accumulate_grad_batches, or take another data.batch_size in a training that goes on'))
        if self.exact and self.decoder in ACCURATE:
            raise InputError(message(
                f'data.decoder: {self.decoder}, with data.exact: true', 'its pixels are not exact',
                f'take {ACCURATE[self.decoder]}, or leave data.exact out'))
        if self.crop_pct is not None and not 0 < self.crop_pct < 2:  # 1.15 of timm's VOLO: with a border
            raise InputError(message(
                f'data.crop_pct: {self.crop_pct}', 'it is the side of the crop / the shorter side of the image',
                'take a share, such as 0.875 for a crop of 224 from 256'))
        self._check_normalisation()

    def _check_normalisation(self) -> None:
        if self.interpolation is not None and self.interpolation not in INTERPOLATIONS:
            raise InputError(unknown('data.interpolation', self.interpolation, INTERPOLATIONS))
        for name, values in (('mean', self.mean or ()), ('std', self.std or ())):
            if not all(0 <= value <= 1 for value in values) or (name == 'std' and 0 in values):
                raise InputError(message(
                    f'data.{name}: {list(values)}', 'it is of pixels from 0 to 1',
                    f'take numbers {"above 0 and" if name == "std" else "from 0"} up to 1; '
                    'divide those of pixels from 0 to 255 by 255'))

    def _check_training_step(self) -> None:
        self._process_batch_size  # noqa: B018  (checks divisibility before any work)
        if self.prefetch != PREFETCH and not self._process_workers:
            rank_zero_warn('data.prefetch has no effect: it is of worker processes, and data.num_workers is 0')
        if self.batch_size % self.repeats:
            raise InputError(message(
                f'data.repeats: {self.repeats}, with data.batch_size {self.batch_size}',
                'each image stands so many times in a step, and in some it would not',
                f'take a batch size that is a multiple of {self.repeats}'))
        if self.repeats > 1 and getattr(self.trainer, 'overfit_batches', False):
            raise InputError(message(
                f'data.repeats: {self.repeats}, with trainer.overfit_batches',
                'Lightning reads the images in order then, each once', 'leave out one of the two'))
        if len(self.training) < self.batch_size:
            raise InputError(message(
                f'data.batch_size: {self.batch_size}',
                f'with {len(self.training)} training images not one step is left, as incomplete batches are left out',
                f'take a batch size of at most {len(self.training)}'))
        if self.trainer:
            self._check_batches(self.trainer)

    def batches_of_epoch(self, trainer: Any) -> int:
        """Return how many batches a process has in an epoch, as the Trainer limits and accumulates them."""
        limit = trainer.limit_train_batches
        batches = len(self.training) // self.batch_size * trainer.accumulate_grad_batches
        return min(batches, limit) if isinstance(limit, int) else int(batches * limit)

    def _check_batches(self, trainer: Any) -> None:
        every = getattr(trainer, 'val_check_interval', None)  # where it is a time, Lightning sets none
        batches = self.batches_of_epoch(trainer)
        within_epochs = trainer.check_val_every_n_epoch is not None and trainer.limit_val_batches
        if within_epochs and isinstance(every, int) and every > batches:
            raise InputError(message(
                f'trainer.val_check_interval: {every}', f'an epoch has {batches} batches',
                f'take at most {batches}, a share of them such as 0.5, or count over the epochs by '
                'trainer.check_val_every_n_epoch: null'))
        accumulated = trainer.accumulate_grad_batches
        if left := batches % accumulated:
            rank_zero_warn(
                f'trainer.limit_train_batches: {trainer.limit_train_batches}: an epoch has {batches} batches, '
                f'{accumulated} make a step, and the last step has {left} of {accumulated}, with a smaller gradient')

    def _checked(self, source: Source) -> Source:
        if self.given_num_classes is not None and len(source.classes) != self.given_num_classes:
            raise InputError(message(
                f'data.num_classes: {self.given_num_classes}',
                f'the training images have {len(source.classes)} classes',
                'leave data.num_classes out; it is found from the data'))
        return source

    def _evaluation(self, source: Source) -> EvaluationSamples:
        if self.class_names and list(source.classes) != list(self.class_names):
            raise InputError(message(
                f'{type(self).__name__}.open: images with {len(source.classes)} classes of their own numbers',
                f'the class names are {len(self.class_names)} others, or in another order, and labels would be wrong',
                'let it number the labels as in self.class_names, such as ImageNetDataModule does'))
        return EvaluationSamples(
            source, self.evaluation_transform, self.allow_unreadable,
            self._decoder_of(source, self._exact_evaluation))

    def _described(self) -> str:
        """Return what a training sees, in a line."""
        jpeg = any(map(is_jpeg, first_files(self.training.source, 1)))
        device = self.trainer.strategy.root_device.type if self.trainer else 'the device'
        by = f'torchcodec on {device}' if self.decode_on_device else self.training.decoder
        validated = 'no' if self.validation is None else f'{len(self.validation):,}'
        return (f'{len(self.training):,} training and {validated} validation images'
                + (f', JPEG files decoded by {by}' if jpeg else ''))

    def _decoder_of(self, source: Source, accurate: bool = False) -> str:
        """Return what decodes the JPEG files of `source`; which one is the fastest is found by the first source."""
        if self.decoder != 'auto':
            return choose_decoder(self.decoder, accurate=accurate)
        self._fastest = self._fastest or choose_decoder(examples=first_files(source))
        return self._fastest

    @property
    def _exact_evaluation(self) -> bool:
        return self.exact is None or self.exact

    def _evaluation_loader(self, samples: EvaluationSamples) -> DataLoader[Any]:
        padded = PadToMultiple(samples, self._world_size)
        sampler: DistributedSampler[Any] = DistributedSampler(padded, self._world_size, self._rank, shuffle=False)
        total = _given(self.eval_batch_size, self.images_per_batch)
        batch_size = max(total // self._world_size, 1)
        return self._loader(padded, sampler, batch_size, drop_last=False)

    def _loader(
            self, samples: Dataset[Any], sampler: DistributedSampler[Any], batch_size: int, drop_last: bool,
    ) -> DataLoader[Any]:
        pin_memory = bool(self.trainer and self.trainer.strategy.root_device.type == 'cuda')
        workers = self._process_workers
        return Loader(
            samples, batch_size=batch_size, sampler=sampler, num_workers=workers, drop_last=drop_last,
            collate_fn=collate, pin_memory=pin_memory, prefetch_factor=self.prefetch if workers else None,
            persistent_workers=workers > 0, multiprocessing_context=self._start_method)

    def settings(self) -> dict[str, Any]:
        """Return the class and its arguments in plain types, as a checkpoint keeps them.

        Those that the network's configuration said are among them: it may say something else another time. What a
        subclass takes that is not plain, such as code or arrays, is left out.
        """
        left_out = self.left_out
        return {'class_path': f'{type(self).__module__}.{type(self).__qualname__}', 'init_args': {
            name: plain_values(f'data.{name}', value) for name, value in self._arguments().items()
            if name not in left_out}}

    @property
    def left_out(self) -> list[str]:
        """The arguments of a subclass that are not plain, which checkpoints are without."""
        common = inspect.signature(ImageDataModule).parameters
        return sorted(name for name, value in self._arguments().items() if name not in common and not is_plain(value))

    @classmethod
    def at_default(cls, names: Collection[str], given: Mapping[str, Any]) -> list[str]:
        """Return which of these arguments are `given` as their default, or not at all; only those of the class."""
        defaults = {name: parameter.default for name, parameter in cls._parameters().items() if name in names}
        return [name for name, default in defaults.items()
                if (value := given.get(name, default)) is default or (is_plain(value) and value == default)]

    @classmethod
    def _parameters(cls) -> dict[str, inspect.Parameter]:
        return {name: parameter for each in cls.__mro__[::-1] if issubclass(each, ImageDataModule)
                for name, parameter in inspect.signature(each).parameters.items()
                if parameter.kind is not parameter.VAR_KEYWORD}

    def _arguments(self) -> dict[str, Any]:
        names = list(self._parameters())
        if missing := [name for name in names if name != 'num_classes' and not hasattr(self, name)]:
            raise InputError(message(
                f'data: {type(self).__name__} without an attribute {missing[0]}',
                'a checkpoint holds the arguments of the data module, so that it can be evaluated on its own',
                f'let its __init__ say self.{missing[0]} = {missing[0]}'))
        values = {name: _given(getattr(self, name), self._found.get(name)) for name in names if name != 'num_classes'}
        return values | {'num_classes': self.given_num_classes, 'augment': dataclasses.asdict(self.augment)}


def data_of(trainer: Any) -> Any:
    """Return the data module of a Trainer's present call, None without; `trainer.datamodule` may be of an earlier."""
    selector = getattr(getattr(trainer, '_data_connector', None), '_datahook_selector', None)
    return selector.datamodule if selector else getattr(trainer, 'datamodule', None)


def evaluation_settings(
        given: Mapping[str, Any], pretrained_cfg: dict[str, Any] | None) -> tuple[dict[str, Any], int]:
    """Return how images are evaluated, and the side of the training images in pixels.

    They are the network's settings, with what a data module was given in their place: `input_size`, `mean`, `std`,
    `interpolation`, `crop_pct`, `crop_mode`.
    """
    cfg = timm.data.resolve_data_config(pretrained_cfg=pretrained_cfg or WITHOUT_NETWORK)
    train_size = _given(given.get('image_size'), cfg['input_size'][-1])
    size = _given(given.get('eval_size'), train_size)
    settings = {name: _given(given.get(name), cfg[name]) for name in CONFIGURED}
    return {**settings, 'input_size': (3, size, size)}, train_size


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value
