"""What all DeepSpeed engines share: the hooks, the step, the monitor, what is refused.

`before_step` wraps `engine._take_model_step`: it runs only at the accumulation boundary, before
overflow check, norm and clipping. (An optimizer pre-step hook would come after clipping, and
once per parameter group.) `after_update` has its place in the step of each kind of optimizer.
"""

import inspect
from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from spectral_ds.engines.base import (
    Engine,
    UnsupportedEngineError,
    canonical_name,
    learning_rate_of,
)
from spectral_ds.engines.hooks import WrappedMethod, require_method
from spectral_ds.engines.used import UsedParameters
from spectral_ds.sharding import Communicator, Fragment

HOOKED = "_take_model_step"
# In a checkpoint: the folder of the plugin's state, and its mark in the client state.
FOLDER = "spectral_ds"


class DeepSpeedEngine(Engine):
    """Base of the adapters for a `deepspeed.DeepSpeedEngine`.

    A subclass says where gradients and weights live, and when they have been updated.

    Args:
        engine: the user's engine.
        group: the ranks over which its parameters are sharded or replicated.
    """

    def __init__(self, engine: Any, group: Any) -> None:
        self._engine = engine
        self._optimizer = engine.optimizer
        self._handles: list[Any] = []
        self.holders = (engine, engine.module)
        self.everyone = Communicator(group, torch.device(engine.device))
        self.communicator = self.everyone
        self.fragments: list[Fragment] = []
        # Of each fragment: its parameter; the index of the optimizer's parameter group; where in
        # the optimizer it is, as the subclass counts.
        self._parameters: list[torch.nn.Parameter] = []
        self._groups: list[int] = []
        self._places: list[tuple[int, ...]] = []
        # DeepSpeed keeps the float32 gradient on the CPU, and norms that it took during backward.
        self._is_offloaded = False
        # The gradient of a parameter that a step does not use is that of an earlier step, or zeros.
        self._keeps_old_gradients = False
        self._used: UsedParameters | None = None
        self._named = {canonical_name(n): p for n, p in engine.module.named_parameters()}
        self._name_of = {id(parameter): name for name, parameter in self._named.items()}

    def _add_fragment(
        self,
        parameter: torch.nn.Parameter,
        start: int,
        length: int,
        group: int,
        place: tuple[int, ...],
    ) -> None:
        self.fragments.append(Fragment(self._name_of[id(parameter)], start, length))
        self._parameters.append(parameter)
        self._groups.append(group)
        self._places.append(place)

    def _shapes_of(self, trained: set[int]) -> dict[str, tuple[int, ...]]:
        """Full shapes of the parameters with these ids, in model order."""
        return {
            name: tuple(getattr(parameter, "ds_shape", parameter.shape))
            for name, parameter in self._named.items()
            if id(parameter) in trained and getattr(parameter, "ds_numel", parameter.numel()) > 0
        }

    @property
    def config_section(self) -> Any:
        return self._engine.config.get("spectral_ds")

    @property
    def step(self) -> int:
        return int(self._engine.global_steps)

    @property
    def skipped_steps(self) -> int:
        return int(self._engine.skipped_steps)

    @property
    def loss_scale(self) -> float:
        # Under torch_autocast in float16, torch keeps the scale, on the device.
        scaler = getattr(self._engine, "torch_autocast_z0_gradscaler", None) or getattr(
            self._optimizer, "torch_autocast_gradscaler", None
        )
        if scaler is not None:
            return float(scaler.get_scale())
        return float(getattr(self._optimizer, "loss_scale", None) or 1.0)

    def learning_rates(self) -> list[float]:
        groups = self._optimizer.param_groups
        return [learning_rate_of(groups[group]) for group in self._groups]

    def _has_gradient(self, parameter: torch.nn.Parameter) -> bool:
        """Whether the parameter got a gradient since the last step."""
        return self._used is None or parameter in self._used

    def gradients_changed(self) -> None:
        if self._is_offloaded:
            norms = self._optimizer.norm_for_param_grads
            for parameter, gradient in zip(self._parameters, self.gradients(), strict=True):
                if gradient is not None:
                    norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)
                    norms[self._optimizer.get_param_id(parameter)] = norm

    def install(
        self, before_step: Callable[[], None], after_update: Callable[[], None] | None = None
    ) -> None:
        def take_model_step(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            before_step()
            if self._used is not None:
                self._used.clear()
            return original(*args, **kwargs)

        self._handles = []
        if after_update is not None:
            self._handles.append(self._call_after_update(after_update))
        if self._keeps_old_gradients:
            self._used = UsedParameters(self._parameters)
            self._handles.append(self._used)
        self._handles.append(WrappedMethod(self._engine, HOOKED, take_model_step))

    def watch_loss(self, observe: Callable[[torch.Tensor], None]) -> None:
        def backward(original: Callable[..., Any], loss: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(loss, torch.Tensor):
                # The caller may have divided it already; the whole loss is told.
                divides = kwargs.get("scale_wrt_gas", args[1] if len(args) > 1 else True)
                parts = 1 if divides else self._engine.gradient_accumulation_steps()
                observe(loss.detach() * parts)
            return original(loss, *args, **kwargs)

        self._handles.append(WrappedMethod(self._engine, "backward", backward))

    def carry(
        self,
        save: Callable[[Path], None],
        load: Callable[[Path, bool, int], None],
        begin_anew: Callable[[], None],
    ) -> None:
        """See `Engine.carry`; the state is in `<tag>/spectral_ds`.

        It is written before DeepSpeed's own files, and these before DeepSpeed names the newest tag.
        A crash on the way leaves the newest tag as it was, if the tag being written is another. If
        a tag is written again, a crash may leave the state of one step with files of another, which
        `load` refuses.
        """
        engine = self._engine
        signature = inspect.signature(engine.load_checkpoint)

        def save_checkpoint(
            original: Callable[..., Any],
            save_dir: Any,
            tag: Any = None,
            client_state: Mapping[str, Any] | None = None,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            tag = f"global_step{engine.global_steps}" if tag is None else tag
            save(Path(save_dir, str(tag), FOLDER))
            marked = {**(client_state or {}), FOLDER: {"tag": str(tag)}}
            return original(save_dir, tag, marked, *args, **kwargs)

        def load_checkpoint(
            original: Callable[..., Any], load_dir: Any, tag: Any = None, *args: Any, **kwargs: Any
        ) -> Any:
            path, client_state = original(load_dir, tag, *args, **kwargs)
            given = signature.bind(load_dir, tag, *args, **kwargs).arguments
            if path is None:
                return path, client_state
            if given.get("load_module_only", False):  # DeepSpeed does not set its step either
                begin_anew()
            else:
                mark = (client_state or {}).get(FOLDER)
                folder = Path(path).parent / FOLDER
                if mark and not folder.is_dir():
                    # A universal checkpoint lies beside the one that it was made from.
                    folder = Path(load_dir, mark["tag"], FOLDER)
                load(folder, mark is not None, self.step)
            return path, client_state

        self._handles += [
            WrappedMethod(engine, "save_checkpoint", save_checkpoint),
            WrappedMethod(engine, "load_checkpoint", load_checkpoint),
        ]

    @abstractmethod
    def _call_after_update(self, after_update: Callable[[], None]) -> Any:
        """Have `after_update` called at its place in the optimizer's step; the handle of it."""

    def _call_after_last_group(
        self,
        after_update: Callable[[], None],
        count: int,
        copy_to_low_precision: Callable[[int], None],
    ) -> Any:
        """`_call_after_update` where the optimizer steps group by group, copying each at once.

        Called after the step of the last group; then the others are copied again.

        Args:
            after_update: the hook.
            count: the number of groups.
            copy_to_low_precision: copies a group's float32 weights to this rank's part of the
                parameters.
        """
        if getattr(self._optimizer, "torch_autocast_gradscaler", None) is not None:
            raise UnsupportedEngineError(
                "spectral_ds does not support acting on updates under torch_autocast in float16, "
                "where each parameter group may skip a step by itself; use bfloat16"
            )

        def optimizer_step(original: Callable[..., Any], group: int) -> None:
            original(group)
            if group == count - 1:
                after_update()
                for earlier in range(group):
                    copy_to_low_precision(earlier)

        return WrappedMethod(self._optimizer, "_optimizer_step", optimizer_step)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def batch_size(self) -> int | None:
        return int(self._engine.train_batch_size())

    @property
    def board_step(self) -> int:
        # Where DeepSpeed puts its own scalars of this step, after having counted its samples.
        return int(self._engine.global_samples + self._engine.train_batch_size())

    @property
    def summary_writer(self) -> Any:
        return getattr(self._engine.monitor.tb_monitor, "summary_writer", None)

    @property
    def has_monitor(self) -> bool:
        return bool(self._engine.monitor.enabled)

    def write(self, metrics: Mapping[str, float]) -> None:
        if self.has_monitor:
            samples = self.board_step
            self._engine.monitor.write_events(
                [(f"spectral_ds/{name}", value, samples) for name, value in metrics.items()]
            )


def refuse_unsupported(engine: Any) -> None:
    """Raise UnsupportedEngineError for the first thing in use that is not supported."""
    from deepspeed.runtime.pipe.engine import PipelineEngine

    config = engine._config
    zero = config.zero_config
    devices = {
        str(getattr(getattr(zero, key, None), "device", None)).rpartition(".")[2]
        for key in ("offload_optimizer", "offload_param")
    }
    reasons = {
        "pipeline parallelism": isinstance(engine, PipelineEngine),
        "mixture-of-experts layers": engine.has_moe_layers,
        "tensor or model parallelism": engine.mp_world_size > 1,
        "ZenFlow; remove zero_optimization.zenflow": bool(engine.zenflow),
        "SuperOffload; remove zero_optimization.offload_optimizer.super_offload": (
            engine.super_offload()
        ),
        "NVMe swapping; set the offload device to cpu": "nvme" in devices,
        "MiCS; remove zero_optimization.mics_shard_size": getattr(zero, "mics_shard_size", -1) > 0,
        "hpZ; remove zero_optimization.zero_hpz_partition_size": (
            getattr(zero, "zero_hpz_partition_size", 1) > 1
        ),
        "DeepCompile; set compile.deepcompile to false": getattr(
            getattr(config, "compile_config", None), "deepcompile", False
        ),
        "managed_gradient_accumulation: false, where each step may be of another number of "
        "micro-batches; set it to true": not getattr(config, "managed_gradient_accumulation", True),
        "DeepSpeed's Muon optimizer, which runs inside the step": "muon"
        in type(engine.basic_optimizer).__name__.lower(),
        "fp16 in ZeRO stage 0, where DeepSpeed divides the gradient by a loss scale that it never "
        "applied; use stage 1, 2 or 3, or bf16": (
            engine.fp16_enabled() and engine.zero_optimization_stage() == 0
        ),
    }
    for reason, in_use in reasons.items():
        if in_use:
            raise UnsupportedEngineError(f"spectral_ds does not support {reason}")
    require_method(engine, HOOKED)
