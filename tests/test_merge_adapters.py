"""`spectral-ds merge` of peft adapters: like the whole models that they make, or refused."""

import json
import shutil

import numpy as np
import peft
import pytest
import torch
from merged import (
    CLASSES,
    CONFIGS,
    LOOK,
    assert_close,
    lora,
    merge,
    refusal,
    tensors,
    write_models,
    write_tokenizer,
)
from peft import LoraConfig, OFTConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    BertForSequenceClassification,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
)

from spectral_ds.cli.merge.adapter import Adapter
from spectral_ds.cli.merge.folder import Folder

FEW = ["--samples", "4", "--length", "8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("merge"), ("llama", "gpt2", "bert"))


@pytest.mark.parametrize(
    ("kind", "targets", "task", "settings"),
    [
        ("llama", ["q_proj", "down_proj"], "CAUSAL_LM", {}),
        ("llama", ["o_proj"], "CAUSAL_LM", {"use_dora": True}),
        ("llama", ["embed_tokens", "q_proj"], "CAUSAL_LM", {}),
        ("gpt2", ["c_attn"], "CAUSAL_LM", {"fan_in_fan_out": True}),
        ("classifier", ["query", "dense"], "SEQ_CLS", {}),
        ("classifier", ["query", "dense"], "SEQ_CLS", {"bias": "all"}),
    ],
)
def test_an_adapter_is_merged_like_the_whole_model_it_makes(
    folder, tmp_path, kind, targets, task, settings
):
    own = folder / kind
    if kind == "classifier":
        model = BertForSequenceClassification.from_pretrained(own / "base", num_labels=3)
        # The pooler is new in the classifier, like its head; peft has it trained only if told to.
        settings = settings | {
            "modules_to_save": ["pooler", "classifier"], "exclude_modules": r".*pooler.*",
        }  # fmt: skip
    else:
        model = CLASSES[kind].from_pretrained(own / "base")
    lora(tmp_path, model, targets, task, **settings)
    words = ["--keep", folder / "keep.txt", "--learn", folder / "first.txt", *LOOK, "--out"]
    one = merge(own, tmp_path / "adapter", *words, tmp_path / "one")
    other = merge(own, tmp_path / "whole", *words, tmp_path / "other")
    assert_close(tensors(tmp_path / "one"), tensors(tmp_path / "other"), 1e-4)
    assert one["filtered"] == other["filtered"] > 0
    assert (tmp_path / "one" / "tokenizer.json").exists()
    kinds = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("one", "other")]
    assert kinds[0]["architectures"] == kinds[1]["architectures"]
    if task == "SEQ_CLS":
        loaded = BertForSequenceClassification.from_pretrained(tmp_path / "one")
        assert loaded.classifier.weight.shape[0] == 3


def test_the_tokenizer_beside_an_adapter_is_the_merged_models(folder, tmp_path):
    own, adapter = folder / "llama", tmp_path / "adapter"
    lora(tmp_path, LlamaForCausalLM.from_pretrained(own / "base"), ["q_proj"], "CAUSAL_LM")
    write_tokenizer(adapter)
    files = {"chat_template.jinja": "of chats", "additional_chat_templates/tool.jinja": "of tools"}
    files |= {"tokenizer.model": "pieces", "vocab.txt": "words", "added_tokens.json": "{}"}
    for name, content in files.items():
        (adapter / name).parent.mkdir(exist_ok=True)
        (adapter / name).write_text(content)
    merge(own, adapter, *FEW, "--out", tmp_path / "out")
    assert {name: (tmp_path / "out" / name).read_text() for name in files} == files


def test_an_adapter_of_a_tied_model_may_have_saved_its_embeddings(folder, tmp_path):
    settings = CONFIGS["llama"].to_dict() | {"tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.5)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    adapted.merge_and_unload().save_pretrained(tmp_path / "whole")
    words = ["--keep", "random", *LOOK, "--out"]
    merge(tmp_path, tmp_path / "adapter", *words, tmp_path / "one")
    merge(tmp_path, tmp_path / "whole", *words, tmp_path / "other")
    assert_close(tensors(tmp_path / "one"), tensors(tmp_path / "other"), 1e-4)


@pytest.mark.parametrize(
    ("targets", "saved", "others"),
    [
        (["c_attn"], ["wte"], "transformer.wte.weight is tied to lm_head.weight"),
        (["c_attn"], ["lm_head"], "lm_head.weight is tied to transformer.wte.weight"),
        (["c_attn", "wte"], None, "transformer.wte.weight is tied to lm_head.weight"),
    ],
)
def test_an_adapter_that_changes_one_of_tied_parameters_is_refused(
    folder, tmp_path, capsys, targets, saved, others
):
    base = folder / "gpt2" / "base"
    config = LoraConfig(
        r=2, target_modules=targets, modules_to_save=saved, init_lora_weights=False,
        fan_in_fan_out=True,
    )  # fmt: skip
    get_peft_model(GPT2LMHeadModel.from_pretrained(base), config).save_pretrained(tmp_path)
    line = refusal(capsys, base, tmp_path, "--out", tmp_path / "out")
    assert others in line
    assert "merge it with peft first" in line


def test_an_adapter_with_biases_of_its_own_is_refused(folder, tmp_path, capsys):
    model = LlamaForCausalLM(LlamaConfig(**CONFIGS["llama"].to_dict() | {"attention_bias": True}))
    model.save_pretrained(tmp_path / "base")
    lora(tmp_path, model, ["q_proj"], "CAUSAL_LM", lora_bias=True)
    line = refusal(capsys, tmp_path / "base", tmp_path / "adapter", "--out", tmp_path / "out")
    assert "has lora_bias; merge it with peft first" in line


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda"])
def test_an_adapter_that_has_changed_the_base_weights_is_refused(folder, tmp_path, capsys, init):
    base = folder / "llama" / "base"
    config = LoraConfig(r=2, target_modules=["q_proj"])
    get_peft_model(LlamaForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": init}))
    line = refusal(capsys, base, tmp_path, "--out", tmp_path / "out")
    assert f"init_lora_weights = '{init}' has changed the base weights" in line
    known = "path_initial_model_for_weight_conversion" if init == "corda" else "merge_and_unload()"
    assert known in line


def test_a_new_head_of_an_adapter_has_the_dtype_of_weights(folder, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(folder / "gpt2" / "base", base)
    weights = load_file(base / "model.safetensors")
    mask = {"transformer.a_mask": torch.ones(2, 2, dtype=torch.bool)}
    save_file(mask | weights, base / "model.safetensors", {"format": "pt"})
    config = LoraConfig(r=2, target_modules=["c_attn"], task_type="SEQ_CLS", fan_in_fan_out=True)
    adapted = get_peft_model(GPT2ForSequenceClassification.from_pretrained(base), config)
    adapted.save_pretrained(tmp_path / "adapter")
    read = Adapter(str(tmp_path / "adapter"), Folder(str(base)))
    assert read.stored["score.weight"].dtype == torch.float32
    head = adapted.base_model.model.score.modules_to_save["default"].weight
    assert torch.equal(read.read("score.weight"), head)


def test_an_adapter_that_has_buffers_is_read_with_them(folder, tmp_path):
    if not hasattr(peft, "DeloraConfig"):
        pytest.skip("this peft has no DeLoRA")
    base = folder / "llama" / "base"
    adapted = get_peft_model(
        LlamaForCausalLM.from_pretrained(base),
        peft.DeloraConfig(r=2, target_modules=["q_proj"], init_weights=False),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "whole")
    read = Adapter(str(tmp_path / "adapter"), Folder(str(base)))
    for _ in range(2):  # to read changes nothing
        found = {name: read.read(name).double().numpy() for name in read.stored}
        assert_close(found, tensors(tmp_path / "whole"))


def test_an_adapter_has_the_statistics_of_norms(tmp_path):
    torch.manual_seed(0)
    sizes = {"embedding_size": 4, "hidden_sizes": [4], "depths": [1], "layer_type": "basic"}
    model = ResNetForImageClassification(ResNetConfig(**sizes, num_labels=3))
    for buffer in model.buffers():
        buffer.add_(torch.arange(buffer.numel()).view_as(buffer) + 1)
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["convolution"], init_lora_weights=False)
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "whole")
    read = Adapter(str(tmp_path / "adapter"), Folder(str(tmp_path / "base")))
    whole = tensors(tmp_path / "whole")
    assert read.stored.keys() == whole.keys()
    for name, value in whole.items():
        np.testing.assert_allclose(read.read(name), value, atol=1e-5)


def test_an_adapter_that_lacks_what_it_is_merged_with_is_refused(folder, tmp_path, capsys):
    base = folder / "llama" / "base"
    config = OFTConfig(oft_block_size=4, target_modules=["q_proj"])
    get_peft_model(LlamaForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path)
    line = refusal(capsys, base, tmp_path, "--out", tmp_path / "out")
    assert "lacks base_model.model.model.layers.0.self_attn.q_proj.oft_R.rows" in line
    assert "merge it with peft first" in line
