"""What a graph of activations cannot be made of is refused by name, and leaves no hook."""

from types import SimpleNamespace

import activations
import pytest
import tiny
import torch
import transformers
from activations import (
    CalledByIds,
    keeping,
    random_ids,
    section_of,
)

import spectral_ds
from spectral_ds.config import SpectralConfigError


def refused(section, model=None):
    model = CalledByIds() if model is None else model
    with pytest.raises(SpectralConfigError) as caught:
        spectral_ds.attach(model, torch.optim.SGD(model.parameters(), lr=1.0), section)
    assert not any(module._forward_pre_hooks for module in model.modules())
    return str(caught.value)


def replicated(device_ids):
    wrapped = torch.nn.DataParallel(torch.nn.Identity())
    wrapped.module, wrapped.device_ids = CalledByIds(), device_ids
    return wrapped


def test_what_is_learned_by_copies_in_threads_is_refused():
    message = refused(section_of({"learn": "training"}), replicated([0, 1]))
    assert 'graph.edges[0].learn = "training": nn.DataParallel calls copies' in message
    assert "torchrun" in message
    for devices, edge in (([0], {"learn": "training"}), ([0, 1], {})):
        model = replicated(devices)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        spectral_ds.attach(model, optimizer, section_of(edge)).detach()


def test_a_model_without_a_vocabulary_is_refused():
    message = refused(section_of(), torch.nn.Linear(3, 3))
    assert message == (
        'spectral_ds.graph.edges[0].keep = "random": random draws token ids, and Linear has no '
        "config.vocab_size; use a file of statistics, or keep: given and plugin.calibrate(batches)"
    )


def test_a_model_of_which_several_parts_read_text_has_no_vocabulary_of_its_own():
    def several():
        raise ValueError("Multiple valid text configs were found")

    model = CalledByIds()
    model.config = SimpleNamespace(get_text_config=several)
    assert "CalledByIds has no config.vocab_size" in refused(section_of(), model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    spectral_ds.attach(model, optimizer, section_of({"keep": "given"})).detach()


def test_a_model_that_does_not_generate_is_refused():
    message = refused(section_of({"keep": "generated"}))
    assert 'edges[0].keep = "generated": generated is text that the model writes, and ' in message
    assert "CalledByIds cannot generate; use random or a file of texts" in message


def test_a_model_without_a_begin_token_is_refused():
    model = transformers.LlamaForCausalLM(tiny.llama_config())
    model.config.bos_token_id = model.generation_config.bos_token_id = None
    message = refused(section_of({"keep": "generated"}), model)
    assert "generated begins with bos_token_id, which LlamaForCausalLM lacks" in message


def test_a_begin_token_outside_the_vocabulary_is_refused():
    model = transformers.LlamaForCausalLM(tiny.llama_config())
    size = model.config.vocab_size
    model.generation_config.bos_token_id = size
    message = refused(section_of({"keep": "generated"}), model)
    assert f"begins with bos_token_id {size}, and the vocabulary of Llama" in message
    assert "set generation_config.bos_token_id" in message


@pytest.mark.parametrize("raised", [IndexError, AttributeError, AssertionError])
def test_whatever_a_model_raises_of_inputs_names_the_key(raised):
    class Unusual(CalledByIds):
        def forward(self, *inputs, **named):
            raise raised("pixels are missing")

    message = refused(section_of(), Unusual())
    assert 'graph.edges[0].keep = "random": Unusual cannot be called with it' in message
    assert f"({raised.__name__}: pixels are missing)" in message


def test_files_that_cannot_be_used_are_refused(tmp_path):
    def file(name, content):
        (tmp_path / name).write_text(content)
        return str(tmp_path / name)

    other = {
        "missing.txt": "no such file or folder",
        file("empty.txt", "\n"): "holds no text",
        file("text.txt", "a b"): "name its folder in `tokenizer`",
        "missing.safetensors": "cannot be read",
        file("text.safetensors", "no tensors at all"): "cannot be read",
    }
    for source, reason in other.items():
        message = refused(section_of({"keep": source}))
        assert message.startswith(f'spectral_ds.graph.edges[0].keep = "{source}": '), message
        assert reason in message
        message = refused(section_of({"learn": source}))
        assert message.startswith(f'spectral_ds.graph.edges[0].learn = "{source}": '), message
        assert reason in message
    edge = {"keep": str(tmp_path / "text.txt"), "tokenizer": str(tmp_path / "nowhere")}
    assert "no tokenizer in" in refused(section_of(edge))


def test_weights_in_place_of_statistics_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    message = refused(section_of({"keep": str(tmp_path / "model.safetensors")}))
    assert "holds no statistics of activations" in message


class Wider(CalledByIds):
    """Another shape of one matrix, and another name of another."""

    def __init__(self):
        super().__init__()
        mlp = self.llama.model.layers[2].mlp
        mlp.gate_proj, mlp.up_proj = torch.nn.Linear(24, 31), torch.nn.Linear(24, 31)
        mlp.down_proj = torch.nn.Linear(31, 24, bias=False)


def test_statistics_of_another_model_are_refused_and_the_parameter_is_named(tmp_path):
    file = tmp_path / "stats.safetensors"
    plugin, _ = keeping(CalledByIds(), [random_ids(20)])
    plugin.save_activations(file)
    plugin.detach()
    section = section_of({"keep": str(file), "rank": activations.RANK})
    message = refused(section, Wider())
    assert "layers.2.mlp.down_proj.weight" in message
    assert "31" in message
    message = refused(section, transformers.LlamaForCausalLM(tiny.llama_config()))
    assert "parameter 'model.layers.0.self_attn.q_proj.weight'" in message
    section = section_of({"keep": str(file), "rank": activations.RANK + 1})
    message = refused(section)
    assert f"its statistics are of rank {activations.RANK}, below {activations.RANK + 1}" in message
