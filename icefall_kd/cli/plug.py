"""Plugs a recipe, checks a copy, and takes the lines out again."""

from typing import List, Sequence

import click

from icefall_kd.cli.options import Place, Text, command
from icefall_kd.errors import KDError, with_flags
from icefall_kd.plug.copies import Plan, diff, make_plan
from icefall_kd.plug.plug import FOREIGN, PLUGGED, STALE, Report, examine
from icefall_kd.plug.plug import plug as plug_recipe
from icefall_kd.plug.plug import undo

# 1 and 2 are refusals and wrong usage.
_STATUS = {PLUGGED: 0, STALE: 3, FOREIGN: 4}


def _show(plan: Plan, new_dir: str) -> None:
    counts: List[str] = []
    for name, plugged in plan.plugged.items():
        inserted = len(plugged.splitlines()) - len(plan.before[name].splitlines())
        counts.append(f"{name} (+{inserted})")
    click.echo(f"{new_dir} is a working copy of {plan.recipe}")
    click.echo(f"  plugged: {', '.join(counts)}")
    if plan.copied:
        click.echo(f"  copied, as they import those: {', '.join(plan.copied)}")
    if plan.linked:
        click.echo(f"  linked: the other {len(plan.linked)}")
    for note in plan.notes:
        click.echo(f"  note: {note}")
    click.echo("Its scripts keep the recipe's defaults, that of --exp-dir too.")


def _show_edited(report: Report) -> None:
    for name in report.edited:
        click.echo(f"  {name} was changed by hand since it was made")


def _check(folder: str, recipe_dir: str) -> None:
    report = examine(folder, recipe_dir or None)
    click.echo(f"{folder}: {report.state}")
    flags = click.get_current_context().command.flags
    for reason in report.reasons:
        click.echo(f"  {with_flags(reason, flags)}")
    _show_edited(report)
    raise SystemExit(_STATUS[report.state])


def _undo(folder: str, recipe_dir: str) -> None:
    names = undo(folder, recipe_dir or None)
    result = f"are out of {', '.join(names)}" if names else "were out already"
    click.echo(f"{folder}: the lines of icefall_kd {result}")
    _show_edited(examine(folder))


EXAMPLE = """
icefall-kd plug ./zipformer ./zipformer_kd
icefall-kd plug --check ./zipformer_kd
icefall-kd plug --undo ./zipformer_kd
"""


@command(example=EXAMPLE)
@click.argument("recipe_dir", type=Place())
@click.argument("new_dir", type=Place(optional=True), default="")
@click.option(
    "--diff", "as_diff", is_flag=True, help="Print the patch, and write nothing."
)
@click.option(
    "--check",
    is_flag=True,
    help="Print whether a folder is plugged (exit status 0), stale (3) or foreign (4), "
    "and why.",
)
@click.option(
    "--undo", "undo_it", is_flag=True, help="Take the lines out of a working copy."
)
@click.option(
    "--leave-out",
    type=Text(),
    multiple=True,
    metavar="FILE",
    help="A training script that stays as it is. The option may be given more than "
    "once.",
)
def plug(
    recipe_dir: str,
    new_dir: str,
    as_diff: bool,
    check: bool,
    undo_it: bool,
    leave_out: Sequence[str],
) -> None:
    """Make NEW_DIR a working copy of a recipe, with distillation plugged in.

    RECIPE_DIR is the folder of a train.py or finetune.py, such as ./zipformer. It is
    not written to, nor is what it links to. NEW_DIR, such as ./zipformer_kd, has the
    same scripts. Train and decode there as ever; its train.py --help lists the options
    of distillation.

    Plugged by other lines than this version's, or of an original that has changed
    since, a folder is stale: --undo it, and plug it again. What was changed in it by
    hand is kept.
    """
    actions = {"--diff": as_diff, "--check": check, "--undo": undo_it}
    chosen = [name for name, is_on in actions.items() if is_on]
    if len(chosen) > 1:
        raise KDError(f"{' and '.join(chosen)} can't be given at once: give one")
    if leave_out and (check or undo_it):
        raise KDError(f"--leave-out has no meaning with {chosen[0]}: leave it out")
    folder, original = (new_dir, recipe_dir) if new_dir else (recipe_dir, "")
    if check:
        _check(folder, original)
    if undo_it:
        _undo(folder, original)
        return
    default_dir = f"{recipe_dir.rstrip('/')}_kd"
    if as_diff:
        patch = diff(make_plan(recipe_dir, leave_out), new_dir or default_dir)
        click.echo(patch, nl=False)
        return
    if not new_dir:
        raise KDError(
            f"the new folder is missing: give it after {recipe_dir}, such as "
            f"{default_dir}"
        )
    plan = plug_recipe(recipe_dir, new_dir, leave_out)
    if plan is None:
        click.echo(f"{new_dir} is plugged already: nothing to do")
    else:
        _show(plan, new_dir)
