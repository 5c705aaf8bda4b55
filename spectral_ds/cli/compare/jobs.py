"""Jobs: which runs a comparison asks for, and what of them is not known yet.

Seeds are the outermost loop, so that whole comparisons of fewer seeds come first.
"""

from spectral_ds.cli.compare.job import Job
from spectral_ds.cli.compare.results import Row, Table
from spectral_ds.cli.compare.run import Run
from spectral_ds.cli.compare.settings import Comparison, chosen, settings_of


def jobs_of(comparison: Comparison, known: Table) -> list[Job]:
    """All jobs with something left to do, in order."""
    methods = chosen(comparison)
    followers = {
        name: {
            other: settings_of(method) for other, method in methods.items() if method.after == name
        }
        for name in methods
    }
    found = []
    for run in runs_of(comparison):
        alphas = _unknown(comparison, run.key, known)
        after = {}
        for name, settings in followers[run.method].items():
            left = []
            for setting in settings:
                key = run.key | {"method": name, "setting": setting.name}
                unknown = _unknown(comparison, key, known)
                if unknown:
                    left.append((setting, unknown))
            if left:
                after[name] = left
        if alphas or after:
            found.append(Job(run, alphas, after, bool(followers[run.method])))
    return found


def _unknown(comparison: Comparison, key: Row, known: Table) -> tuple[float, ...]:
    """Shares of the change that have no row yet; 1 is the whole of it."""
    method = comparison.methods[key["method"]]
    shares = method.interpolated
    if shares is None:
        shares = () if method.after else comparison.interpolated
    return tuple(alpha for alpha in (1.0, *shares) if key | {"alpha": alpha} not in known)


def runs_of(comparison: Comparison) -> list[Run]:
    """All trainings."""
    return [
        Run(task, name, setting, rate, seed)
        for seed in comparison.seeds
        for task in comparison.tasks
        for rate in comparison.learning_rates
        for name, method in chosen(comparison).items()
        if not method.after
        for setting in settings_of(method)
    ]
