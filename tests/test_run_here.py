"""What the runner does with words, paths, exit codes and what it replaces; in this process."""

import gc
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import assert_nothing_is_attached
from torch.optim import optimizer as torch_optimizer

from spectral_ds import run
from spectral_ds.attach.runner import VARIABLE

WRITES_ARGV = """
import json, sys
from pathlib import Path
import helper
Path(sys.argv[-1]).write_text(json.dumps([__name__, __file__, sys.argv, sys.path[0]]))
"""

LEAVES_SOMETHING = """
import pathlib, sys, weakref
class Model: pass
model = Model()
weakref.finalize(model, pathlib.Path(sys.argv[1]).touch)
"""


def test_what_a_script_leaves_outlives_it(script, tmp_path):
    """Wrapped models have hung when they were destroyed at the end of the script."""
    path, out = script(LEAVES_SOMETHING), tmp_path / "gone"
    run.main([path, str(out)])
    gc.collect()
    assert not out.exists()


@pytest.mark.parametrize("from_launcher", [[], ["--local_rank=1"], ["--local-rank=1"]])
def test_a_script_sees_what_it_would_see_if_started_directly(script, tmp_path, from_launcher):
    path, out = script(WRITES_ARGV), str(tmp_path / "out.json")
    before = list(sys.argv), list(sys.path)
    run.main([*from_launcher, path, "--local_rank=7", "-x", out])
    assert json.loads(Path(out).read_text()) == [
        "__main__",
        path,
        [path, *from_launcher, "--local_rank=7", "-x", out],
        str(tmp_path),
    ]
    assert (sys.argv, sys.path) == before


def test_a_script_finds_its_folder_wherever_it_goes(script, tmp_path, monkeypatch):
    path, out = script(WRITES_ARGV), str(tmp_path / "out.json")
    monkeypatch.chdir(tmp_path)
    run.main([Path(path).name, out])
    assert json.loads(Path(out).read_text())[1] == path


def test_a_module_can_be_run_like_a_script(script, tmp_path, monkeypatch):
    path, out = script(WRITES_ARGV), str(tmp_path / "out.json")
    monkeypatch.syspath_prepend(str(tmp_path))
    run.main(["--local_rank=1", "-m", "train", out])
    name, file, argv, _ = json.loads(Path(out).read_text())
    assert (name, file, argv) == ("__main__", path, [path, "--local_rank=1", out])


STARTS_ITSELF = """
import json, os, subprocess, sys
from pathlib import Path
out = Path(sys.argv[1])
this = ["-m", "train"] if __spec__ else [os.path.abspath(__file__)]
if out.exists():
    Path(os.environ["NOTE"]).write_text(json.dumps([sys.orig_argv[1:], sys.argv, __name__]))
else:
    out.touch()
    os.environ["LOCAL_RANK"] = "0"  # as trainers do that start the others
    command = [sys.executable, *this, *sys.argv[1:]]
    for name, rank, words in [
        ("rank", "1", command), ("same", "0", command), ("other", "1", [*command[:1], "-c", ""])
    ]:
        child = {**os.environ, "LOCAL_RANK": rank, "NOTE": f"{out}.{name}"}
        subprocess.run(words, env=child, check=True, stderr=subprocess.DEVNULL)
"""


@pytest.mark.parametrize("is_module", [False, True])
def test_ranks_that_a_script_starts_by_itself_run_under_the_runner(
    script, tmp_path, monkeypatch, is_module
):
    path, out = script(STARTS_ITSELF), tmp_path / "out"
    monkeypatch.setenv("LOCAL_RANK", "0")  # what the script sets is gone again
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = ["-m", "train"] if is_module else [path]
    run.main([*words, str(out)])
    started, seen, name = json.loads(Path(f"{out}.rank").read_text())
    assert started == ["-m", "spectral_ds.run", *words, str(out)]
    assert (seen, name) == ([path, str(out)], "__main__")
    started, *_ = json.loads(Path(f"{out}.same").read_text())  # the script's own business
    assert started == [*words, str(out)]
    assert not Path(f"{out}.other").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_script_that_trains_nothing_is_told_so_by_rank_0(script, monkeypatch, capsys, rank):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.delenv(VARIABLE, raising=False)
    run.main([script("import torch\n")])
    said = capsys.readouterr().err
    if rank == 0:
        assert_nothing_is_attached(said, ["no torch optimizer", "took a step"])
    else:
        assert said == ""


@pytest.mark.parametrize(("rank", "local_rank"), [(0, 0), (1, 1), (1, 0)])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("misspelt.json", ["spectral_ds.filter.tua", "spectral_ds.filter.tau"]),
        ("none.yaml", ["none.yaml", "cannot be read"]),
    ],
)
def test_a_wrong_file_is_one_message_of_a_machine_and_no_script_starts(
    script, tmp_path, monkeypatch, capsys, name, words, rank, local_rank
):
    """Of rank 0, which ends the others before they say it, unless it finds nothing wrong."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    (tmp_path / "misspelt.json").write_text('{"spectral_ds": {"filter": {"tua": 1}}}')
    monkeypatch.setenv(VARIABLE, str(tmp_path / name))
    monkeypatch.setattr(run, "SECONDS_FOR_RANK_0", 0)
    out = tmp_path / "out.json"
    with pytest.raises(SystemExit) as end:
        run.main([script(WRITES_ARGV), str(out)])
    assert end.value.code == run.WRONG_INPUT
    lines = capsys.readouterr().err.splitlines()
    if local_rank == 0:
        [line] = lines
        assert line.startswith("spectral_ds.run: ")
        assert line.endswith(f" (rank 1, {socket.gethostname()})") == (rank == 1)
        for word in words:
            assert word in line
    else:
        assert lines == []
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "kind", "arguments"),
    [
        ("import sys; sys.exit(3)", SystemExit, (3,)),
        ("raise ValueError('the loss is gone')", ValueError, ("the loss is gone",)),
        ("raise SystemExit('no data')", SystemExit, ("no data",)),
        ("import sys; sys.exit()", SystemExit, ()),
    ],
)
def test_what_a_script_raises_goes_through(script, capsys, text, kind, arguments):
    before = list(sys.argv), list(sys.path)
    with pytest.raises(kind) as end:
        run.main([script(text)])
    assert end.value.args == arguments
    assert ("NOTHING IS ATTACHED" in capsys.readouterr().err) == (arguments == ())
    assert (sys.argv, sys.path) == before


def test_wrong_words_are_one_message(tmp_path, capsys):
    for words, word in ([str(tmp_path / "no.py")], "no.py: no such file"), ([], "usage:"):
        with pytest.raises(SystemExit) as end:
            run.main(words)
        assert end.value.code == run.WRONG_INPUT
        assert word in capsys.readouterr().err
    run.main(["--help"])
    assert "usage:" in capsys.readouterr().out


TRAINS = """
import torch
from torch.nn.utils import clip_grad_norm_
import deepspeed
model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model(torch.ones(2, 4)).sum().backward()
clip_grad_norm_(model.parameters(), 1.0)
optimizer.step()
{}
"""


@pytest.mark.parametrize("end", ["", "raise ValueError('stop')"])
def test_all_that_was_replaced_is_restored(script, monkeypatch, tmp_path, end, capsys):
    import deepspeed

    (tmp_path / "section.yaml").write_text("monitor: {enabled: false}")
    monkeypatch.setenv("SPECTRAL_DS_CONFIG", str(tmp_path / "section.yaml"))
    clipping = torch.nn.utils, torch.nn.utils.clip_grad

    def state():
        return (
            [dict(vars(module)) for module in clipping],
            torch.optim.Optimizer.__init__,
            deepspeed.initialize,
            list(torch_optimizer._global_optimizer_pre_hooks),
            list(torch_optimizer._global_optimizer_post_hooks),
            list(sys.meta_path),
            list(sys.path),
            list(sys.argv),
        )

    before = state()
    if end:
        with pytest.raises(ValueError, match="stop"):
            run.main([script(TRAINS.format(end))])
    else:
        run.main([script(TRAINS.format(end))])
    assert state() == before
    assert "attached to SGD of Sequential" in capsys.readouterr().err


@pytest.mark.usefixtures("processes")
def test_importing_the_package_imports_nothing_slow_and_figures_not_what_draws_them():
    check = (
        "import spectral_ds, sys\n"
        "assert not {'deepspeed', 'transformers', 'torch._dynamo'} & set(sys.modules)\n"
        "import spectral_ds.monitor.figures, spectral_ds.cli.inspect.plots\n"
        "assert 'matplotlib' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": ""}
    subprocess.run([sys.executable, "-c", check], check=True, env=environment)
