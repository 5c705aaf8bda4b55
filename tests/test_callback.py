"""SpectralCallback in the Trainer of transformers: every engine, logs, checkpoints, the end."""

import os
from pathlib import Path

import numpy as np
import pytest
import tiny
from expected import METHODS, expected_update, relative_error
from launching import free_port
from ranks import RankError, RankPool

SECTION = {**METHODS["similarity-heat"], "monitor": {"interval": 1}}
RATE = 16.0
LIMIT = 0.25
TOKENS = (12, 9)


def make_trainer(engine, output, callbacks, lora=False, **changes):
    """A Trainer of the tiny model, as a user makes it."""
    import torch
    from transformers import LlamaForCausalLM, Trainer, TrainingArguments

    world_size = torch.distributed.get_world_size()
    if engine == "plain":
        os.environ.pop("LOCAL_RANK", None)  # by which Accelerate would choose DDP
    settings = {
        "output_dir": str(output),
        "max_steps": 1,
        "per_device_train_batch_size": TOKENS[0] // world_size // 2,
        "gradient_accumulation_steps": 2,
        "optim": "sgd",
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": LIMIT,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": engine != "fsdp2",
        **changes,
    }
    if engine == "fsdp2":
        shard_on_cpu()
        wrapped = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        settings |= {"fsdp": "full_shard auto_wrap", "fsdp_config": wrapped}
    if engine.startswith("zero"):
        settings["deepspeed"] = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": {"stage": int(engine[-1])},
        }
    arguments = TrainingArguments(**settings)
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny.llama_config(num_key_value_heads=2))
    if lora:
        import peft

        kind = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "up_proj"])
        model = peft.get_peft_model(model, kind)
    tokens = torch.randint(0, 53, TOKENS, generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": sequence, "labels": sequence} for sequence in tokens]
    return Trainer(model, arguments, train_dataset=data, callbacks=callbacks)


def shard_on_cpu():
    """Accelerate turns FSDP into DDP without an accelerator; here it takes the CPU for one."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)


def snapshot(module):
    """All parameters, whole."""
    import deepspeed

    found = {}
    for name, parameter in module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            whole = parameter.detach()
            whole = whole.full_tensor() if hasattr(whole, "full_tensor") else whole
            found[name] = whole.numpy().copy()
    return found


def one_step(engine, section, output, lora):
    """Weights before and after, the norm that was logged, and names of classes."""
    import spectral_ds

    callbacks = [] if section is None else [spectral_ds.SpectralCallback(section)]
    trainer = make_trainer(engine, output, callbacks, lora)
    before = snapshot(trainer.model)
    trainer.train()
    [norm] = [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    wrapped = type(trainer.model_wrapped).__name__
    return before, snapshot(trainer.model), float(norm), trained, wrapped


@pytest.fixture(scope="module")
def pools(processes):
    """`pools(engine, n)`: n ranks of their own, because Accelerate keeps its state for good."""
    found = {}

    def pool(engine, world_size):
        if (engine, world_size) not in found:
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
            found[engine, world_size] = RankPool(world_size, **place)
        return found[engine, world_size]

    yield pool
    for each in found.values():
        each.close()


@pytest.mark.parametrize(
    ("engine", "world_size", "lora", "wrapped"),
    [
        ("plain", 1, True, "PeftModel"),
        ("ddp", 2, True, "DistributedDataParallel"),
        ("fsdp2", 2, False, "FSDPLlamaForCausalLM"),
        ("fsdp2", 2, True, "FSDPPeftModel"),
        ("zero3", 2, False, "DeepSpeedEngine"),
    ],
)
def test_a_step_is_filtered_before_it_is_clipped(
    pools, tmp_path, engine, world_size, lora, wrapped
):
    pool = pools(engine, world_size)
    before, after, norm, names, _ = pool.run(one_step, engine, None, tmp_path, lora)[0]
    applied = {name: (before[name] - after[name]) / RATE for name in names}
    factor = max(1.0, (norm + 1e-6) / LIMIT)
    plain = {name: value.astype(np.float64) * factor for name, value in applied.items()}
    _, _, expected = expected_update(SECTION, {"weights": before, "gradients": plain})
    expected_norm = np.sqrt(sum((value**2).sum() for value in expected.values()))
    assert expected_norm < 0.97 * norm
    for result in pool.run(one_step, engine, SECTION, tmp_path, lora):
        before, after, norm, _, kind = result
        assert wrapped in kind
        assert norm == pytest.approx(expected_norm, rel=1e-5)
        factor = max(1.0, (norm + 1e-6) / LIMIT)
        got = {name: (before[name] - after[name]) / RATE * factor for name in names}
        assert relative_error(got, expected, 0.1) <= 1e-5  # weights are rounded
        for name in before.keys() - set(names):  # frozen
            np.testing.assert_array_equal(before[name], after[name])


def what_is_logged(output):
    """Of four steps, of which every second is monitored; and what the plugin says."""
    import contextlib
    import io
    import logging

    from said import messages
    from transformers import TrainerCallback

    import spectral_ds

    class Reporter(TrainerCallback):
        def __init__(self):
            self.logs = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.logs.append(dict(logs))

    reporter, ours = Reporter(), spectral_ds.SpectralCallback({"monitor": {"interval": 2}})
    changes = {"max_steps": 4, "logging_steps": 1, "disable_tqdm": True}
    trainer = make_trainer("plain", output, [reporter, ours], **changes)
    with contextlib.redirect_stdout(io.StringIO()) as console, messages(logging.INFO) as said:
        trainer.train()
    return reporter.logs, trainer.state.log_history, console.getvalue(), said


def test_metrics_join_the_logs_but_not_the_console(pools, tmp_path):
    [(reported, history, console, said)] = pools("plain", 1).run(what_is_logged, tmp_path)
    for logs in (reported, history):
        steps = [log["spectral_ds/step"] for log in logs if "spectral_ds/step" in log]
        assert steps == [0, 2]
        assert all("loss" in log for log in logs if "spectral_ds/step" in log)
        assert "spectral_ds/band_energy_after/7" in logs[0]
        assert "spectral_ds/gradient_norm/after" in logs[2]
    assert "loss" in console
    assert "spectral_ds" not in console
    assert any("nodes and" in line for line in said)
    assert not any("nowhere" in line for line in said)


def what_is_left(output, interrupt):
    """Whether anything is still replaced or attached after training."""
    import torch
    from transformers import TrainerCallback

    import spectral_ds

    class Interrupt(TrainerCallback):
        def on_step_end(self, *_, **__):
            if interrupt:
                raise KeyboardInterrupt

    def replaced():
        utils = torch.nn.utils, torch.nn.utils.clip_grad
        logs = [vars(each).get("on_log") for each in trainer.callback_handler.callbacks]
        return [dict(vars(module)) for module in utils], logs

    ours = spectral_ds.SpectralCallback(SECTION)
    seen = []

    class Look(TrainerCallback):
        def on_step_begin(self, *_, **__):
            seen.append((ours.plugin is not None, replaced() != before))

    trainer = make_trainer("plain", output, [ours, Interrupt(), Look()], max_steps=2)
    order = list(trainer.callback_handler.callbacks)
    trainer.callback_handler.callbacks.remove(ours)
    trainer.callback_handler.callbacks.insert(0, ours)  # where it moves to
    before = replaced()
    trainer.callback_handler.callbacks[:] = order
    for _ in range(2):  # a second training attaches again
        try:
            trainer.train()
        except KeyboardInterrupt:
            assert interrupt
    plugin = spectral_ds.plugin_of(trainer.model)
    return set(seen), ours.plugin is None and plugin is None, replaced() == before


@pytest.mark.parametrize("interrupt", [False, True])
def test_the_end_of_training_restores_everything(pools, tmp_path, interrupt):
    [(seen, is_detached, is_restored)] = pools("plain", 1).run(what_is_left, tmp_path, interrupt)
    assert seen == {(True, True)}
    assert is_detached
    assert is_restored


# Its graph is made of the weights at attach, and it remembers gradients.
REMEMBERS = {
    "filter": {"response": "heat", "strength": 1.0, "temporal": {"decay": 0.5, "amplify": 1.0}},
    "regularizer": {"strength": 0.1, "ridge": 1.0},
}


def train_and_resume(engine, output):
    """Final weights of four steps, of the same resumed after two, and without the state."""
    import shutil

    import spectral_ds

    changes = {"max_steps": 4, "learning_rate": 0.5, "save_strategy": "steps", "save_steps": 2}
    results = []
    for resume in (None, True, f"{output}-moved/checkpoint-2"):
        trainer = make_trainer(engine, output, [spectral_ds.SpectralCallback(REMEMBERS)], **changes)
        if isinstance(resume, str) and trainer.is_world_process_zero():
            for folder in Path(resume).glob("**/spectral_ds"):
                shutil.rmtree(folder)
        trainer.accelerator.wait_for_everyone()
        trainer.train(resume_from_checkpoint=resume)
        results.append(snapshot(trainer.model))
        if resume is None and trainer.is_world_process_zero():
            shutil.copytree(f"{output}/checkpoint-2", f"{output}-moved/checkpoint-2")
            shutil.rmtree(f"{output}/checkpoint-4")
        trainer.accelerator.wait_for_everyone()
    return results


@pytest.mark.parametrize(("engine", "world_size"), [("ddp", 2), ("zero2", 2)])
def test_training_resumes_with_the_state_of_the_plugin(pools, tmp_path, engine, world_size):
    for whole, resumed, without in pools(engine, world_size).run(
        train_and_resume, engine, tmp_path / "run"
    ):
        largest = max(np.abs(weight).max() for weight in whole.values())
        for name, weight in whole.items():
            np.testing.assert_allclose(resumed[name], weight, atol=1e-6 * largest)
        assert max(np.abs(without[n] - whole[n]).max() for n in whole) > 1e-4 * largest


def saved_by_the_trainer_itself(output):
    """Final weights of three steps, and resumed after two by a path elsewhere."""
    from transformers import TrainerCallback

    import spectral_ds

    class Interrupted(TrainerCallback):
        """As the Trainer does when a signal comes: no event tells."""

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                trainer._save_checkpoint(trainer.model, trial=None)

    changes = {"max_steps": 3, "learning_rate": 0.5}
    ours = spectral_ds.SpectralCallback(REMEMBERS)
    trainer = make_trainer("plain", f"{output}/first", [ours, Interrupted()], **changes)
    trainer.train()
    whole = snapshot(trainer.model)
    checkpoint = Path(output, "first", "checkpoint-2")
    ours = spectral_ds.SpectralCallback(REMEMBERS)
    trainer = make_trainer("plain", f"{output}/second", [ours], **changes)
    trainer.train(resume_from_checkpoint=checkpoint)
    resumed = snapshot(trainer.model)
    trainer = make_trainer("plain", f"{output}/third", [], **changes)
    trainer.add_callback(spectral_ds.SpectralCallback(REMEMBERS))
    with pytest.raises(RuntimeError, match=r"give it in Trainer\(\.\.\., callbacks"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    return whole, resumed


def test_every_whole_checkpoint_has_the_state_and_is_found_by_its_path(pools, tmp_path):
    [(whole, resumed)] = pools("plain", 1).run(saved_by_the_trainer_itself, tmp_path)
    largest = max(np.abs(weight).max() for weight in whole.values())
    for name, weight in whole.items():
        np.testing.assert_allclose(resumed[name], weight, atol=1e-6 * largest)


def two_that_share(output):
    """Of two Trainers that are alive: updates, logged steps, and the plugin's state on disk."""
    import spectral_ds

    shared = [spectral_ds.SpectralCallback(SECTION)]
    changes = {"save_strategy": "steps", "save_steps": 1}
    trainers = [make_trainer("plain", f"{output}/{i}", shared, **changes) for i in range(2)]
    found = []
    for i, trainer in reversed([*enumerate(trainers)]):
        before = snapshot(trainer.model)
        trainer.train()
        after = snapshot(trainer.model)
        steps = [log.get("spectral_ds/step") for log in trainer.state.log_history if "loss" in log]
        is_saved = Path(f"{output}/{i}/checkpoint-1/spectral_ds/manifest.json").is_file()
        found.append(({name: before[name] - after[name] for name in before}, steps, is_saved))
    late = make_trainer("plain", f"{output}/0", [], max_steps=2)
    late.add_callback(*shared)
    with pytest.raises(RuntimeError, match="does not tell"):
        late.train(resume_from_checkpoint=True)
    return found


def test_trainers_that_share_a_callback_are_each_filtered(pools, tmp_path):
    pool = pools("plain", 1)
    before, after, *_ = pool.run(one_step, "plain", SECTION, tmp_path, False)[0]
    wanted = {name: before[name] - after[name] for name in before}
    for update, steps, is_saved in pool.run(two_that_share, tmp_path)[0]:
        assert relative_error(update, wanted) <= 1e-5
        assert steps == [0]
        assert is_saved


def attach_beside_another(output):
    """Whose gradients are filtered, if a plugin of another optimizer is on the model."""
    import torch

    import spectral_ds

    trainer = make_trainer("plain", output, [spectral_ds.SpectralCallback(SECTION)])
    model = trainer.model
    earlier = torch.optim.SGD(model.parameters(), lr=1.0)
    plugin = spectral_ds.attach(model, earlier, SECTION)
    with pytest.raises(RuntimeError, match="attached already"):
        trainer.train()
    plugin.detach()
    trainer.train()
    return plugin.engine.step


def test_a_plugin_of_another_optimizer_is_not_taken_for_the_trainers(pools, tmp_path):
    assert pools("plain", 1).run(attach_beside_another, tmp_path) == [0]


def train_with(engine, output, section, environment):
    """The response in use, or the error."""
    from transformers import TrainerCallback

    import spectral_ds

    class Look(TrainerCallback):
        def on_step_begin(self, *_, **__):
            plugin = ours.plugin
            found.append(None if plugin is None else plugin.config.filter.response)

    if environment is not None:
        os.environ["SPECTRAL_DS_CONFIG"] = environment
    found = []
    try:
        ours = spectral_ds.SpectralCallback(section)
        make_trainer(engine, output, [ours, Look()]).train()
    finally:
        os.environ.pop("SPECTRAL_DS_CONFIG", None)
    return found


@pytest.mark.parametrize(
    ("section", "environment", "outcome"),
    [
        ({"filter": {"response": "tikhonov"}}, None, "tikhonov"),
        ({"enabled": False}, None, None),
        (None, "filter: {response: window}", "window"),
        ({"filter": {"response": "tikhonov"}}, "filter: {response: window}", "tikhonov"),
        (None, None, ["SpectralConfigError", "no config", "SPECTRAL_DS_CONFIG"]),
        ({"filter": {"tua": 1}}, None, ["SpectralConfigError", "spectral_ds.filter.tua"]),
        ({"graph": {"include": ["no.such"]}}, None, ["SpectralConfigError", "no.such"]),
    ],
)
def test_where_the_configuration_comes_from(pools, tmp_path, section, environment, outcome):
    path = None
    if environment is not None:
        path = str(tmp_path / "section.yaml")
        Path(path).write_text(environment)
    [found] = pools("plain", 1).outcomes(train_with, "plain", tmp_path, section, path)
    if isinstance(outcome, list):
        assert isinstance(found, RankError)
        assert found.kind == outcome[0]
        for word in outcome[1:]:
            assert word in found.message
    else:
        assert found == [outcome]


def train_under_the_runner(engine, output):
    """What the callback and the runner together subtract from the weights, and say."""
    import contextlib
    import io

    import spectral_ds
    from spectral_ds.attach.runner import Runner

    runner = Runner(spectral_ds.load_config(SECTION))
    runner.watch()
    with contextlib.redirect_stderr(io.StringIO()) as said:
        trainer = make_trainer(engine, output, [spectral_ds.SpectralCallback(SECTION)])
        before = snapshot(trainer.model)
        trainer.train()
        after = snapshot(trainer.model)
        runner.report()
    runner.stop()
    return {name: before[name] - after[name] for name in before}, said.getvalue()


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_callback_and_runner_together_filter_once(pools, tmp_path, engine):
    pool = pools(engine, 1)
    [(update, said)] = pool.run(train_under_the_runner, engine, tmp_path)
    before, after, *_ = pool.run(one_step, engine, SECTION, tmp_path, False)[0]
    wanted = {name: before[name] - after[name] for name in before}
    assert relative_error(update, wanted) <= 1e-5
    assert "NOTHING" not in said


def attach_by_fsdp1(output):
    import torch
    from torch.distributed.fsdp import FullyShardedDataParallel
    from transformers import Trainer

    import spectral_ds

    class Wraps(Trainer):
        def _wrap_model(self, model, *_, **__):
            return FullyShardedDataParallel(model, device_id=torch.device("cpu"))

    trainer = make_trainer("plain", output, [spectral_ds.SpectralCallback(SECTION)])
    trainer.__class__ = Wraps
    trainer.train()


def test_an_engine_that_is_not_supported_stops_the_training(pools, tmp_path):
    [found] = pools("plain", 1).outcomes(attach_by_fsdp1, tmp_path)
    assert isinstance(found, RankError)
    assert found.kind == "UnsupportedEngineError", found.traceback
    assert "FSDP1" in found.message
