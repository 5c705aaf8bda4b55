"""A tiny Llama-like model with everything that is awkward, its batches, rates and configuration;
and tiny models whose matrices lie otherwise."""

from contextlib import nullcontext
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
import transformers
from ranks import device
from transformers import LlamaConfig, LlamaForCausalLM

GLOBAL_BATCH = 24
# Large, so that weights before minus after hold the gradient to full float32 precision.
SGD_RATES = (64.0, 32.0)
ADAM_RATES = (1e-3, 5e-4)
EXCLUDED = ("embed", "lm_head", "classifier", "pooler")


def llama_config(**changes: Any) -> LlamaConfig:
    """Three blocks whose shapes are odd, so that shard boundaries cut rows."""
    shape = {"hidden_size": 24, "intermediate_size": 37, "num_attention_heads": 4}
    return LlamaConfig(**{"vocab_size": 53, "num_hidden_layers": 3, **shape, **changes})


class TinyLlama(torch.nn.Module):
    """Grouped-query attention, tied embedding, a frozen and an unused parameter, odd shapes."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.llama = LlamaForCausalLM(llama_config(num_key_value_heads=2, tie_word_embeddings=True))
        self.spare = torch.nn.Linear(24, 5)  # never used: no gradient
        self.llama.model.layers[1].mlp.down_proj.weight.requires_grad_(False)
        up = self.llama.model.layers[0].mlp.up_proj.weight
        out = self.llama.model.layers[2].self_attn.o_proj.weight
        whole = nullcontext()
        if hasattr(up, "ds_id"):  # made under zero.Init
            whole = deepspeed.zero.GatheredParameters([up, out], modifier_rank=0)
        with torch.no_grad(), whole:
            if up.numel() > 0:
                up[7] = up[3]  # rows at equal distance
                out[5] = 0  # a row without direction
        self.to(dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.llama(input_ids=tokens, labels=tokens).loss


class Shortened(TinyLlama):
    """A step may leave out the last block."""

    def forward(self, tokens: torch.Tensor, blocks: int = 3) -> torch.Tensor:
        self.llama.config.num_hidden_layers = blocks
        return self.llama(input_ids=tokens, labels=tokens).loss


def gpt2() -> transformers.GPT2LMHeadModel:
    """Two blocks, whose matrices are (inputs, outputs)."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_embd=8, n_head=2, vocab_size=13, n_positions=8,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def skip_without_stacked_experts() -> None:
    """Leaves a test out where transformers has no choice of how experts are computed."""
    if not hasattr(transformers.PreTrainedModel, "set_experts_implementation"):
        pytest.skip("this release of transformers keeps experts as layers one by one")


def experts(kind: str) -> torch.nn.Module:
    """Two blocks of four stacked experts: `Mixtral`, `Qwen3Moe`, `Olmoe` or `GptOss`."""
    skip_without_stacked_experts()
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 13, "hidden_size": 12, "intermediate_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts_per_tok": 1,
    }  # fmt: skip
    of_kind: dict[str, int | None] = {
        "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 8, "head_dim": 4},
        "Olmoe": {"num_experts": 4, "pad_token_id": None},
    }.get(kind, {"num_local_experts": 4, "head_dim": 4})
    config = getattr(transformers, f"{kind}Config")(**sizes, **of_kind)
    model: torch.nn.Module = getattr(transformers, f"{kind}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter)
        if name.endswith(("gate.weight", "router.weight")):
            torch.nn.init.normal_(parameter)
    return model


def parameter_groups(
    model: torch.nn.Module, rates: tuple[float, float] = SGD_RATES
) -> list[dict[str, Any]]:
    """Two groups with different learning rates; matrices and vectors mixed into both."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    parts = trainable[::3] + trainable[1::3], trainable[2::3]
    return [{"params": part, "lr": rate} for part, rate in zip(parts, rates, strict=True)]


def learning_rates(model: torch.nn.Module) -> dict[str, float]:
    name_of = {id(p): n for n, p in model.named_parameters()}
    return {name_of[id(p)]: g["lr"] for g in parameter_groups(model) for p in g["params"]}


def deepspeed_config(stage: int, **changes: Any) -> dict[str, Any]:
    world_size = dist.get_world_size()
    accumulation = changes.pop("gradient_accumulation_steps", 1)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // world_size // accumulation,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, **changes.pop("zero_optimization", {})},
        "zero_allow_untested_optimizer": True,
    }
    return {**config, **changes}


def batches(accumulation: int, step: int = 0) -> list[torch.Tensor]:
    """This rank's micro-batches of one step; together over ranks always the same sequences."""
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(0, 53, (GLOBAL_BATCH, 9), generator=generator)
    own = tokens[dist.get_rank() :: dist.get_world_size()].to(device())
    return list(own.chunk(accumulation))


def is_filtered(name: str) -> bool:
    return not any(word in name for word in EXCLUDED)
