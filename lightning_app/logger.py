"""Loggers that stand in the configs: W&B, which never stops a training, and CSV, both in the run's folder."""
from __future__ import annotations

import atexit
import configparser
import contextlib
import csv
import itertools
import math
import netrc
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.loggers import WandbLogger as LightningWandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from se_timm.errors import InputError, check_writable, message

from .checkpoints import describe
from .files import replaced
from .folders import rank
from .metrics import DATA_WAIT, SPEED

__all__ = ['CsvLogger', 'WandbLogger', 'logged_in', 'own_project', 'place_loggers']

CONNECT_SECONDS = 20  # how long a training waits for W&B before it goes on offline
FINISH_SECONDS = 30  # how long a run waits at its end for W&B to take the rest, which may never come back
UPLOAD_SECONDS = 600  # the same with checkpoints, of which each may be a gigabyte
DEFAULT_FOLDER = 'runs'
SOURCES = ('lightning_app', 'se_timm')


class MetricsFile(ExperimentWriter):
    """`metrics.csv`, replaced as a whole at each write, so that no crash leaves half a line.

    Rows that are there stay, but for those of the steps that a resumed training does again.

    Args:
        log_dir: Folder of the file.
        goes_on: False if rows that are there are of another run.
        is_shared: Whether they may be of another run: those that do not stay are kept in `metrics-1.csv` and so on.
    """

    def __init__(self, log_dir: str, goes_on: bool = True, is_shared: bool = False) -> None:
        super().__init__(log_dir)
        self.first, self.goes_on, self.is_shared = True, goes_on, is_shared
        if Path(self.metrics_file_path).is_file():
            with open(self.metrics_file_path, newline='') as file:
                self.metrics = [row_of(row) for row in csv.DictReader(file) if (row.get('step') or '').isdigit()]

    def _check_log_dir_exists(self) -> None:
        """Leave what is there; Lightning deletes it."""

    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        """Keep a row."""
        if self.first and step is not None:
            staying = [row for row in self.metrics if self.goes_on and int(row['step']) < step]
            if not self.is_shared or len(staying) == len(self.metrics) or self.set_aside():
                self.metrics = staying
        self.first = False
        super().log_metrics(metrics_dict, step)

    def set_aside(self) -> bool:
        """Keep the file as `metrics-1.csv` and so on; return whether that was possible."""
        path = Path(self.metrics_file_path)
        numbered = (path.with_name(f'{path.stem}-{number}.csv') for number in itertools.count(1))
        kept = next(each for each in numbered if not each.exists())
        try:
            with replaced(kept) as unfinished:
                shutil.copy(path, unfinished)
        except OSError as error:
            rank_zero_warn(f'{path}: rows of another run stay in it, as they cannot be copied ({error})')
            return False
        rank_zero_info(f'{path} has rows of another run, or of steps that are done again: they are kept in {kept.name}')
        return True

    def save(self) -> None:
        """Write all rows and the hyper-parameters; if that fails, the next time they are all there again.

        A training that is refused before it has any leaves what an earlier one has written.
        """
        if self.hparams:
            save_hparams_to_yaml(os.path.join(self.log_dir, self.NAME_HPARAMS_FILE), self.hparams)
        if not self.metrics:
            return
        with replaced(Path(self.metrics_file_path)) as unfinished, open(unfinished, 'w', newline='') as file:
            writer = csv.DictWriter(file, sorted(set().union(*self.metrics)))
            writer.writeheader()
            writer.writerows(self.metrics)


def row_of(row: dict[str, str]) -> dict[str, Any]:
    """Return the values that stand in a row of the file, as they stand there."""
    return {key: value for key, value in row.items() if key and value}  # None is of more values than the header has


def without_gaps(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return metrics without a speed of steps of which none counts: other values that are NaN tell of a divergence."""
    return {name: value for name, value in metrics.items() if name not in (SPEED, DATA_WAIT) or not math.isnan(value)}


class CsvLogger(CSVLogger):
    """Metrics in `save_dir/metrics.csv`; a resumed run goes on in the file, and what another one replaces is kept.

    Args:
        save_dir: Folder of the run; the command line fills it in where it is not given.
        flush_logs_every_n_steps: Steps between two writes.
    """

    def __init__(self, save_dir: str | None = None, flush_logs_every_n_steps: int = 100) -> None:
        super().__init__(save_dir or DEFAULT_FOLDER, name='', version='',
                         flush_logs_every_n_steps=flush_logs_every_n_steps)
        self.placed = save_dir is not None
        self.goes_on = True

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Keep a row."""
        super().log_metrics(without_gaps(metrics), step)

    def place(self, folder: Path) -> None:
        """Write to `folder`."""
        self._save_dir = self._root_dir = str(folder)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer of the file, made at the first use."""
        if self._experiment is None:
            self._experiment = MetricsFile(self.log_dir, self.goes_on, is_shared=self.placed)
        return self._experiment

    @rank_zero_only
    def save(self) -> None:
        """Write the file; where that is not possible, such as on a full disk, say so and go on."""
        try:
            super().save()
        except OSError as error:
            rank_zero_warn(f'metrics.csv: not written ({error}); it is tried again later')


class WandbLogger(LightningWandbLogger):
    """Metrics, configuration and system statistics in Weights & Biases.

    Without an account the run is kept offline, and what to do with it is said. If the server cannot be reached, the
    training goes on offline too. Explicit arguments instead of wandb.init's: Lightning's would pass `resume=None`,
    which silently starts a resumed run anew.

    Args:
        project: Project on the server; `$WANDB_PROJECT`, or `se-timm`, where not given.
        name: Name of the run; made up by W&B where not given.
        entity: User or team; your default where not given.
        save_dir: Folder of the run; the command line fills it in where it is not given.
        mode: `online`, `offline` or `disabled`; where not given, what WANDB_MODE says, else online if you are logged
            in, else offline.
        id: Id of the run, to continue one; where not given, a training that is resumed goes on with its own.
        group: Runs that belong together, such as a study.
        job_type: Kind of the run; where not given, `$WANDB_JOB_TYPE`, or `train`, and for evaluations `validate` or
            `test`.
        tags: Tags.
        notes: A longer description.
        log_model: Keep the best checkpoints as artifacts of type `model`, named after network and run: `true` at the
            end, `all` at each save. Their metadata are the metrics, the epoch and the size of the network; the newest
            has the alias `latest`, the best `best`.
        save_code: Keep the source of this program and its networks as artifacts of type `code`.

    Raises:
        InputError: If W&B takes no project, run or tag of such a name.
    """

    def __init__(
            self,
            project: str | None = None,
            name: str | None = None,
            entity: str | None = None,
            save_dir: str | None = None,
            mode: Literal['online', 'offline', 'disabled'] | None = None,
            id: str | None = None,
            group: str | None = None,
            job_type: str | None = None,
            tags: list[str] | None = None,
            notes: str | None = None,
            log_model: bool | Literal['all'] = False,
            save_code: bool = True,
    ) -> None:
        import wandb  # takes half a second, and not every run uses it

        project = project or own_project()
        job_type = job_type or os.environ.get('WANDB_JOB_TYPE')
        check_names(project, id, tags or [])
        super().__init__(
            # absolute: W&B's service keeps the working directory that it was started in
            save_dir=os.path.abspath(save_dir or DEFAULT_FOLDER),
            project=project, name=name, id=id, log_model=log_model, add_file_policy='immutable', entity=entity,
            group=group, job_type=job_type or 'train', tags=tags, notes=notes, mode=mode, resume='allow',
            settings=wandb.Settings(
                init_timeout=CONNECT_SECONDS, finish_timeout=UPLOAD_SECONDS if log_model else FINISH_SECONDS,
                finish_timeout_raises=True, silent=True))
        self._wandb_init.pop('anonymous', None)  # wandb warns of it
        self.lost = False
        self.exit_code: int | None = None
        self.placed = save_dir is not None
        self.given_job_type = job_type
        self.save_code = save_code

    @property
    def identity(self) -> dict[str, Any]:
        """The run's id, and the project and entity that were given; plain types, for a checkpoint."""
        return {'id': self.version, 'project': self._wandb_init['project'], 'entity': self._wandb_init.get('entity')}

    def place(self, folder: Path) -> None:
        """Write to `folder`."""
        self._save_dir = self._wandb_init['dir'] = os.path.abspath(folder)

    def be(self, job_type: str) -> None:
        """Be a run of this kind, if no other was given."""
        self._wandb_init['job_type'] = self.given_job_type or job_type

    def resume(self, runs: Sequence[Mapping[str, Any]]) -> None:
        """Go on with the one of `runs` in the same project, or the run in the own folder, if no id was given."""
        if self._wandb_init.get('id') is not None:
            return
        own = {name: value for name, value in self.identity.items() if name != 'id'}
        of_project = [run['id'] for run in runs if {name: run[name] for name in own} == own]
        found = next(iter(of_project), None)
        if not runs and not self.placed:  # a folder that was given may hold those of other trainings
            found = run_id(Path(str(self._save_dir)))
        if found is None and runs:
            rank_zero_info(f'W&B: the checkpoint is of run {runs[0]["id"]} of project {runs[0]["project"]}; '
                           f'this training is a new run of project {own["project"]}')
        self._id = self._wandb_init['id'] = found

    @property
    def experiment(self) -> Any:
        """The wandb run, started at the first use; a dummy on all ranks but the first."""
        if self._experiment is None and rank() == 0:
            self._start()
        return super().experiment

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Log, for as long as W&B's service lives."""
        self._unless_lost(super().log_metrics, without_gaps(metrics), step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Keep what is to be kept at the end, if W&B's service lives; the run itself ends with the process."""
        if status == 'failed':  # how Lightning ends a training, `exit`, W&B's own hooks do not see
            self.exit_code = 1
        self._unless_lost(super().finalize, status)

    def _scan_and_log_checkpoints(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Keep the checkpoints of the callback that are not kept yet; Lightning calls it as `log_model` says."""
        best = checkpoint_callback.best_model_path
        for path in checkpoint_callback.best_k_models or ([best] if best else []):
            if Path(path).is_file() and self._logged_model_time.get(path) != (time := os.path.getmtime(path)):
                self._logged_model_time[path] = time
                self._unless_lost(self._keep, path, ['latest', *(['best'] if path == best else [])])

    def _keep(self, path: str, aliases: list[str]) -> None:
        import wandb

        described = describe(path)
        run = self.experiment
        network = re.sub(r'[^\w.-]', '-', described['network'])  # what names of artifacts may consist of
        artifact = wandb.Artifact(f'{network}-{run.id}', type='model', metadata={
            **described, **dict(run.config.get('network') or {})})
        artifact.add_file(path, policy=self.add_file_policy)
        run.log_artifact(artifact, aliases=aliases)

    def _unless_lost(self, function: Any, *args: Any) -> None:
        if self.lost:
            return
        try:
            function(*args)
        except Exception as error:  # of many kinds: whatever becomes of W&B, the training goes on
            self.lost = True
            rank_zero_warn(f'W&B: its service is gone ({error or type(error).__name__}); the training goes on without')

    def _start(self) -> None:
        import wandb

        with contextlib.suppress(OSError):  # W&B takes another folder then, and says so
            os.makedirs(str(self._save_dir), exist_ok=True)
        if self._wandb_init.get('mode') is None and 'WANDB_MODE' not in os.environ and not logged_in():
            self._wandb_init['mode'] = 'offline'
        try:
            run = super().experiment
        except (wandb.errors.CommError, wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            rank_zero_warn(f'W&B cannot be reached, the run is kept offline: {error}')
            self._wandb_init['mode'] = 'offline'
            run = super().experiment
        if self.save_code:
            keep_source(run)
        if getattr(run, 'offline', False):
            folder = Path(run.dir).parent
            rank_zero_info(f'W&B: offline. Look at the run: wandb leet run {folder}\n'
                           f'     Upload it: wandb login, then wandb sync {folder}')
        # goes before wandb's own, which could not say what to do
        atexit.register(lambda: finish(run, self.exit_code))


def own_project() -> str:
    """Return the project where none is given."""
    return os.environ.get('WANDB_PROJECT') or 'se-timm'


def check_names(project: str, id: str | None, tags: Sequence[str]) -> None:
    """Raise `InputError` for names that W&B refuses wherever it runs, offline too."""
    import wandb

    try:
        wandb.Settings(project=project, run_id=id)
    except wandb.errors.UsageError as error:
        raise InputError(message(
            f'trainer.logger: project {project}' + (f', id {id}' if id else ''), str(error),
            'take letters, digits, - and _')) from error
    for tag in tags:
        try:
            wandb.Settings(run_tags=(tag,))
        except ValueError as error:  # pydantic's, of several lines
            raise InputError(message(
                f'trainer.logger.tags: {tag}', 'W&B takes tags of 1 to 64 characters', 'leave it out, or shorten it')
            ) from error


def finish(run: Any, exit_code: int | None = None) -> None:
    """End a run; if W&B does not take all of it in time, say how to upload it later."""
    try:
        run.finish(exit_code)
    except Exception as error:  # of many kinds: the training has ended well, and its status says so
        rank_zero_warn(f'W&B: the run did not arrive whole ({error or type(error).__name__}), and is kept here\n'
                       f'     Upload it later: wandb sync --include-online {Path(run.dir).parent}')


def keep_source(run: Any) -> None:
    """Keep the source of this program's packages as artifacts."""
    try:
        for package in SOURCES:
            run.log_code(str(import_module(package).__path__[0]), name=f'{package}-source')
    except Exception as error:  # of many kinds, as of a full disk: the training goes on
        rank_zero_warn(f'W&B: the source is not kept ({error})')


def run_id(folder: Path) -> str | None:
    """Return the id of the W&B run in the run's folder, None if there is none."""
    files = [file.name for file in Path(folder, 'wandb', 'latest-run').glob('run-*.wandb')]
    return files[0].removeprefix('run-').removesuffix('.wandb') if files else None


def logged_in() -> bool:
    """Return whether there is an API key, without asking wandb, which would talk to its server or warn."""
    try:
        # by its path, as wandb does: without, Python takes none that others may read
        logins = netrc.netrc(file_of_logins())
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        logins = None
    server = urlsplit(server_url())
    known = set(logins.hosts) if logins else set()
    return bool(os.environ.get('WANDB_API_KEY')) or (
        bool({server.hostname, server.netloc} & known) if server.hostname else any(
            'wandb' in name or 'coreweave' in name for name in known))


def file_of_logins() -> str:
    """Return the file from which wandb takes an API key, which need not be there."""
    usual = [os.path.expanduser(name) for name in ('~/.netrc', '~/_netrc')]
    given = os.environ.get('NETRC')
    return os.path.expanduser(given) if given else next(filter(os.path.exists, usual), usual[0])


def server_url() -> str:
    """Return the URL of a server of one's own, which `wandb login --host` writes down; an empty one for W&B's."""
    if url := os.environ.get('WANDB_BASE_URL'):
        return url
    settings = configparser.ConfigParser(interpolation=None)
    with contextlib.suppress(configparser.Error, OSError, UnicodeDecodeError):
        settings.read(Path(os.environ.get('WANDB_CONFIG_DIR') or '~/.config/wandb').expanduser() / 'settings')
    return settings.get('default', 'base_url', fallback='')


def place_loggers(
        loggers: list[Logger], folder: Path, job_type: str = 'train',
        resumed: Sequence[Mapping[str, Any]] = (), goes_on: bool = False) -> None:
    """Let the loggers of this module that were given no folder write to `folder`.

    Args:
        loggers: The loggers.
        folder: Of the run.
        job_type: Kind of the W&B run, where none was given.
        resumed: The W&B runs of the training that goes on, as its checkpoint has them.
        goes_on: Whether the run goes on in its folder.

    Raises:
        InputError: For several W&B runs, and a folder for metrics to which nothing can be written.
    """
    if (several := sum(isinstance(logger, LightningWandbLogger) for logger in loggers)) > 1:
        raise InputError(message(
            f'trainer.logger: WandbLogger, {several} times', 'W&B has one run at a time in a process',
            'leave one out; where the config has it already, change it there'))
    for logger in loggers:
        if isinstance(logger, (CsvLogger, WandbLogger)) and not logger.placed:
            logger.place(folder)
        if isinstance(logger, CsvLogger):
            check_writable('trainer.logger.save_dir:', Path(logger.root_dir))
            logger.goes_on = goes_on
        if isinstance(logger, WandbLogger):
            logger.be(job_type)
            if job_type == 'train':
                logger.resume(resumed)
