"""`python -m se_timm.survey [FAMILY...]`: what `add_se` does to the networks of timm, family by family.

    python -m se_timm.survey --markdown docs/add_se.md

Of each family (a module of timm) the smallest networks are built with random weights. Of each it is shown, on a random
image, that with `identity_start` the outputs are the same to the bit, that fc2 has gradients in the first step and fc1
from the second on, that closed gates close the residual branches and nothing else, that `remove_se` gives back the
network with its keys, and, where the gates stand in places made for attention, that TorchScript takes it. Where one of
these fails, the reason is told.
"""
from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import nn

import se_timm

from .errors import ArgumentParser, InputError, check_file, exit_status, message, unknown
from .insertion import add_se, added, remove_se

__all__ = ['Finding', 'closed', 'examine', 'families', 'main', 'markdown', 'smallest', 'survey']

REDUCTION = 4  # of 16, the narrowest networks have fewer channels
LARGEST = 40_000_000  # parameters
# what of a block is outside of its residual branches: shortcuts, and what stands between the branches
OUTSIDE = re.compile(
    r'(downsample|shortcut\w*|skip|skipbn|identity|norm\d?|proj|projection|patch_embed|res_scale\d|cpe\d|local_conv|'
    r'attn_downsample|token_mixer)\.')


class Finding(NamedTuple):
    """What was found of a network.

    Attributes:
        family: timm's module.
        name: For `timm.create_model`.
        gates: How many were added.
        where: How they stand, such as `'before'`, or several.
        share: Their parameters, as a share of the whole.
        scripts: TorchScript takes the network; None where that is not promised, or not so without gates either.
        problem: What does not hold, or an empty text.
    """

    family: str
    name: str
    gates: int = 0
    where: str = ''
    share: float = 0.
    scripts: bool | None = None
    problem: str = ''


def families() -> list[str]:
    """Return the families of timm."""
    return [name for name in timm.list_modules() if not name.startswith('se_') and timm.list_models(module=name)]


def smallest(family: str) -> list[str]:
    """Return the networks of a family up to `LARGEST` parameters, the smallest first."""
    sizes = {}
    for name in timm.list_models(module=family):
        try:
            net = timm.create_model(name, device='meta')
        except Exception:  # some cannot be made there
            net = timm.create_model(name)
        sizes[name] = sum(parameter.numel() for parameter in net.parameters())
    return sorted((name for name in sizes if sizes[name] <= LARGEST), key=lambda name: sizes[name])


def survey(family: str, count: int) -> Iterator[Finding]:
    """Examine the smallest networks of a family until `count` of them work, or four times as many were examined."""
    works = 0
    for name in smallest(family)[:4 * count]:
        finding = examine(family, name)
        works += not finding.problem
        yield finding
        if works == count:
            return


def examine(family: str, name: str) -> Finding:
    """Build a network with random weights, put SE into it and out of it, and tell what was found."""
    torch.manual_seed(0)
    net = timm.create_model(name).eval()
    image = torch.randn(1, *net.default_cfg['input_size'])
    enliven(net, image)
    keys = list(net.state_dict())
    with torch.no_grad():
        expected = net(image)
    try:
        report = add_se(net, reduction=REDUCTION, identity_start=True)
    except ValueError as error:
        return Finding(family, name, problem=reason_of(error))
    finding = Finding(
        family, name, len(report.places), ' '.join(sorted({place.where for place in report.places.values()})),
        report.share)
    with torch.no_grad():
        if not torch.equal(net(image), expected):
            return finding._replace(problem='its outputs change')
    takes = scripts(net, image) if {place.where for place in report.places.values()} == {'slot'} else None
    finding = finding._replace(problem=gradients(net, image) or closed(net, image) or removal(net, keys))
    if takes is False and not scripts(net, image):  # nor without
        takes = None
    return finding._replace(scripts=takes)


def enliven(net: nn.Module, image: torch.Tensor) -> None:
    """Make random weights such as can be trained.

    Weights that begin with zero, behind which nothing would be seen, become random, and the statistics of the batch
    norms are taken, without which random networks explode.
    """
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.
    with torch.no_grad():
        net.train()(torch.cat([image, image.flip(-1)]))  # two, as a batch norm may see a single pixel
    net.eval()


def reason_of(error: ValueError) -> str:
    """Return why, of a message of three lines."""
    return str(error).split('\n  why: ')[-1].split('\n  do:')[0]


def scripts(net: nn.Module, image: torch.Tensor) -> bool:
    """Return whether TorchScript takes the network and computes the same."""
    try:
        with torch.no_grad():
            torch.testing.assert_close(torch.jit.script(net)(image), net(image), rtol=1e-3, atol=1e-4)
    except Exception:  # whatever it dislikes
        return False
    return True


def gradients(net: nn.Module, image: torch.Tensor) -> str:
    """Train the gates for a step; return in words what is wrong with their gradients, or an empty text."""
    gates: list[Any] = list(added(net).values())
    for gate in gates:
        nn.init.ones_(gate.fc1.bias)  # of few hidden units, on one image, all might be off
    optimizer = torch.optim.SGD([weight for gate in gates for weight in gate.parameters()], lr=1e-6)
    for step in (1, 2):
        optimizer.zero_grad()
        outputs = net(image)
        (outputs / outputs.detach().abs().max()).square().sum().backward()  # random networks may explode
        if not all(has_gradient(gate.fc2.weight) for gate in gates):
            return f'a gate has no gradient in step {step}'
        moved = [has_gradient(gate.fc1.weight) for gate in gates]
        if any(moved) if step == 1 else not all(moved):
            return f'fc1 has {"a" if step == 1 else "no"} gradient in step {step}'
        for weight in filter(has_gradient, (weight for gate in gates for weight in gate.parameters())):
            weight.grad /= weight.grad.abs().max()  # or vanish
        optimizer.step()
    return ''


def closed(net: nn.Module, image: torch.Tensor) -> str:
    """Close all gates, and return in words what of a block still has a gradient, or an empty text.

    Nothing of a branch has one then: the gates are at the end of the branches, and none is in a shortcut.
    """
    net.zero_grad()
    gates: list[Any] = list(added(net).values())
    for gate in gates:
        nn.init.zeros_(gate.fc2.weight)
        nn.init.constant_(gate.fc2.bias, -1e4)  # 2 sigmoid(-1e4) is 0
    outputs = net(image)
    (outputs * torch.randn_like(outputs)).sum().backward()
    for block in dict.fromkeys(place.rpartition('.')[0] for place in added(net)):
        for key, weight in net.get_submodule(block).named_parameters():
            if has_gradient(weight) and not OUTSIDE.match(key) and not re.search(r'\bse\.', key):
                return f'{block}.{key} is not in a gated branch'
    return ''


def has_gradient(weight: Any) -> bool:
    """Return whether a weight has a gradient that is not zero."""
    return weight.grad is not None and bool(weight.grad.any())


def removal(net: nn.Module, keys: list[str]) -> str:
    """Take SE out; return in words what is left of it, or an empty text."""
    remove_se(net)
    if list(net.state_dict()) != keys:
        return 'its keys change'
    return 'a gate is left' if added(net) else ''


# The table


def line(finding: Finding) -> str:
    """Return what was found of a network, in a line."""
    if finding.problem:
        return f'{finding.family}: {finding.name}: {finding.problem}'
    scripting = '' if finding.scripts is None else f', TorchScript {"takes" if finding.scripts else "does not take"} it'
    return (f'{finding.family}: {finding.name}: {finding.gates} gates ({finding.where}), '
            f'{100 * finding.share:.1f} % of the parameters{scripting}')


def markdown(findings: Iterable[Finding]) -> str:
    """Return a page: the families that work, and those that do not."""
    by_family: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        by_family[finding.family].append(finding)
    good, bad = [], []
    for family, found in by_family.items():
        works = [finding for finding in found if not finding.problem]
        if works:
            good.append(_row(family, works))
        for problem in dict.fromkeys(finding.problem for finding in found if finding.problem):
            names = ' '.join(finding.name for finding in found if finding.problem == problem)
            bad.append(f'| {family} | {names} | {problem} |')
    networks = sum(not finding.problem for found in by_family.values() for finding in found)
    return PAGE.format(
        timm=timm.__version__, torch=torch.__version__.split('+')[0], networks=networks, families=len(good),
        reduction=REDUCTION, good='\n'.join(good), bad='\n'.join(bad))


def _row(family: str, works: Sequence[Finding]) -> str:
    where = ' '.join(sorted({place for finding in works for place in finding.where.split()}))
    shares = [100 * finding.share for finding in works]
    scripts = {None: '', True: 'yes', False: 'no'}[
        None if works[0].scripts is None else all(finding.scripts for finding in works)]
    span = f'{min(shares):.1f}' if len(shares) == 1 else f'{min(shares):.1f} to {max(shares):.1f}'
    return f'| {family} | {" ".join(finding.name for finding in works)} | {where} | {span} | {scripts} |'


PAGE = """# SE in the networks of timm

Made by `python -m se_timm.survey --markdown docs/add_se.md` (timm {timm}, torch {torch}): {networks} networks of
{families} families, of each family the smallest. Each was built with random weights and given SE by
`add_se(net, reduction={reduction}, identity_start=True)`. The outputs stayed the same to the bit; fc2 had gradients
in the first step and fc1 from the second on; with closed gates nothing of a residual branch had a gradient, so that the
gates stand at their ends; `remove_se` gave back the network with its keys.

- gates: in the block's own place for attention (slot), before its stochastic depth, after its last layer, or at the end
  of its last layers.
- share: parameters of the gates, per cent of the whole.
- TorchScript: whether it takes the network; promised where all gates are in slots, if it takes that without gates.

| family | networks | gates | share | TorchScript |
|---|---|---|---|---|
{good}

Not so:

| family | networks | reason |
|---|---|---|
{bad}

In these, and in your own, name the modules whose outputs shall be gated: `add_se(net, at='features.*')`.
"""


def parse(arguments: Sequence[str]) -> Any:
    """Return the options.

    Raises:
        InputError: For whatever cannot be used.
    """
    parser = ArgumentParser('python -m se_timm.survey', 'What add_se does to the networks of timm.')
    parser.add_argument('families', nargs='*', metavar='FAMILY', help='modules of timm, such as resnet; default: all')
    parser.add_argument('--count', type=int, default=3, help='networks of each family')
    parser.add_argument('--markdown', type=Path, metavar='FILE', help='write the tables there')
    options = parser.parse_args(arguments)
    for family in options.families:
        if family not in families():
            raise InputError(unknown('family', family, families()))
    if options.count < 1:
        raise InputError(message(f'--count {options.count}', 'it is a number of networks', 'say 1 or more'))
    check_file('--markdown', options.markdown, 'add_se.md')
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0, or 2 for options that cannot be used."""
    return exit_status(lambda: run(parse(sys.argv[1:] if arguments is None else list(arguments))))


def run(options: Any) -> int:
    """Examine the families, print what is found, and write the page; return 0."""
    print(f'se_timm {se_timm.__version__}, timm {timm.__version__}, torch {torch.__version__}')
    findings = []
    for family in options.families or families():
        for finding in survey(family, options.count):
            findings.append(finding)
            print(line(finding), flush=True)
    if options.markdown is not None:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(markdown(findings))
    return 0


if __name__ == '__main__':
    sys.exit(main())
