"""Plugs a recipe, checks a copy, and takes the lines out again."""

from typing import List, Sequence

import click

from icefall_kd.errors import KDError
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
    for reason in report.reasons:
        click.echo(f"  {reason}")
    _show_edited(report)
    raise SystemExit(_STATUS[report.state])


def _undo(folder: str, recipe_dir: str) -> None:
    names = undo(folder, recipe_dir or None)
    result = f"are out of {', '.join(names)}" if names else "were out already"
    click.echo(f"{folder}: the lines of icefall_kd {result}")
    _show_edited(examine(folder))


def plug(
    recipe_dir: str,
    new_dir: str,
    as_diff: bool,
    check: bool,
    undo_it: bool,
    leave_out: Sequence[str],
) -> None:
    """Run ``icefall-kd plug``.

    Args:
      recipe_dir: The recipe; the copy if ``new_dir`` is "" with ``check`` or
        ``undo_it``.
      new_dir: The copy, or "".
      as_diff: Print the patch and write nothing.
      check: Print whether the copy is plugged, stale or foreign, and exit.
      undo_it: Take the lines out of the copy.
      leave_out: The training scripts that are not to be plugged.
    """
    actions = {"--diff": as_diff, "--check": check, "--undo": undo_it}
    chosen = [name for name, is_on in actions.items() if is_on]
    if len(chosen) > 1:
        raise KDError(f"{' and '.join(chosen)} can't be asked for at once: give one")
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
            f"the new folder is missing: give it behind {recipe_dir}, such as "
            f"{default_dir}"
        )
    plan = plug_recipe(recipe_dir, new_dir, leave_out)
    if plan is None:
        click.echo(f"{new_dir} is plugged already: nothing to do")
    else:
        _show(plan, new_dir)
