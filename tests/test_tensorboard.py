"""TensorBoard: what a run wrote, and what a browser shows of it.

The README's pictures, of a run on a real model, are made by

    SPECTRAL_DS_RUNS=runs/quickstart SPECTRAL_DS_PICTURES=.github/figures \\
        pytest tests/test_tensorboard.py -k browser
"""

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
import torch
from cells import Training
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

STEPS, BANDS, FIGURES_INTERVAL = 5, 4, 2
SECTION = {
    "graph": {"edges": [{"family": "similarity", "neighbours": 3}, {"family": "depth"}]},
    "filter": {"response": "wiener", "bands": BANDS},
    "regularizer": {"strength": 0.1},
    "statistics": {"interval": 1},
    "monitor": {"interval": 1, "figures_interval": FIGURES_INTERVAL, "bands": BANDS},
}
BLOCKS = ["000", "001", "002"]
TRAINED = [name for name, p in tiny.TinyLlama().named_parameters() if p.requires_grad]
ROLES = {re.sub(r"\.\d+\.", ".*.", name, count=1) for name in TRAINED}
FIGURES = {
    "density_of_states",
    "energy",
    "energy_over_time",
    "signal_to_noise",
    "gains",
    "gradient_norm_by_block_and_role",
    "roughness_of_the_filtered_gradient_by_block_and_role",
    "perturbation_by_block",
}
HISTOGRAMS = {"node_degree", "edge_weight"}
CHARTS = {
    "norm before and after the filter": {f"gradient_norm/{x}" for x in ("before", "after", "all")},
    "energy by frequency, before": {f"band_energy_before/{b}" for b in range(BANDS)},
    "energy by frequency, after": {f"band_energy_after/{b}" for b in range(BANDS)},
    "signal to noise by frequency": {
        f"signal_to_noise/{b}" for b in (*range(BANDS), "total", "kept_over_total")
    },
    "gradient noise scale": {"gradient_noise_scale"},
    **{
        f"{what.replace('_', ' ')} by {part}": {f"{what}_by_{part}/{x}" for x in of}
        for what in ("update_to_weight", "gradient_norm", "parameter_norm")
        for part, of in (("block", BLOCKS), ("role", ROLES))
    },
    "regularizer": {"regularizer", "perturbation", "joint_loss"},
}


def train(folder):
    board = {"enabled": True, "output_path": folder, "job_name": "tiny"}
    training = Training("zero2", SECTION, torch.optim.AdamW, tiny.ADAM_RATES, tensorboard=board)
    training.train(STEPS)
    training.close()


@pytest.fixture(scope="module")
def runs(ranks, tmp_path_factory):
    """The folder of one run on two ranks."""
    folder = tmp_path_factory.mktemp("tensorboard") / "runs"
    ranks(2).run(train, str(folder))
    return folder


@pytest.fixture(scope="module")
def events(runs):
    assert len(list(runs.rglob("events.out.tfevents.*"))) == 1  # DeepSpeed's own scalars in it
    return events_of(runs)


def events_of(runs):
    """What is in the file that the plugin has written to; of others, if any, nothing."""
    for file in runs.rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file.parent), size_guidance={"images": 0, "tensors": 0})
        events.Reload()
        if ours(events, "scalars"):
            return events
    raise AssertionError(f"nothing of the plugin in {runs}")


def layout(events):
    """The category of the plugin's charts."""
    [event] = events.Tensors("custom_scalars__config__")[-1:]
    [category] = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0]).category
    return category


def ours(events, kind):
    """The plugin's tags of a kind, less its prefix."""
    tags = [tag.partition("/") for tag in events.Tags()[kind]]
    return {name for prefix, _, name in tags if prefix == "spectral_ds"}


def scalar(events, name):
    return [event.value for event in events.Scalars(f"spectral_ds/{name}")]


def steps(found):
    return [event.step // tiny.GLOBAL_BATCH - 1 for event in found]


def promised_scalars():
    """Number of values by tag."""
    found = {"parameter_norm/all": STEPS, "update_to_weight/all": STEPS - 1}
    for title, tags in CHARTS.items():
        late = title.startswith(
            ("signal", "update", "gradient noise")
        )  # known from the second step on
        found |= dict.fromkeys(tags, STEPS - late)
    others = ("filter_seconds", "boundary_bytes", "strength", "skipped_steps", "nodes", "edges")
    return found | dict.fromkeys(others, STEPS)


def test_every_promised_scalar_is_written_and_finite(events):
    promised = promised_scalars()
    assert ours(events, "scalars") == promised.keys()
    # A ratio of unbiased estimates: known where both are positive, from the second step on.
    most = promised.pop("gradient_noise_scale")
    scales = scalar(events, "gradient_noise_scale")
    assert 0 < len(scales) <= most
    assert all(0 < scale < math.inf for scale in scales)
    for name, count in promised.items():
        values = scalar(events, name)
        assert len(values) == count, name
        assert all(map(math.isfinite, values)), name
    assert "Train/Samples/lr" in events.Tags()["scalars"]
    assert steps(events.Scalars("spectral_ds/nodes")) == list(range(STEPS))


def test_every_promised_figure_is_a_picture_at_every_interval(events):
    assert ours(events, "images") == FIGURES
    drawn = list(range(0, STEPS, FIGURES_INTERVAL))
    for name in FIGURES:
        images = events.Images(f"spectral_ds/{name}")
        # Signal and noise are known from the second sample on.
        assert steps(images) == (drawn[1:] if name == "signal_to_noise" else drawn), name
        for image in images:
            with Image.open(io.BytesIO(image.encoded_image_string)) as picture:
                assert (picture.format, picture.width) == ("PNG", 800)
                assert picture.height == image.height
            assert len(image.encoded_image_string) < 80_000


def test_histograms_count_all_nodes_and_edges(events):
    assert ours(events, "histograms") == HISTOGRAMS
    for name, of in (("node_degree", "nodes"), ("edge_weight", "edges")):
        [event] = events.Histograms(f"spectral_ds/{name}")
        values = event.histogram_value
        assert values.num == sum(values.bucket) == scalar(events, of)[0]
        assert 0 <= values.min <= values.sum / values.num <= values.max


def test_the_layout_holds_every_chart_and_only_scalars_that_exist(events):
    category = layout(events)
    assert category.title == "spectral_ds"
    found = {chart.title: set(chart.multiline.tag) for chart in category.chart}
    assert found == {t: {f"spectral_ds/{tag}" for tag in tags} for t, tags in CHARTS.items()}


IN_README = ("energy_over_time", "signal_to_noise")


def wait_for(condition, what, seconds=40):
    """The first true value of a condition."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)
    return found


@contextmanager
def tensorboard(runs, figures, log):
    """The address of a server that has read everything.

    Args:
        figures: how many there are.
        log: file for what the server says.
    """
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", runs.name, "--port", "0"]
    command += ["--host", "127.0.0.1", "--load_fast", "false", "--reload_interval", "0"]
    with log.open("w") as output:
        server = subprocess.Popen(command, cwd=runs.parent, stdout=output, stderr=output)
    try:
        [address] = wait_for(lambda: re.findall(r"http://[\d.:]+", log.read_text()), log.read_text)

        def images():
            with urllib.request.urlopen(f"{address}/data/plugin/images/tags", timeout=10) as reply:
                return [tag for tags in json.load(reply).values() for tag in tags]

        wait_for(lambda: len(images()) == figures, images)
        yield address
    finally:
        server.terminate()
        server.wait(20)


@contextmanager
def chromium(folder):
    """A browser of its own, driven by WebDriver."""
    paths = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = [name for name, path in paths.items() if path is None]
    if missing:
        pytest.skip(f"not on PATH: {' and '.join(missing)} (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = paths["chromium"]
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-dev-shm-usage",
        "disable-quic",
        "no-first-run",
        "no-proxy-server",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        f"user-data-dir={folder}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(paths["chromedriver"]))
    try:
        view = {"width": 1280, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", view)
        yield driver
    finally:
        driver.quit()


# Name of each card of a dashboard and how much is drawn on it; the page is made of shadow roots.
CARDS = """
const [card, mark] = arguments;
const inside = root => [...root.querySelectorAll("*")].flatMap(e => e.shadowRoot ?? []);
const find = (root, selector) => [
    ...root.querySelectorAll(selector), ...inside(root).flatMap(each => find(each, selector)),
];
const isDrawn = e => e.localName == "img" ? e.complete && e.naturalWidth : e.getAttribute("d");
return find(document, card).map(e => [
    find(e.shadowRoot, ".heading-label.name")[0]?.textContent.trim() ?? "",
    find(e.shadowRoot, mark).filter(isDrawn).length,
]);
"""


def dashboards(events):
    """By address of a dashboard: the element of a card, that of a mark, and marks a card."""

    def one_each(names):
        return dict.fromkeys((f"spectral_ds/{name}" for name in names), 1)

    norms = [name for name in ours(events, "scalars") if name.startswith("gradient_norm/")]
    charts = {chart.title: len(chart.multiline.tag) for chart in layout(events).chart}
    return {
        "scalars&tagFilter=%5Espectral_ds%2Fgradient_norm%2F": (
            "tf-scalar-card",
            "path.line",
            one_each(norms),
        ),
        "custom_scalars": ("tf-custom-scalar-multi-line-chart-card", "path.line", charts),
        "histograms": (
            "tf-histogram-loader",
            "path.outline",
            one_each(ours(events, "histograms")),
        ),
        "images": ("tf-image-loader", "img", one_each(ours(events, "images"))),
    }


def test_a_browser_shows_all_that_is_written_without_an_error(
    request, processes, tmp_path, monkeypatch
):
    given = os.environ.get("SPECTRAL_DS_RUNS")
    runs = Path(given).resolve() if given else request.getfixturevalue("runs")
    events = events_of(runs)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    server = tensorboard(runs, len(ours(events, "images")), tmp_path / "server.log")
    with chromium(tmp_path / "profile") as browser, server as address:
        for place, (card, mark, expected) in dashboards(events).items():
            browser.get(f"{address}/#{place}")

            def is_shown(card=card, mark=mark, expected=expected):
                found = dict(browser.execute_script(CARDS, card, mark))
                return all(found.get(name, 0) >= count for name, count in expected.items())

            def what(place=place, card=card, mark=mark):
                return place, browser.execute_script(CARDS, card, mark), console(browser)

            wait_for(is_shown, what)
        errors = console(browser)
        assert errors == []
        if folder := os.environ.get("SPECTRAL_DS_PICTURES"):
            picture = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
            assert picture.size == (1280, 800)
            picture.save(Path(folder) / "tensorboard.png", optimize=True)
            for name in IN_README:  # the last of each
                image = events.Images(f"spectral_ds/{name}")[-1]
                (Path(folder) / f"{name}.png").write_bytes(image.encoded_image_string)


def console(browser):
    """Errors that the page has reported since the last call."""
    return [each for each in browser.get_log("browser") if each["level"] == "SEVERE"]
