"""A stand-in for the W&B server on this machine, which keeps what the real client sends it.

It answers what wandb 0.31 asks for, in the form that its queries have. In a test:

    with WandbServer() as server:
        subprocess.run(command, env={**os.environ, **server.environment})
    run, = server.runs

From the command line: `python tests/lightning_app/wandb_server.py --dump state.json -- COMMAND...`
"""
from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import yaml  # the client sends sweeps as YAML

ENTITY = 'tester'
KEY = 'local' + '0' * 35  # of the length that the client asks for
TIME = '2000-01-01T00:00:00Z'  # when all was made, for what asks
HISTORY, EVENTS, SUMMARY, OUTPUT = 'wandb-history.jsonl', 'wandb-events.jsonl', 'wandb-summary.json', 'output.log'
MANIFEST = 'wandb_manifest.json'

Json = dict[str, Any]


class Refused(Exception):
    """A request that is answered by an error.

    Args:
        text: What the client is told.
        status: HTTP status; the client gives up at most 4xx, and tries again after 5xx.
    """

    def __init__(self, text: str, status: int = 400) -> None:
        super().__init__(text)
        self.status = status


@dataclasses.dataclass
class Run:
    """A run: `lines` are those of its files by number, `files` what was uploaded, `resumed` how often it went on."""

    id: str
    project: str
    entity: str
    name: str = ''
    group: str | None = None
    job_type: str | None = None
    tags: list[str] = dataclasses.field(default_factory=list)
    notes: str | None = None
    sweep: str | None = None
    raw_config: Json = dataclasses.field(default_factory=dict)
    lines: dict[str, dict[int, str]] = dataclasses.field(default_factory=dict)
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    alerts: list[Json] = dataclasses.field(default_factory=list)
    exit_code: int | None = None
    resumed: int = 0

    @property
    def config(self) -> Json:
        """The configuration, without W&B's own entry."""
        return {key: entry['value'] for key, entry in self.raw_config.items() if key != '_wandb'}

    @property
    def history(self) -> list[Json]:
        """The logged rows in order."""
        return self.rows(HISTORY)

    @property
    def events(self) -> list[Json]:
        """The system statistics in order."""
        return self.rows(EVENTS)

    @property
    def summary(self) -> Json:
        """The last summary."""
        return next(reversed(self.rows(SUMMARY)), {})

    @property
    def output(self) -> str:
        """What the program printed."""
        return '\n'.join(self.text(OUTPUT))

    def text(self, file: str) -> list[str]:
        """Return the lines of a file that is streamed."""
        return [line for _, line in sorted(self.lines.get(file, {}).items())]

    def rows(self, file: str) -> list[Json]:
        """Return the lines of a file of JSON."""
        return [json.loads(line) for line in self.text(file)]


@dataclasses.dataclass
class Artifact:
    """An artifact: `files` are those that came, `manifest` says which there must be."""

    id: str
    name: str
    type: str
    run: str
    aliases: list[str]
    metadata: Json
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    manifest_file: dict[str, bytes] = dataclasses.field(default_factory=dict)
    committed: bool = False

    @property
    def manifest(self) -> Json:
        """What there must be by the name of the file: its `size` and `digest`."""
        return json.loads(self.manifest_file[MANIFEST])['contents']


@dataclasses.dataclass
class Sweep:
    """A grid: `waiting` are the combinations that no agent has taken yet, `taken` those by id of the run."""

    id: str
    project: str
    config: Json
    waiting: list[Json]
    taken: dict[str, Json] = dataclasses.field(default_factory=dict)
    state: str = 'RUNNING'


class WandbServer(ThreadingHTTPServer):
    """The server; it answers within its context.

    Attributes:
        runs: What was logged, in order of the first words of each.
        artifacts: Artifacts, in order.
        sweeps: Sweeps, grids only.
        views: Workspaces and reports that were saved, as they were sent.
        projects: Names of the projects.
        unknown: What was asked for and could not be answered.
        stop_runs: Tell all runs to stop, as "Stop run" does on the page of a run.
        broken: Answer everything by an error 500.
        delay: Seconds before each answer.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(('127.0.0.1', 0), Handler)
        self.runs: list[Run] = []
        self.artifacts: list[Artifact] = []
        self.sweeps: list[Sweep] = []
        self.views: list[Json] = []
        self.projects: set[str] = set()
        self.unknown: list[str] = []
        self.stop_runs = self.broken = False
        self.delay = 0.0
        self.uploads: dict[str, tuple[dict[str, bytes], str]] = {}  # place in a URL -> where the bytes go
        self.connections: set[socket.socket] = set()
        self.lock = threading.RLock()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f'http://127.0.0.1:{self.server_port}'

    @property
    def environment(self) -> dict[str, str]:
        """Variables that let the client log in here."""
        return {'WANDB_BASE_URL': self.url, 'WANDB_API_KEY': KEY}

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Die: nothing listens any more, and connections that are open end."""
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):  # ended already
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing: a client that ends, or `close`, breaks a connection."""

    def find(self, id: str) -> Run | None:
        """Return the run of an id, if there is one."""
        return next((run for run in self.runs if run.id == id), None)

    def run(self, id: str) -> Run:
        """Return the run of an id."""
        return next(run for run in self.runs if run.id == id)

    def artifact(self, id: str) -> Artifact:
        """Return the artifact of an id."""
        return next(artifact for artifact in self.artifacts if artifact.id == id)

    def upload_url(self, files: dict[str, bytes], name: str) -> str:
        """Return a URL to which the bytes of a file can be put."""
        place = f'/storage/{len(self.uploads)}'
        self.uploads[place] = files, name
        return self.url + place

    def dump(self) -> Json:
        """Return all as plain data, a file as its length and its SHA-256."""
        def plain(value: Any) -> Any:
            if isinstance(value, bytes):
                return {'bytes': len(value), 'sha256': hashlib.sha256(value).hexdigest()}
            return sorted(value)

        runs = [{**dataclasses.asdict(run), 'config': run.config, 'history': run.history, 'events': run.events,
                 'summary': run.summary, 'output': run.output} for run in self.runs]
        for run in runs:
            del run['lines'], run['raw_config']
        state = {'runs': runs, 'unknown': self.unknown, 'views': self.views, 'projects': self.projects,
                 'artifacts': [*map(dataclasses.asdict, self.artifacts)],
                 'sweeps': [*map(dataclasses.asdict, self.sweeps)]}
        return json.loads(json.dumps(state, default=plain))


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: WandbServer
    protocol_version = 'HTTP/1.1'

    def setup(self) -> None:
        """Remember the connection."""
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        """Forget the connection."""
        self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def do_POST(self) -> None:
        """Take a GraphQL request, or lines of files that are streamed."""
        self.respond(self.graphql if self.path == '/graphql' else self.file_stream)

    def do_PUT(self) -> None:
        """Take an upload."""
        self.respond(self.store)

    def do_GET(self) -> None:
        """There is nothing to get."""
        self.respond(self.nothing)

    def respond(self, answer: Callable[[bytes], Json]) -> None:
        """Send an answer, or an error that the client does not try again."""
        length = int(self.headers.get('Content-Length', 0))
        body = self.rfile.read(length)
        if len(body) < length:  # the connection ended, as where the server is closed meanwhile
            return
        time.sleep(self.server.delay)
        try:
            if self.server.broken:
                raise Refused('internal server error', 500)
            with self.server.lock:
                status, content = 200, answer(body)
        except Refused as error:
            status, content = error.status, {'errors': [{'message': str(error)}]}
        except Exception as error:  # a fault of the stand-in: the test must see it
            self.server.unknown.append(f'{self.path} {body[:300]!r}: {error!r}')
            status, content = 400, {'errors': [{'message': repr(error)}]}
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def check_key(self) -> None:
        """Raise `Refused` for another key than ours."""
        kind, _, value = self.headers.get('Authorization', '').partition(' ')
        given = base64.b64decode(value).decode() if kind == 'Basic' else f'api:{value}'
        if given != f'api:{KEY}':
            raise Refused('user is not logged in', 401)

    def graphql(self, body: bytes) -> Json:
        """Answer an operation by the function of its name."""
        self.check_key()
        request = json.loads(body)
        match = re.search(r'(?:query|mutation)\s+(\w+)', request['query'])
        name = request.get('operationName') or (match[1] if match else request['query'])
        if name not in ANSWERS:
            self.server.unknown.append(name)
            raise Refused(f'unknown operation {name}')
        variables = request.get('variables') or {}
        return {'data': ANSWERS[name](self.server, variables.get('input', variables))}

    def file_stream(self, body: bytes) -> Json:
        """Take lines, each at its number, and the end of the run."""
        self.check_key()
        match = re.fullmatch(r'/files/[^/]+/[^/]+/([^/]+)/file_stream', self.path)
        if match is None:
            return self.nothing(body)
        run, sent = self.server.run(unquote(match[1])), json.loads(body)
        for name, chunk in (sent.get('files') or {}).items():
            run.lines.setdefault(name, {}).update(enumerate(chunk['content'], chunk['offset']))
        if sent.get('complete'):
            run.exit_code = sent['exitcode']
        return {'stopped': self.server.stop_runs}

    def store(self, body: bytes) -> Json:
        """Keep an upload."""
        files, name = self.server.uploads[self.path]
        files[name] = body
        return {}

    def nothing(self, body: bytes) -> Json:
        """Refuse."""
        self.server.unknown.append(f'{self.command} {self.path}')
        raise Refused('not found', 404)


# How operations are answered


def user() -> Json:
    return {'id': 'user', 'name': ENTITY, 'entity': ENTITY, 'username': ENTITY, 'email': None, 'admin': False,
            'flags': '{}', 'deletedAt': None, 'apiKeys': None, 'teams': {'edges': [{'node': {'name': ENTITY}}]}}


def project(server: WandbServer, name: str, entity: str | None = None) -> Json:
    """Return a project of ours, made where there is none; nobody else has one."""
    if entity not in (None, ENTITY):
        raise Refused(f'entity {entity} not found', 404)
    server.projects.add(name)
    return {'id': f'project-{name}', 'internalId': f'project-{name}', 'name': name, 'entityName': ENTITY,
            'entity': {'id': f'entity-{ENTITY}', 'name': ENTITY}, 'createdAt': TIME, 'isBenchmark': False,
            'user': user(), '__typename': 'Project'}


def get_projects(server: WandbServer, given: Json) -> Json:
    page = {'endCursor': None, 'hasNextPage': False, '__typename': 'PageInfo'}
    return {'models': {'pageInfo': page, 'edges': [
        {'node': project(server, name), 'cursor': ''} for name in sorted(server.projects)]}}


def create_project(server: WandbServer, given: Json) -> Json:
    made = {**project(server, given['name'], given.get('entityName')),
            'description': None, 'access': 'PRIVATE', 'views': '{}'}
    return {'result': {'project': made, 'model': made, 'inserted': True}}


def upsert_bucket(server: WandbServer, given: Json) -> Json:
    """Make a run, or change one: the client leaves out what stays."""
    of = project(server, given['project'], given.get('entity'))
    run = server.find(given['name'])
    if inserted := run is None:
        run = Run(given['name'], of['name'], ENTITY, f'run-{len(server.runs)}')
        server.runs.append(run)
    for key, field in RUN_FIELDS.items():
        if given.get(key) is not None:
            setattr(run, field, given[key])
    if given.get('config'):
        run.raw_config = json.loads(given['config'])
    return {'upsertBucket': {'inserted': inserted, 'bucket': {
        'id': f'bucket-{run.id}', 'name': run.id, 'displayName': run.name, 'description': '',
        'config': json.dumps(run.raw_config), 'sweepName': run.sweep, 'project': of,
        'historyLineCount': len(run.history)}}}


RUN_FIELDS = {'displayName': 'name', 'groupName': 'group', 'jobType': 'job_type', 'tags': 'tags', 'notes': 'notes',
              'sweep': 'sweep'}


def resume_status(server: WandbServer, given: Json) -> Json:
    """Return what there is of a run, for the client to go on from."""
    run = server.find(given['name'])
    if run is None or run.project != given['project']:
        return {'model': None}
    run.resumed, run.exit_code = run.resumed + 1, None
    history, events = run.text(HISTORY), run.text(EVENTS)
    return {'model': {**project(server, run.project), 'bucket': {
        'id': f'bucket-{run.id}', 'name': run.id, 'displayName': run.name, 'tags': run.tags, 'notes': run.notes,
        'summaryMetrics': json.dumps(run.summary), 'config': json.dumps(run.raw_config),
        'historyLineCount': len(history), 'historyTail': json.dumps(history[-1:]),
        'eventsLineCount': len(events), 'eventsTail': json.dumps(events[-1:]),
        'logLineCount': len(run.text(OUTPUT)),
        'wandbConfig': json.dumps({'t': run.raw_config.get('_wandb', {}).get('value', {}).get('t', {})})}}}


def create_run_files(server: WandbServer, given: Json) -> Json:
    run = server.run(given['run'])
    return {'createRunFiles': {'runID': f'bucket-{run.id}', 'uploadHeaders': [], 'files': [
        {'name': name, 'uploadUrl': server.upload_url(run.files, name)} for name in given['files']]}}


def alert(server: WandbServer, given: Json) -> Json:
    server.run(given['runName']).alerts.append({key: given[key] for key in ('title', 'text', 'severity')})
    return {'notifyScriptableRunAlert': {'success': True}}


def create_artifact(server: WandbServer, given: Json) -> Json:
    artifact = Artifact(
        f'artifact-{len(server.artifacts)}', given['artifactCollectionName'], given['artifactTypeName'],
        given['runName'], sorted(entry['alias'] for entry in given.get('aliases') or []),
        json.loads(given.get('metadata') or '{}'))
    server.artifacts.append(artifact)
    return {'createArtifact': {'artifact': {
        'id': artifact.id, 'state': 'PENDING', 'artifactSequence': {'latestArtifact': None}}}}


def manifest_place(server: WandbServer, id: str) -> Json:
    url = server.upload_url(server.artifact(id).manifest_file, MANIFEST)
    return {'artifactManifest': {'id': id, 'file': {'id': id, 'uploadUrl': url, 'uploadHeaders': []}}}


def create_artifact_files(server: WandbServer, given: Json) -> Json:
    return {'createArtifactFiles': {'files': {'edges': [{'node': {
        'storagePath': f'{file["artifactID"]}/{file["name"]}', 'uploadHeaders': [], 'uploadMultipartUrls': None,
        'uploadUrl': server.upload_url(server.artifact(file['artifactID']).files, file['name']),
        'artifact': {'id': file['artifactID']}}} for file in given['artifactFiles']]}}}


def commit_artifact(server: WandbServer, given: Json) -> Json:
    server.artifact(given['artifactID']).committed = True
    return {'commitArtifact': {'artifact': {'id': given['artifactID'], 'digest': ''}}}


def upsert_sweep(server: WandbServer, given: Json) -> Json:
    """Make a grid, or change the state of one."""
    sweep = next((sweep for sweep in server.sweeps if sweep.id == given.get('id')), None)
    if sweep is None:
        config = yaml.safe_load(given['config'])
        if config['method'] != 'grid':
            raise Refused(f'method {config["method"]}: here are grids only')
        choices = {key: entry.get('values', [entry.get('value')]) for key, entry in config['parameters'].items()}
        grid = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
        sweep = Sweep(f'sweep{len(server.sweeps)}', given['projectName'], config, grid)
        server.sweeps.append(sweep)
    sweep.state = given.get('state') or sweep.state
    return {'upsertSweep': {'sweep': {'name': sweep.id, 'project': project(server, sweep.project)},
                            'configValidationWarnings': []}}


def sweep_with_runs(server: WandbServer, given: Json) -> Json:
    return {'project': {'sweep': next(({
        'id': sweep.id, 'name': sweep.id, 'method': 'grid', 'state': sweep.state, 'config': json.dumps(sweep.config),
        'runs': {'edges': []}} for sweep in server.sweeps if sweep.id == given['sweep']), None)}}


def heartbeat(server: WandbServer, given: Json) -> Json:
    """Give an agent that runs nothing the next combination, or let it go if there is none; its id is its sweep's."""
    sweep = next(sweep for sweep in server.sweeps if sweep.id == given['id'])
    commands: list[Json] = []
    if not json.loads(given['runState']) and sweep.waiting:
        id = f'{sweep.id}run{len(sweep.taken)}'
        sweep.taken[id] = sweep.waiting.pop(0)
        commands = [{'type': 'run', 'run_id': id, 'program': sweep.config['program'],
                     'args': {key: {'value': value} for key, value in sweep.taken[id].items()}}]
    elif not json.loads(given['runState']):
        sweep.state, commands = 'FINISHED', [{'type': 'exit'}]
    return {'agentHeartbeat': {'agent': {'id': sweep.id}, 'commands': json.dumps(commands)}}


def upsert_view(server: WandbServer, given: Json) -> Json:
    """Keep a workspace or a report; it takes the place of an older state of itself."""
    id = given.get('id') or f'view-{len(server.views)}'
    of = project(server, given['projectName'], given['entityName'])
    server.views = [view for view in server.views if view['id'] != id]
    server.views.append({**given, 'id': id, 'spec': json.loads(given['spec'])})
    return {'upsertView': {'inserted': not given.get('id'), 'view': {
        **given, 'id': id, 'project': of, 'createdAt': TIME, 'updatedAt': TIME}}}


Answer = Callable[[WandbServer, Json], Json]

ANSWERS: dict[str, Answer] = {
    'Viewer': lambda server, given: {'viewer': user()},
    'ServerFeaturesQuery': lambda server, given: {'serverInfo': {'features': []}},
    'OrganizationCoreWeaveOrganizationID': lambda server, given: {'entity': {'organization': None}},
    'GetProjects': get_projects,
    'CreateProject': create_project,
    'ProjectInternalId': lambda server, given: {
        'project': project(server, given['projectName'], given['entityName'])},
    'UpsertBucket': upsert_bucket,
    'RunResumeStatus': resume_status,
    'CreateRunFiles': create_run_files,
    'NotifyScriptableRunAlert': alert,
    'ArtifactType': lambda server, given: {'project': {'artifact': None}},  # there is none of another type
    'CreateArtifact': create_artifact,
    'CreateArtifactManifest': lambda server, given: {
        'createArtifactManifest': manifest_place(server, given['artifactID'])},
    'UpdateArtifactManifest': lambda server, given: {
        'updateArtifactManifest': manifest_place(server, given['artifactManifestID'])},
    'CreateArtifactFiles': create_artifact_files,
    'CommitArtifact': commit_artifact,
    'UpsertSweep': upsert_sweep,
    'SweepWithRuns': sweep_with_runs,
    'CreateAgent': lambda server, given: {'createAgent': {'agent': {'id': given['sweep']}}},
    'Heartbeat': heartbeat,
    'UpsertView2': upsert_view,
    'upsertView': upsert_view,
}


def main() -> int:
    """Run a command with a server, write what it got, and return the command's status."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument('--dump', type=Path, required=True, help='JSON file to write')
    parser.add_argument('command', nargs='+')
    options = parser.parse_args()
    with WandbServer() as server:
        status = subprocess.run(options.command, env={**os.environ, **server.environment}, check=False).returncode
    options.dump.write_text(json.dumps(server.dump(), indent=1))
    return status


if __name__ == '__main__':
    raise SystemExit(main())
