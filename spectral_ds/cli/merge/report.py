"""What `spectral-ds merge` has done, as people read it."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from spectral_ds.cli.merge.sweep import FILTERED, Setting
from spectral_ds.cli.terminal import make_console, make_table

# Names that are listed; the others are counted.
MOST_LISTED = 6


def show(report: Mapping[str, Any], rest: float, folder: Path, hint: str) -> None:
    """Print what has become of all tensors, and what the user should know if anything."""
    print_ = partial(make_console().print, soft_wrap=True)
    print_(
        f"{report['filtered']} matrices filtered; {report['scaled']} tensors without inputs x "
        f"{rest:g}; {report['unchanged']} unchanged in training; {len(report['taken'])} taken "
        "as they are from the tuned model"
    )
    for key, words in (
        ("taken", "only in the tuned model, or no numbers to scale"),
        ("unseen", f"no input to keep has entered these matrices, so x {rest:g}"),
        ("unlearned", "no input to learn has entered these matrices, so T = I"),
        ("blind", f"what enters these matrices cannot be watched, so x {rest:g}"),
        ("unknown", f"the model does not know these tensors, so x {rest:g}"),
        ("copied", "behind the model, copied as they are from the tuned model"),
    ):
        if report.get(key):  # one of an earlier version has not all
            print_(f"{words}: {_listed(report[key])}")
    for model, names in report["left_out"].items():
        print_(f"not in the result, only in {model}: {_listed(names)}")
    print_(f"written: {folder}")
    if hint:
        print_(hint)


def _listed(names: Sequence[str]) -> str:
    more = len(names) - MOST_LISTED
    return ", ".join(names[:MOST_LISTED]) + (f" and {more} more" if more > 0 else "")


def show_sweep(
    settings: Sequence[Setting], best: Setting | None, general: str, written: Sequence[Path]
) -> None:
    """Print all settings and the one that is recommended."""
    console = make_console()
    has_accuracy = any(each.accuracy is not None for each in settings)
    columns = ["setting", "task loss", *(["accuracy"] if has_accuracy else []),
               "general", "forgetting", "gain"]  # fmt: skip
    table = make_table("Settings on the held-out half of both files", columns)
    for each in settings:
        cells = [each.name, f"{each.task:.4f}"]
        if has_accuracy:
            cells.append(f"{each.accuracy:.3f}")
        gain = "" if each.gain is None else f"{each.gain:+.4f}"
        table.add_row(*cells, f"{each.general:.4f}", f"{each.forgetting:+.4f}", gain)
    console.print(table)
    print_ = partial(console.print, soft_wrap=True)
    print_(
        f"general: {general}. forgetting: by how much that is worse than of the base model.\n"
        "gain: what a setting forgets less than interpolation (W₀ + α ΔW, its points joined by "
        "lines) at an equal loss\non the task; below any loss that interpolation reaches, less "
        "than interpolation at its lowest."
    )
    if best is None:
        print_("Recommendation: none; each filtered setting forgets more than interpolation does.")
    else:
        print_(
            f"Recommendation: {best.name}: the lowest loss on the task among filtered settings "
            f"with gain >= 0 ({sum(s.method == FILTERED for s in settings)} tried)."
        )
    print_("written: " + ", ".join(str(path) for path in written))
