"""DeepSpeed ZeRO stages 1 and 2: gradients live in flat partitions, one a parameter group.

The hook wraps `engine._take_model_step`: it runs only at the accumulation boundary, before
overflow check, norm and clipping. (An optimizer pre-step hook would come after clipping, and
once per parameter group.)
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from spectral_ds.engines.base import Engine, UnsupportedEngineError
from spectral_ds.sharding import Communicator, Fragment

HOOKED = "_take_model_step"


class DeepSpeedZeroEngine(Engine):
    """Fragments of a `deepspeed.DeepSpeedEngine` with `DeepSpeedZeroOptimizer`, on the device.

    Raises:
        UnsupportedEngineError: another stage, offload, or a parallelism that is not supported.
    """

    def __init__(self, engine: Any) -> None:
        _refuse_unsupported(engine)
        self._engine = engine
        self._zero = engine.optimizer
        self._hook: Callable[..., Any] | None = None
        self.holders = (engine, engine.module)
        self.communicator = Communicator(
            self._zero.real_dp_process_group[0], torch.device(engine.device)
        )
        name_of = {id(parameter): name for name, parameter in engine.module.named_parameters()}
        trained = {
            id(parameter) for group in self._zero.bit16_groups for parameter in group
        } & name_of.keys()
        self.shapes = {
            name: tuple(parameter.shape)
            for name, parameter in engine.module.named_parameters()
            if id(parameter) in trained and parameter.numel() > 0
        }
        # (parameter group, offset in this rank's partition) of each fragment.
        self._places: list[tuple[int, int]] = []
        self.fragments: list[Fragment] = []
        for group, parameters in enumerate(self._zero.params_in_partition):
            self._add_fragments(group, parameters, name_of)

    def _add_fragments(
        self, group: int, parameters: list[torch.nn.Parameter], name_of: Mapping[int, str]
    ) -> None:
        """The runs of these parameters in this rank's partition of one parameter group."""
        zero, rank = self._zero, self.communicator.rank
        partition_size = int(zero.partition_size[group])
        for parameter in parameters:
            key = zero.get_param_id(parameter)
            start = int(zero.grad_start_offset[group][rank][key])
            offset = int(zero.grad_partition_insertion_offset[group][rank][key])
            length = min(parameter.numel() - start, partition_size - offset)
            if length > 0:
                self._places.append((group, offset))
                self.fragments.append(Fragment(name_of[id(parameter)], start, length))

    @staticmethod
    def recognizes(candidate: Any) -> bool:
        try:
            from deepspeed import DeepSpeedEngine
        except ImportError:
            return False
        return isinstance(candidate, DeepSpeedEngine)

    @property
    def config_section(self) -> Any:
        return self._engine.config.get("spectral_ds")

    @property
    def step(self) -> int:
        return int(self._engine.global_steps)

    def gradients(self) -> list[torch.Tensor]:
        # DeepSpeed's list tiles the partition in the order of `params_in_partition`; what
        # belongs to no parameter is padding.
        count = len(self._zero.params_in_partition)
        tensors = [
            tensor.view(-1)
            for group in range(count)
            for tensor, _ in zip(
                (
                    tensor
                    for tensor in self._zero.averaged_gradients[group]
                    if not getattr(tensor, "_zero_padding", False)
                ),
                self._zero.params_in_partition[group],
                strict=False,
            )
            if tensor.numel() > 0
        ]
        lengths = [fragment.length for fragment in self.fragments]
        assert [tensor.numel() for tensor in tensors] == lengths, "gradients do not tile the shard"
        return tensors

    def weights(self) -> list[torch.Tensor]:
        partitions = self._zero.single_partition_of_fp32_groups
        return [
            partitions[group].detach().view(-1).narrow(0, offset, fragment.length)
            for (group, offset), fragment in zip(self._places, self.fragments, strict=True)
        ]

    def install(self, before_step: Callable[[], None]) -> None:
        original = getattr(self._engine, HOOKED)
        self._previous = self._engine.__dict__.get(HOOKED)

        @functools.wraps(original)
        def take_model_step(*args: Any, **kwargs: Any) -> Any:
            if self._hook is take_model_step:
                before_step()
            return original(*args, **kwargs)

        self._hook = take_model_step
        setattr(self._engine, HOOKED, take_model_step)

    def remove(self) -> None:
        hook, self._hook = self._hook, None
        # If somebody wrapped our wrapper, it stays in their chain and only passes calls on.
        if self._engine.__dict__.get(HOOKED) is hook:
            if self._previous is None:
                delattr(self._engine, HOOKED)
            else:
                setattr(self._engine, HOOKED, self._previous)

    def log(self, message: str) -> None:
        from deepspeed.utils import log_dist

        log_dist(message, ranks=[0])

    def write(self, metrics: Mapping[str, float]) -> None:
        monitor = self._engine.monitor
        if monitor.enabled:
            # Where DeepSpeed puts its own scalars of this step, after having counted its samples.
            samples = self._engine.global_samples + self._engine.train_batch_size()
            monitor.write_events(
                [(f"spectral_ds/{name}", value, samples) for name, value in metrics.items()]
            )


def _refuse_unsupported(engine: Any) -> None:
    """Raise UnsupportedEngineError for the first thing in use that is not supported."""
    from deepspeed.runtime.pipe.engine import PipelineEngine
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    stage = engine.zero_optimization_stage()
    optimizer = engine.optimizer
    config = engine._config
    reasons = {
        f"ZeRO stage {stage}; set zero_optimization.stage to 1 or 2": stage not in (1, 2),
        "fp16; use bf16 or fp32": engine.fp16_enabled(),
        "pipeline parallelism": isinstance(engine, PipelineEngine),
        "mixture-of-experts layers": engine.has_moe_layers,
        "tensor or model parallelism": engine.mp_world_size > 1,
        "ZenFlow; remove zero_optimization.zenflow": bool(engine.zenflow),
        "offload; remove zero_optimization.offload_optimizer": getattr(
            optimizer, "cpu_offload", False
        ),
        "DeepCompile; set compile.deepcompile to false": getattr(
            getattr(config, "compile_config", None), "deepcompile", False
        ),
        "DeepSpeed's Muon optimizer, which runs inside the step": "muon"
        in type(engine.basic_optimizer).__name__.lower(),
    }
    for reason, in_use in reasons.items():
        if in_use:
            raise UnsupportedEngineError(f"spectral_ds does not support {reason}")
    if type(optimizer) is not DeepSpeedZeroOptimizer:
        raise UnsupportedEngineError(
            f"spectral_ds does not support DeepSpeed's {type(optimizer).__name__}; with bf16 and "
            "ZeRO stage 1, remove data_types.grad_accum_dtype"
        )
    if not hasattr(engine, HOOKED):
        raise UnsupportedEngineError(
            f"this DeepSpeed version has no DeepSpeedEngine.{HOOKED}, which spectral_ds wraps; "
            "use DeepSpeed 0.19"
        )
