"""Where the monitor writes: event files, a folder or a writer of the user's, CSV; and when."""

import csv
import gc
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from cells import CELLS, Training
from changing import INPUTS, SECTION, Blocks, loss_of, sgd
from ranks import RankError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import spectral_ds
from spectral_ds.monitor import Board, Dashboard

BANDS = 4


def written_metrics(section, steps, **config):
    """Metrics of a run that DeepSpeed's own monitor writes too."""
    training = Training("zero2", section, torch.optim.AdamW, tiny.ADAM_RATES, **config)
    training.train(steps)
    metrics = training.plugin.metrics()
    training.close()
    return metrics


def attach_with_a_folder(folder):
    Training(CELLS["ddp"], {"monitor": {"folder": folder}})


def test_a_folder_that_cannot_be_made_is_an_error_on_all_ranks(ranks, tmp_path):
    (tmp_path / "file").touch()
    for outcome in ranks(2).outcomes(attach_with_a_folder, str(tmp_path / "file" / "folder")):
        assert isinstance(outcome, RankError), outcome
        assert outcome.kind == "SpectralConfigError", outcome.traceback
        assert "spectral_ds.monitor.folder" in outcome.message
        assert str(tmp_path / "file" / "folder") in outcome.message


def to_boards(names, folder):
    """Two steps of each engine with a folder of the plugin's own, and two with a user's writer.

    Returns:
        By engine and kind, on rank 0: what the event file holds before anything is closed; whether
        the writer is open once the plugin is detached; the last metrics.
    """
    found = {}
    for name in names:
        for kind in ("folder", "writer"):
            place = Path(folder, name, kind)
            section = {
                "monitor": {"interval": 1, "bands": BANDS},
                "filter": {"apply_to": "update" if kind == "writer" else "gradient"},
            }
            writer = None
            if kind == "folder":
                section["monitor"]["folder"] = str(place)
                training = Training(CELLS[name], section)
                writer = training.plugin.monitor._board._own_writer
            else:
                training = Training(CELLS[name], None)
                writer = SummaryWriter(str(place)) if dist.get_rank() == 0 else None
                training.plugin = spectral_ds.attach(
                    training.wrapped, training.optimizer, section, writer=writer
                )
            for index in range(2):
                training.step(index)
            held = contents(place) if dist.get_rank() == 0 else None
            metrics = training.plugin.metrics()
            training.close()
            is_open = writer is not None and writer.file_writer is not None
            if is_open:
                writer.close()
            found[name, kind] = held, is_open, metrics
    return found


def contents(place):
    """Scalars by tag, as (step, value); tags of images; number of layouts."""
    [file] = place.glob("events.out.tfevents.*")
    events = EventAccumulator(str(file), size_guidance={"tensors": 0})
    events.Reload()
    tags = events.Tags()
    scalars = {tag: [(s.step, s.value) for s in events.Scalars(tag)] for tag in tags["scalars"]}
    return scalars, set(tags["images"]), len(events.Tensors("custom_scalars__config__"))


@pytest.mark.parametrize(("names", "world_size"), [(("fsdp2", "ddp"), 2), (("plain",), 1)])
def test_torch_engines_write_to_a_folder_or_a_writer(ranks, names, world_size, tmp_path):
    results = ranks(world_size).run(to_boards, names, str(tmp_path))
    for (name, kind), (held, is_open, metrics) in results[0].items():
        scalars, images, layouts = held
        what, other = ("update", "gradient") if kind == "writer" else ("gradient", "update")
        for tag in ("nodes", "filter_seconds", f"{what}_norm/after", "gradient_norm/all"):
            steps, values = zip(*scalars[f"spectral_ds/{tag}"], strict=True)
            assert steps == (0, 1), (name, kind, tag)
            assert values[-1] == pytest.approx(metrics[tag], rel=1e-6)
        assert f"spectral_ds/{other}_norm/after" not in scalars
        assert len(scalars["spectral_ds/update_to_weight/all"]) == 1
        assert "spectral_ds/energy" in images
        rough = {tag for tag in images if "roughness" in tag}
        assert rough == {f"spectral_ds/roughness_of_the_filtered_{what}_by_block_and_role"}
        assert layouts == 2  # again, when ratios were known
        assert is_open == (kind == "writer")
    for others in results[1:]:
        for case, (held, is_open, metrics) in others.items():
            assert (held, is_open) == (None, False)
            assert metrics == results[0][case][2]


def with_csv_alone(folder):
    board = {"enabled": True, "output_path": folder, "job_name": "run"}
    section = {"monitor": {"interval": 2, "figures_interval": 2, "bands": BANDS}}
    return written_metrics(section, 3, csv_monitor=board)


def test_scalars_join_deepspeeds_own_where_it_writes_csv_alone(ranks, tmp_path):
    metrics = ranks(2).run(with_csv_alone, str(tmp_path))[0]
    folder = tmp_path / "run"
    for name in ("nodes", "gradient_norm/after", "band_energy_before/0"):
        file = folder / f"spectral_ds_{name.replace('/', '_')}.csv"
        _, *rows = csv.reader(file.read_text().splitlines())
        assert [int(step) for step, _ in rows] == [tiny.GLOBAL_BATCH, 3 * tiny.GLOBAL_BATCH]
        assert float(rows[-1][1]) == pytest.approx(metrics[name])
    assert (folder / "Train_Samples_lr.csv").is_file()
    assert not list(tmp_path.rglob("events.out.tfevents.*"))


@pytest.mark.parametrize(
    ("monitored", "interval", "drawn"),
    [
        (30, 100, [0, 120, 210, 300, 420, 510, 600]),
        (10, 100, [0, 100, 200, 300, 400, 500, 600]),
        (150, 100, [0, 150, 300, 450, 600]),
        (250, 100, [0, 250, 500]),
    ],
)
def test_figures_are_drawn_at_the_first_monitored_step_from_each_interval_on(
    monitored, interval, drawn
):
    board = Board(lambda metrics: None, None, lambda: 0, is_open=True)
    # The same from whatever step a run goes on.
    dashboard = Dashboard(board, "heat", [], [], interval)
    assert [s for s in range(0, 601, monitored) if dashboard.is_due(s, monitored)] == drawn
    closed = Dashboard(Board(lambda metrics: None, None, lambda: 0, False), "", [], [], interval)
    assert not closed.is_due(0, monitored)


# One process, several optimizers


def test_the_second_plugin_of_a_module_writes_to_a_folder_of_its_own(tmp_path):
    section = {**SECTION, "monitor": {"interval": 1, "folder": str(tmp_path)}}
    model = Blocks()
    optimizers = [sgd(layer.parameters()) for layer in model.layers[:2]]
    plugins = [spectral_ds.attach(model, each, section) for each in optimizers]
    loss_of(model, INPUTS).backward()
    for optimizer, plugin in zip(optimizers, plugins, strict=True):
        optimizer.step()
        plugin.detach()
    names = sorted(p.name for p in tmp_path.iterdir())
    assert len(names) == 2
    assert [p.name for p in (tmp_path / "optimizer_2").iterdir()] != []


def test_models_of_one_process_write_to_folders_of_their_own_also_when_one_is_gone(tmp_path):
    section = {**SECTION, "monitor": {"interval": 1, "folder": str(tmp_path)}}

    def plugins_after_a_step(models, optimizers):
        plugins = [
            spectral_ds.attach(*each, section) for each in zip(models, optimizers, strict=True)
        ]
        for model, optimizer in zip(models, optimizers, strict=True):
            loss_of(model, INPUTS).backward()
            optimizer.step()
        return plugins

    def written():
        files = tmp_path.rglob("events.out.tfevents.*")
        return sorted(file.parent.relative_to(tmp_path).name for file in files)

    models = [Blocks(), Blocks()]
    optimizers = [sgd(model.parameters()) for model in models]
    plugins = plugins_after_a_step(models, optimizers)
    assert written() == ["", "optimizer_2"]
    plugins[0].detach()
    fold = Blocks()
    plugins_after_a_step([fold], [sgd(fold.parameters())])
    assert written() == ["", "optimizer_2", "optimizer_3"]
    again = plugins_after_a_step(models[:1], optimizers[:1])
    assert written() == ["", "", "optimizer_2", "optimizer_3"]
    del models, optimizers, plugins, again, fold
    gc.collect()
    fold = Blocks()
    plugins_after_a_step([fold], [sgd(fold.parameters())])
    assert written() == ["", "", "optimizer_2", "optimizer_3", "optimizer_4"]
