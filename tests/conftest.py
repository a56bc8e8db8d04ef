"""Guards around every test, and what the tests of the program share: small images, the command line, W&B's records."""
import csv
import ipaddress
import itertools
import json
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook

REPOSITORY = Path(__file__).parents[1]

if 'PYTEST_XDIST_WORKER' in os.environ:  # as many processes as cores: each with as many threads would wait for others
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    torch.set_num_threads(1)

os.environ['LITDATA_DISABLE_VERSION_CHECK'] = '1'  # read where it is imported; older ones ask PyPI for newer ones

# Environment that Lightning, torch and their children set in a run and mean to leave behind.
MAY_CHANGE = {
    'PL_GLOBAL_SEED', 'PL_SEED_WORKERS', 'MASTER_ADDR', 'MASTER_PORT', 'NODE_RANK', 'LOCAL_RANK', 'WORLD_SIZE',
    'CUBLAS_WORKSPACE_CONFIG', 'CUDA_MODULE_LOADING', 'KMP_INIT_AT_FORK', 'KMP_DUPLICATE_LIB_OK', 'TRITON_CACHE_DIR',
    'TORCHINDUCTOR_CACHE_DIR', 'WANDB_SERVICE', 'WANDB_X_SERVICE', 'PYTEST_CURRENT_TEST', 'CRC32C_SW_MODE',
    'TORCHELASTIC_SIGNALS_TO_HANDLE', 'QT_QPA_PLATFORM_PLUGIN_PATH', 'QT_QPA_FONTDIR',
    '_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR',
}
# What tools put into the repository's root by themselves.
TOOLS_FILES = {'.pytest_cache', '.ruff_cache', '.mypy_cache', '.hypothesis', '.coverage', '__pycache__', '.git'}


# Of these tests, which take long and have many parameters, one in so many runs by default, and the others are slow.
# By modules: the contract, folding, networks, kernels; then configs, resuming, errors.
ONE_IN = {
    'test_other_sizes_are_taken': 7, 'test_what_is_dropped_is_dropped_in_training_only_or_refused': 4,
    'test_features_only_gives_the_intermediates_in_every_form': 6, 'test_input_channels_are_the_users': 5,
    'test_part_of_a_deep_network_scripts_traces_exports_and_compiles': 5,
    'test_every_network_scripts_traces_exports_and_compiles': 2,
    'test_place_inside_a_bottleneck_scripts_traces_exports_and_compiles': 2,
    'test_every_variant_scripts_traces_exports_and_compiles': 5, 'test_device_context_reaches_every_tensor': 5,
    'test_gradient_checkpointing_changes_neither_outputs_nor_gradients': 3,
    'test_an_image_alone_has_the_logits_it_has_in_a_batch': 3, 'test_device_and_dtype_reach_every_tensor': 5,
    'test_pruned_network_ends_at_the_tap_and_uses_every_parameter': 3,
    'test_folded_network_takes_every_form': 4, 'test_every_variant_keeps_its_logits': 5,
    'test_every_network_keeps_its_logits': 3, 'test_timms_networks_keep_their_logits': 3,
    'test_residual_networks_lose_all_batch_norms_and_all_full_size_gates': 3,
    'test_networks_without_residual_tails_lose_their_batch_norms_and_keep_their_gates': 2,
    'test_feature_extractors_keep_their_features': 3,
    'test_block_computes_what_its_placement_means': 5, 'test_tag_decides_the_topology': 6,
    'test_saved_network_comes_back_with_its_topology_and_arguments': 4,
    'test_topology_agreeing_with_the_tag_is_taken': 6, 'test_tag_does_not_change_the_layout_of_the_weights': 6,
    'test_legacy_weights_give_legacy_logits_and_go_back': 2, 'test_key_map_is_strict_both_ways': 3,
    'test_ablation_costs_what_is_printed': 6, 'test_equation_5_counts_the_weights_of_every_network': 5,
    'test_networks_of_torchvision': 3, 'test_step_is_that_of_timm': 3,
    'test_as_written': 3, 'test_excite_backward': 3, 'test_excite': 3, 'test_compiles_with_and_without_each_part': 3,
    'test_overlay_goes_on_every_recipe': 7, 'test_recipe_trains_and_validates_a_step': 3,
    'test_plain_twin_differs_in_se_alone': 5, 'test_host_asks_for_nothing': 4,
    'test_training_resumed_at_any_step_is_the_unbroken_one': 4, 'test_resumed_training_is_the_unbroken_one': 5,
    'test_training_that_is_started_again_goes_on': 3, 'test_signal_saves_after_the_step_and_ends': 3,
    'test_damaged_checkpoint_is_named_and_the_one_before_it_used': 5, 'test_another_optimiser_cannot_go_on': 4,
    'test_good_checkpoint_is_kept_and_named_when_the_training_diverges': 3,
    'test_file_that_is_no_checkpoint_of_ours': 3, 'test_truncated_checkpoint': 3,
    'test_checkpoint_of_another_network': 2, 'test_checkpoint_alone_gives_the_numbers_of_the_fit': 3,
    'test_multiply_adds_are_within_one_per_cent_of_the_papers_or_it_says_why': 3, 'test_size_is_that_of_others': 2,
    'test_multiply_adds_are_the_papers': 3, 'test_constant_gates_go_on_scaling': 2, 'test_step_of_a_network': 2,
    'test_network_computes_the_same_until_it_is_trained_and_after_removal': 2, 'test_any_strides': 2,
    'test_same_bits_twice_and_wherever_the_tensors_lie': 2, 'test_fused_networks_are_networks_of_timm': 2,
    'test_fused_tails_keep_to_the_statistics': 2, 'test_same_training_same_metrics_and_exact_resume': 2,
    'test_signal_at_a_validation_within_an_epoch': 2, 'test_epoch_that_cannot_be_continued': 3,
    'test_training_that_ended_early_goes_on': 3, 'test_training_goes_on_from_the_best': 2,
    'test_every_so_many_epochs_and_after_the_last': 3, 'test_worker_goes_on_when_the_job_is_asked_to_stop': 3,
    'test_evaluation_is_a_run_of_its_own': 2, 'test_evaluation_that_is_stopped_has_the_status_of_that': 2,
    'test_script_runs_as_main_with_its_arguments_and_our_networks': 2, 'test_single_image': 3,
    'test_recipe_builds': 2, 'test_dropout_is_senet154s_alone': 6, 'test_compiles_for_hopper': 3,
    'test_biases_and_batch_norms_have_no_weight_decay': 4, 'test_classifier_is_reset_and_removed': 3,
    'test_layer_decay_takes_every_parameter_once_and_grows_towards_the_head': 4,
    'test_every_parameter_gets_a_gradient': 3, 'test_last_intermediate_is_forward_features': 3,
    'test_what_optimisers_count_is_no_setting': 5, 'test_plain_twin_is_timms_network': 2,
    'test_every_placement_trains_scripts_and_traces': 2, 'test_blocks_and_classes_that_are_named': 2,
    'test_gates_are_not_lost_when_layers_are_joined': 2, 'test_every_decoder_gives_the_same_parts': 2,
    'test_epoch_of_as_many_other_images_cannot_be_continued': 2,
    'test_training_that_the_server_does_not_take_is_kept_offline': 2,
}


@pytest.hookimpl(tryfirst=True)  # before pytest leaves the slow tests out
def pytest_collection_modifyitems(items):
    """Mark as slow what `ONE_IN` leaves out, and run it last: something like it runs by default.

    Tests that are slow by themselves are not counted.
    """
    quick = (item for item in items if item.get_closest_marker('slow') is None)
    left_out = set()
    for _, same in itertools.groupby(quick, key=lambda item: (item.path, item.originalname)):
        for number, item in enumerate(same):
            if number % ONE_IN.get(item.originalname, 1):
                item.add_marker(pytest.mark.slow)
                left_out.add(item)
    items.sort(key=left_out.__contains__)


def pytest_runtest_setup(item):
    """Leave out what begins after the second TESTS_UNTIL of the epoch: CI runs the slow tests while there is time."""
    if time.time() > float(os.environ.get('TESTS_UNTIL', 'inf')):
        pytest.skip('no time is left')


# Guards


@pytest.fixture(autouse=True)
def restored_environment():
    """Fail a test that leaves environment variables behind, and restore them in any case."""
    before = dict(os.environ)
    yield
    after = dict(os.environ)
    os.environ.clear()
    os.environ.update(before)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} - MAY_CHANGE
    assert not changed, f'environment variables changed: {sorted(changed)}'


@pytest.fixture(autouse=True)
def own_home(restored_environment, tmp_path_factory):
    """Give the test a home of its own, no W&B account, and nothing to download from."""
    home = tmp_path_factory.mktemp('home')
    # not the fixture `monkeypatch`: it may be undone after the guards have looked
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(('WANDB_', 'SLURM_', 'PL_', 'MASTER_', 'LOCAL_RANK', 'WORLD_SIZE')):
                patch.delenv(name)
        patch.setenv('HOME', str(home))
        patch.setenv('NETRC', str(home / 'netrc'))
        for name in ('CACHE_DIR', 'CONFIG_DIR', 'DATA_DIR'):  # not WANDB_DIR: it would win over the run's folder
            patch.setenv(f'WANDB_{name}', str(home / name.lower()))
        patch.setenv('WANDB_ERROR_REPORTING', 'false')
        patch.setenv('HF_HUB_OFFLINE', '1')
        patch.setattr(sys, 'argv', sys.argv[:1])  # LightningCLI warns if pytest's arguments stand beside given ones
        yield home


@pytest.fixture(autouse=True)
def no_network():
    """Refuse connections to anything but this machine."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            host = address[0]
            assert host == 'localhost' or ipaddress.ip_address(host).is_loopback, f'connection to {address}'
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, 'connect', guarded)
        yield


@pytest.fixture(autouse=True)
def same_working_directory():
    """Return to the working directory; fail if something was left in the repository's root."""
    before, files = os.getcwd(), set(os.listdir(REPOSITORY))
    yield
    now = os.getcwd()
    os.chdir(before)
    assert now == before, f'the working directory became {now}'
    until = time.monotonic() + 10
    while (left := set(os.listdir(REPOSITORY)) - files - TOOLS_FILES) and time.monotonic() < until:
        time.sleep(0.05)  # tests of other workers try whether the folder can be written to: theirs goes by itself
    assert not left, f'files left in the repository: {sorted(left)}'


@pytest.fixture(autouse=True)
def same_signal_handlers():
    """Fail a test after which a signal is handled in another way."""
    watched = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in watched}
    yield
    after = {number: signal.getsignal(number) for number in watched}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after == before


@pytest.fixture(autouse=True)
def no_leaked_threads():
    """Fail a test that leaves a thread behind which would keep the process from ending."""
    before = set(threading.enumerate())
    yield
    left = [thread for thread in threading.enumerate()
            if thread not in before and not thread.daemon and thread.is_alive()]
    for thread in left:
        thread.join(timeout=5)
    left = [thread.name for thread in left if thread.is_alive()
            # torch.compile keeps its pool of compile workers, and concurrent.futures ends it at exit
            and not thread.name.startswith(('ThreadPoolExecutor', 'QueueManagerThread', 'SubprocPool'))]
    assert not left, f'threads left: {left}'


@pytest.fixture(autouse=True)
def no_process_group():
    """Destroy a process group that a test leaves, and fail it."""
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        pytest.fail('a process group was left')


@pytest.fixture(autouse=True)
def same_torch_settings():
    """Restore torch's random state and global switches; fail a test that leaves a switch changed."""
    def switches():
        return {
            'deterministic': torch.are_deterministic_algorithms_enabled(), 'dtype': torch.get_default_dtype(),
            'grad': torch.is_grad_enabled(), 'threads': torch.get_num_threads(),
            'anomaly': torch.is_anomaly_enabled(), 'inference': torch.is_inference_mode_enabled()}

    random_state, before = (random.getstate(), np.random.get_state(), torch.get_rng_state()), switches()
    yield
    random.setstate(random_state[0])
    np.random.set_state(random_state[1])
    torch.set_rng_state(random_state[2])
    after = switches()
    torch.use_deterministic_algorithms(before['deterministic'])
    torch.set_default_dtype(before['dtype'])
    torch.set_grad_enabled(before['grad'])
    torch.set_num_threads(before['threads'])
    assert after == before


@pytest.fixture(autouse=True)
def finished_wandb():
    """End the W&B run of a test and W&B's service: another run would go on with the one, in the folder of the other."""
    yield
    wandb = sys.modules.get('wandb')
    if wandb is not None:
        wandb.finish()
        wandb.teardown()


# The command line


@pytest.fixture
def in_tmp_path(same_working_directory, tmp_path):
    """Work in the test's own folder: `runs/` and `predictions.csv` go there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        yield tmp_path


@pytest.fixture
def cli_error(capfd):
    """Return a function that runs a command line which must be refused, and returns the three lines of its error."""
    from lightning_app.cli import main

    def run(args):
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(args)
        text = capfd.readouterr().err
        assert stop.value.code == 2
        assert text.count('error: ') == 1, text
        lines = text[text.index('error: '):].splitlines()
        assert len(lines) == 3, text
        assert lines[1].startswith('  why: ')
        assert lines[2].startswith('  do:  ')
        assert all(len(line) > len('  why: ') for line in lines)
        assert 'usage:' not in text
        assert 'Traceback' not in text
        return lines[0].removeprefix('error: '), lines[1].removeprefix('  why: '), lines[2].removeprefix('  do:  ')

    return run


@pytest.fixture
def program(tmp_path):
    """Return a function that runs `python -m lightning_app ARGS`, or another command line of Python, in `tmp_path`.

    `prefix` is a command that runs the command line that follows it.
    """
    def run(*args, module='lightning_app', prefix=(), check=True, timeout=240, stdout=subprocess.PIPE, **variables):
        command = [*prefix, sys.executable, *(['-m', module] if module else []), *map(str, args)]
        # the package under test, whether it is installed or not
        paths = filter(None, [str(REPOSITORY), os.environ.get('PYTHONPATH')])
        environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join(paths), **variables}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=timeout,
            check=False)
        assert not check or done.returncode == 0, f'{done.stdout}\n{done.stderr}'
        return done

    return run


# Images and configs


def _photo(path, label, index):
    """Write a small image whose mean colour tells the class."""
    generator = np.random.default_rng(1000 * label + index)
    colour = np.array([60 + 60 * label, 200 - 50 * label, 40 + 30 * (label % 3)])
    pixels = np.clip(colour + generator.normal(0, 40, (36, 40, 3)), 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def photos(tmp_path):
    """A root with 24 training and 7 validation images of three classes."""
    root = tmp_path / 'photos'
    for split, count in (('train', 24), ('val', 7)):
        for index in range(count):
            label = index % 3
            _photo(root / split / ('ant', 'bee', 'cat')[label] / f'{split}_{index:02}.png', label, index)
    return root


@pytest.fixture
def on_photos(photos):
    """Arguments of a training step or two on `photos` with a small network of timm's."""
    return [
        '--model.name=test_resnet', '--model.optim.lr=0.01', '--data=ImageNetDataModule', f'--data.root={photos}',
        '--data.batch_size=8', '--data.image_size=32', '--data.num_workers=0', '--trainer.accelerator=cpu',
        '--trainer.devices=1', '--trainer.max_epochs=1', '--trainer.enable_progress_bar=false',
        '--trainer.log_every_n_steps=1']


@pytest.fixture
def write_yaml(tmp_path):
    """Return a function that writes a config and returns its path."""
    def write(name, content):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return str(path)

    return write


# Trainings from Python


@pytest.fixture
def photo_data(photos):
    """Return a function that makes the data module of `photos`: three steps of eight images an epoch."""
    from lightning_app.data import Augment, ImageNetDataModule

    def make(**arguments):
        plain = Augment(crop='rkrc', hflip=0.0)
        return ImageNetDataModule(**{
            'root': str(photos), 'batch_size': 8, 'image_size': 32, 'num_workers': 0, 'augment': plain, **arguments})

    return make


@pytest.fixture
def make_trainer(tmp_path):
    """Return a function that makes a Trainer on the CPU that prints and keeps nothing unless told to."""
    from lightning.pytorch import Trainer

    def make(**arguments):
        return Trainer(**{
            'accelerator': 'cpu', 'devices': 1, 'max_epochs': 1, 'logger': False, 'enable_progress_bar': False,
            'enable_model_summary': False, 'enable_checkpointing': False, 'log_every_n_steps': 1,
            'default_root_dir': str(tmp_path / 'python'), **arguments})

    return make


@pytest.fixture
def optimizer_steps():
    """Return a list that gets, at each step of any optimiser, the options of its parameter groups."""
    steps = []

    def keep(optimizer, args, kwargs):
        steps.append([{key: value for key, value in group.items() if key != 'params'}
                      for group in optimizer.param_groups])

    handle = register_optimizer_step_pre_hook(keep)
    yield steps
    handle.remove()


@pytest.fixture
def read_csv():
    """Return a function that reads a column of a run's metrics.csv as pairs (step, value)."""
    def read(folder, name):
        with open(Path(folder) / 'metrics.csv', newline='') as file:
            return [(int(row['step']), float(row[name])) for row in csv.DictReader(file) if row.get(name)]

    return read


@pytest.fixture
def fake_cifar(tmp_path, monkeypatch):
    """A folder with torchvision's files of CIFAR-10 and CIFAR-100, with 20 images in place of 10,000 in each."""
    monkeypatch.setattr('torchvision.datasets.cifar.check_integrity', lambda path, md5=None: Path(path).is_file())

    def write(file, **content):
        path = tmp_path / 'cifar' / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(content))

    pixels = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)
    for name in [*(f'data_batch_{number}' for number in range(1, 6)), 'test_batch']:
        write(f'cifar-10-batches-py/{name}', data=pixels, labels=[index % 10 for index in range(20)])
    write('cifar-10-batches-py/batches.meta', label_names=[f'kind{index}' for index in range(10)])
    for name in ('train', 'test'):
        write(f'cifar-100-python/{name}', data=pixels, fine_labels=[5 * index for index in range(20)])
    write('cifar-100-python/meta', fine_label_names=[f'kind{index}' for index in range(100)])
    return tmp_path / 'cifar'


# W&B's records


@pytest.fixture
def read_wandb():
    """Return a function that reads the records of the only offline run below a folder."""
    import wandb

    def read(folder):
        wandb.finish()
        file, = Path(folder).rglob('run-*.wandb')
        for _ in range(100):  # W&B's service may write the file only after `finish` has come back
            records = _records(file.read_bytes())
            if records and records[-1].WhichOneof('record_type') == 'exit':
                break
            time.sleep(0.1)
        return records

    return read


@pytest.fixture
def read_history(read_wandb):
    """Return a function that reads the rows that the only offline run below a folder has logged."""
    def read(folder):
        rows = []
        for record in read_wandb(folder):
            if record.WhichOneof('record_type') == 'history':
                rows.append({})
                _put(rows[-1], record.history.item)
        return rows

    return read


@pytest.fixture
def config_of():
    """Return a function that reads the configuration of a run from its records."""
    def read(records):
        config = {}
        for record in records:
            for part in (record.config, record.run.config):
                _put(config, part.update)
        return config

    return read


def _put(values, items):
    """Put the items of a record into a dict, by their nested keys."""
    for item in items:
        *outer, name = item.nested_key or [item.key]
        place = values
        for key in outer:
            place = place.setdefault(key, {})
        place[name] = json.loads(item.value_json)


def _records(data):
    """Return the W&B records in `data`: 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    assert data[:4] == b':W&B'
    records, part, place = [], b'', 7
    while place + 7 <= len(data):
        room = 32768 - place % 32768
        if room < 7:
            place += room
            continue
        length, kind = int.from_bytes(data[place + 4:place + 6], 'little'), data[place + 6]
        if place + 7 + length > len(data):  # it is being written
            break
        part += data[place + 7:place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            records.append(record)
            part = b''
    return records
