"""The section in a DeepSpeed JSON that the Trainer of Hugging Face, or Accelerate, reads first.

Both take every value "auto" in the whole file for one of theirs to fill, and stop at one that they
do not know.
"""

import json
from dataclasses import asdict

import pytest
import tiny
from launching import free_port
from ranks import RankPool

from spectral_ds.config import PRESETS, SpectralConfig, SpectralConfigError, load_config

# What scripts have their launchers fill.
SCRIPT = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
}
CHOSEN = ("filter.order", "operator.kernel", "operator.exchange")


def written_out():
    """All keys at their defaults; by file too, where lists come for tuples."""
    return json.loads(json.dumps(asdict(SpectralConfig())))


def by_accelerate(section):
    """The section after Accelerate has filled the whole config in."""
    from accelerate.utils import DeepSpeedPlugin

    plugin = DeepSpeedPlugin(hf_ds_config={**SCRIPT, "spectral_ds": section})
    plugin.deepspeed_config_process(
        must_match=False,
        train_micro_batch_size_per_gpu=2,
        gradient_accumulation_steps=1,
        gradient_clipping=1.0,
    )
    assert plugin.deepspeed_config["gradient_clipping"] == 1.0
    return plugin.deepspeed_config["spectral_ds"]


def trained_by_both(path, folder):
    """The plugin's configuration in a Trainer, and in a loop of Accelerate, that read the file."""
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DeepSpeedPlugin
    from transformers import LlamaForCausalLM, Trainer, TrainingArguments

    import spectral_ds

    model = LlamaForCausalLM(tiny.llama_config(num_hidden_layers=1))
    tokens = torch.randint(0, 53, (2, 9))
    settings = {"max_steps": 1, "per_device_train_batch_size": 2, "report_to": "none"}
    settings |= {"save_strategy": "no", "use_cpu": True, "optim": "sgd", "disable_tqdm": True}
    arguments = TrainingArguments(folder, deepspeed=path, **settings)
    data = [{"input_ids": sequence, "labels": sequence} for sequence in tokens]
    trainer = Trainer(model, arguments, train_dataset=data)
    found = []
    take = trainer.training_step

    def step(*args, **kwargs):
        found.append(spectral_ds.attach(trainer.deepspeed).config)
        spectral_ds.plugin_of(trainer.deepspeed).detach()
        return take(*args, **kwargs)

    trainer.training_step = step
    trainer.train()
    AcceleratorState._reset_state(True)
    plugin = DeepSpeedPlugin(hf_ds_config=path)
    accelerator = Accelerator(deepspeed_plugin=plugin)
    model = LlamaForCausalLM(tiny.llama_config(num_hidden_layers=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = torch.utils.data.DataLoader(tokens, batch_size=2)
    engine, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    found.append(spectral_ds.attach(engine).config)
    for batch in loader:
        accelerator.backward(engine(input_ids=batch, labels=batch).loss)
        optimizer.step()
    return found


def complete(name):
    """The section of a preset with all keys written out, as a file has it: lists for tuples."""
    return json.loads(json.dumps(asdict(load_config({"preset": name}))))


@pytest.mark.parametrize("name", PRESETS)
def test_accelerate_takes_no_key_of_a_complete_section_for_its_own(name):
    section = complete(name)
    assert by_accelerate(section) == section


@pytest.mark.parametrize("key", CHOSEN)
def test_both_stop_at_the_word_auto(key):
    """Why the defaults have another word."""
    part, name = key.split(".")
    with pytest.raises(ValueError, match=f"`spectral_ds.{key}` not found in kwargs"):
        by_accelerate({part: {name: "auto"}})


def test_a_trainer_and_a_loop_of_accelerate_train_with_every_key_written_out(processes, tmp_path):
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps({**SCRIPT, "spectral_ds": written_out()}))
    # Accelerate keeps its state for good.
    pool = RankPool(1, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    try:
        [found] = pool.run(trained_by_both, str(path), str(tmp_path))
    finally:
        pool.close()
    assert found == [SpectralConfig(), SpectralConfig()]


@pytest.mark.parametrize("key", CHOSEN)
def test_auto_means_the_best_where_nobody_else_reads_it_first(key):
    part, name = key.split(".")
    assert load_config({part: {name: "auto"}}) == load_config({part: {name: "best"}})
    assert load_config({part: {name: "auto"}}).digest() == load_config({}).digest()
    with pytest.raises(SpectralConfigError, match=r"must be (one of )?best"):
        load_config({part: {name: "automatic"}})
    with pytest.raises(SpectralConfigError, match="must be one of"):
        load_config({"graph": {"node": "auto"}})


def test_no_key_of_the_section_has_the_word_for_its_default():
    assert "auto" not in json.dumps([written_out(), *map(complete, PRESETS)])
