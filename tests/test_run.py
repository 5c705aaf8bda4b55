"""Unchanged scripts under `spectral_ds.run`: one filtered step equals the oracle, clipped after."""

import functools
import json

import numpy as np
import pytest
import ring_steps
import tiny
import torch
from expected import METHODS, expected_update, relative_error
from launching import SCRIPTS, assert_nothing_is_attached, forked, free_port, launched
from transformers import LlamaForCausalLM

from spectral_ds import run

SECTION = METHODS["similarity-heat"]
RATE = 16.0  # in the scripts
LIMIT = 0.25  # of the gradient's norm
TRAINER = ("--max_steps 1 --per_device_train_batch_size 3 --gradient_accumulation_steps 2 "
           f"--optim sgd --learning_rate {RATE} --lr_scheduler_type constant "
           f"--max_grad_norm {LIMIT} --logging_steps 1 --report_to none --save_strategy no "
           "--use_cpu True --disable_tqdm True").split()  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, its data and configurations that differ by the section alone."""
    path = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny.llama_config(num_key_value_heads=2)).save_pretrained(path / "model")
    generator = torch.Generator().manual_seed(1)
    torch.save(torch.randint(0, 53, (12, 9), generator=generator), path / "tokens.pt")
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": LIMIT,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
    for name, section in {
        "without": {},
        "with": {"spectral_ds": SECTION},
        "misspelt": {"spectral_ds": {"filter": {"tua": 1}}},
    }.items():
        (path / f"{name}.json").write_text(json.dumps({**config, **section}))
    (path / "section.yaml").write_text(json.dumps({"spectral_ds": SECTION}))
    (path / "no-match.yaml").write_text(json.dumps({"graph": {"include": ["*.nothing.*"]}}))
    return path


def dumped(path):
    """Weights before the step, the gradient that was clipped, and its norm as the script saw it."""
    found = torch.load(path)
    before = {name: weight.numpy() for name, weight in found["before"].items()}
    clipped = {name: (before[name] - w.numpy()) / RATE for name, w in found["after"].items()}
    factor = (found["norm"] + 1e-6) / LIMIT  # as torch and DeepSpeed clip
    assert factor > 1.5
    return before, {name: value.astype(np.float64) * factor for name, value in clipped.items()}, (
        found["norm"]
    )  # fmt: skip


def assert_filtered_then_clipped(without, with_plugin):
    """The step of the second dump is that of the first, filtered by the oracle, then clipped."""
    weights, gradients, norm = dumped(without)
    _, _, expected = expected_update(SECTION, {"weights": weights, "gradients": gradients})
    expected_norm = np.sqrt(sum((value**2).sum() for value in expected.values()))
    _, filtered, filtered_norm = dumped(with_plugin)
    assert expected_norm < 0.97 * norm
    assert filtered_norm == pytest.approx(expected_norm, rel=1e-5)
    # What the weights' own rounding leaves of the smallest steps is less precise.
    assert relative_error(filtered, expected, floor=0.1) <= 1e-5


def commands(folder, tmp_path):
    """Each script's words, without and with what configures the plugin."""
    loop = ["--folder", folder, "--deepspeed", "--deepspeed_config"]
    trainer = ["--folder", folder, *TRAINER, "--output_dir", tmp_path, "--deepspeed"]
    return {
        "deepspeed_loop": lambda name, out: [*loop, folder / f"{name}.json", "--output", out],
        "trainer": lambda name, out: [*trainer, folder / f"{name}.json", "--output", out],
        "accelerate_loop": lambda name, out: [folder, out, LIMIT],
        "fsdp2_loop": lambda name, out: [folder, out, LIMIT],
    }


@pytest.fixture(scope="module")
def alone(folder, processes):
    """What a script dumps that nothing watches, by its name."""

    @functools.cache
    def dump(name):
        out = folder / f"{name}.pt"
        words = commands(folder, folder / name)[name]("without", out)
        done = forked(2, SCRIPTS / f"{name}.py", *words, runner=False)
        assert done.code == 0, done.stderr
        return out

    return dump


@pytest.mark.parametrize(
    ("name", "attached_to"),
    [
        ("deepspeed_loop", "DeepSpeed engine of LlamaForCausalLM (ZeRO stage 2)"),
        ("trainer", "DeepSpeed engine of LlamaForCausalLM (ZeRO stage 2)"),
        ("accelerate_loop", "SGD of DistributedDataParallel of LlamaForCausalLM"),
        ("fsdp2_loop", "SGD of FSDPLlamaForCausalLM"),
    ],
)
def test_an_unchanged_script_is_filtered_before_it_clips(
    folder, alone, tmp_path, name, attached_to
):
    filtered = tmp_path / "with.pt"
    words = commands(folder, tmp_path)[name]("with", filtered)
    is_deepspeed = name in ("deepspeed_loop", "trainer")
    environment = {} if is_deepspeed else {"SPECTRAL_DS_CONFIG": str(folder / "section.yaml")}
    done = forked(2, SCRIPTS / f"{name}.py", *words, **environment)
    assert done.code == 0, done.stderr
    assert done.stderr.count("spectral_ds: attached to") == 1
    assert attached_to in done.stderr
    assert "NOTHING" not in done.stderr
    assert_filtered_then_clipped(alone(name), filtered)


TRAINS_TOGETHER = """
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 4)))
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
torch.manual_seed(dist.get_rank())
model(torch.randn(8, 5)).square().mean().backward()
before = [(p.detach().clone(), p.grad.clone()) for p in model.parameters()]
optimizer.step()
steps = [(g, old - p.detach()) for (old, g), p in zip(before, model.parameters())]
torch.save([sys.argv[1:], steps], f"{sys.argv[-1]}.{dist.get_rank()}")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.usefixtures("processes")
def test_torchrun_starts_it(script, tmp_path):
    (tmp_path / "section.yaml").write_text(json.dumps(ring_steps.SECTION))
    words = ["--rate", "a b", str(tmp_path / "out")]
    done = launched(
        *("torchrun", "--nproc_per_node", 2, "--master_port", free_port()),
        *("-m", "spectral_ds.run", script(TRAINS_TOGETHER), *words),
        SPECTRAL_DS_CONFIG=str(tmp_path / "section.yaml"),
    )
    assert done.code == 0, done.stderr
    assert done.stderr.count("spectral_ds: attached to") == 1
    assert "SGD of DistributedDataParallel of Sequential" in done.stderr
    for rank in range(2):
        seen, steps = torch.load(tmp_path / f"out.{rank}")
        assert seen == words
        ring_steps.assert_is(
            [step.numpy() for _, step in steps],
            [ring_steps.smoothed(gradient) for gradient, _ in steps],
        )


@pytest.mark.parametrize(
    ("name", "section", "words"),
    [
        ("deepspeed_loop", "", ["LlamaForCausalLM", "no section", "SPECTRAL_DS_CONFIG"]),
        ("fsdp2_loop", "", ["SGD", "SPECTRAL_DS_CONFIG is not set"]),
        ("accelerate_loop", "enabled: false", ["SGD", "enabled: false"]),
    ],
)
def test_a_script_to_which_nothing_is_attached_is_told_so_and_trains_as_it_does_alone(
    folder, alone, tmp_path, name, section, words
):
    (tmp_path / "section.yaml").write_text(section)
    variables = {"SPECTRAL_DS_CONFIG": str(tmp_path / "section.yaml")} if section else {}
    given = commands(folder, tmp_path)[name]("without", tmp_path / "out.pt")
    done = forked(2, SCRIPTS / f"{name}.py", *given, **variables)
    assert done.code == 0, done.stderr
    assert_nothing_is_attached(done.stderr, words)
    found, expected = torch.load(tmp_path / "out.pt"), torch.load(alone(name))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize(
    ("name", "config", "environment", "words"),
    [
        ("deepspeed_loop", "misspelt", "", ["spectral_ds.filter.tua", "spectral_ds.filter.tau"]),
        ("fsdp2_loop", "with", "no-match.yaml", ["*.nothing.*", "matches no trainable parameter"]),
    ],
)
def test_a_wrong_configuration_stops_all_ranks_with_one_message(
    folder, tmp_path, name, config, environment, words
):
    out = tmp_path / "out.pt"
    variables = {"SPECTRAL_DS_CONFIG": str(folder / environment)} if environment else {}
    given = commands(folder, tmp_path)[name](config, out)
    done = forked(2, SCRIPTS / f"{name}.py", *given, **variables)
    assert done.code == run.WRONG_INPUT
    [line] = [line for line in done.stderr.splitlines() if line.startswith("spectral_ds.run: ")]
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in line
    assert not out.exists()


FSDP1 = """
import torch
from torch.distributed.fsdp import FullyShardedDataParallel
torch.distributed.init_process_group("gloo")
model = FullyShardedDataParallel(torch.nn.Linear(4, 4), device_id=torch.device("cpu"))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(2):
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
torch.distributed.destroy_process_group()
"""


@pytest.mark.usefixtures("processes")
def test_an_engine_that_is_not_supported_is_named_and_trains_on(folder, script):
    done = forked(1, script(FSDP1), SPECTRAL_DS_CONFIG=str(folder / "section.yaml"))
    assert done.code == 0, done.stderr
    assert done.stderr.count("NOTHING IS ATTACHED") == 1
    for word in ("SGD of FullyShardedDataParallel", "FSDP1", "fully_shard"):
        assert word in done.stderr
