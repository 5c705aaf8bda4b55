"""SpectralCallback: the plugin in the Trainer of transformers, by one more callback.

In: a `Trainer` with the callback. Out: its training filtered, before it clips, whatever engine it
trains with; the plugin's metrics in its logs; the plugin's state in its checkpoints.
"""

import functools
import os
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from spectral_ds.attach import plugin_of
from spectral_ds.attach.live import live
from spectral_ds.attach.runner import VARIABLE, Runner, config_of_environment, say
from spectral_ds.config import SpectralConfig, SpectralConfigError, load_config
from spectral_ds.engines.hooks import WrappedMethod
from spectral_ds.engines.wrappers import stepping_optimizer
from spectral_ds.plugin import SpectralPlugin

PREFIX = "spectral_ds/"
# In a checkpoint of the Trainer: the plugin's state, where the engine has no checkpoints.
FOLDER = "spectral_ds"


class SpectralCallback(TrainerCallback):
    """Attaches a plugin when training begins and detaches it when training ends.

    `Trainer(..., callbacks=[SpectralCallback({"preset": "retain"})])` trains as before, in one
    process, with DDP, FSDP2 or DeepSpeed.

    Args:
        config: see `load_config`; by default what the environment variable SPECTRAL_DS_CONFIG
            names, or else the section of the Trainer's DeepSpeed config.

    Raises:
        SpectralConfigError: the configuration is wrong; when training begins, there is none.
        UnsupportedEngineError: when training begins, the Trainer's engine is not supported.
        RuntimeError: when training begins, another optimizer of the model has a plugin; or it
            resumes, and the callback was added after the Trainer was made.
    """

    def __init__(
        self, config: Mapping[str, Any] | str | os.PathLike[str] | SpectralConfig | None = None
    ) -> None:
        given = isinstance(config, SpectralConfig) or config is None
        self._config: SpectralConfig | None = config if given else load_config(config)  # type: ignore[arg-type, assignment]
        self._runner: Runner | None = None
        self._handles: list[Any] = []
        self._plugin: weakref.ref[SpectralPlugin] | None = None
        self._logged_step = -1.0
        self._tellers: weakref.WeakSet[Trainer] = weakref.WeakSet()  # say when `train` is called
        self._resumed_from: Path | None = None  # the folder from which training resumes, if named

    @property
    def plugin(self) -> SpectralPlugin | None:
        """What is attached; None outside of training."""
        plugin = None if self._plugin is None else self._plugin()
        return plugin if plugin is not None and plugin.attached else None

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        # Events tell neither from which checkpoint training resumes nor that it was interrupted.
        trainer = self._trainer(state)
        WrappedMethod(trainer, "train", self._train)
        self._tellers.add(trainer)

    def _train(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs.get("resume_from_checkpoint")
        self._resumed_from = Path(given) if isinstance(given, str | os.PathLike) else None
        try:
            return original(*args, **kwargs)
        finally:
            self._close()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        trainer = self._trainer(state)
        model = trainer.model_wrapped
        self._close()  # an attempt that was cut off
        if state.global_step > 0 and trainer not in self._tellers:
            raise RuntimeError(
                "SpectralCallback: add_callback() does not tell it from which checkpoint training "
                "resumes; give it in Trainer(..., callbacks=[...])"
            )
        is_deepspeed = trainer.is_deepspeed_enabled
        # By `spectral_ds.run`, or by hand.
        plugin = plugin_of(model if is_deepspeed else stepping_optimizer(trainer.optimizer))
        if plugin is None:
            plugin = self._attach(trainer, model)
        if plugin is None:
            return
        save = functools.partial(self._save, trainer)
        self._handles.append(WrappedMethod(trainer, "_save_checkpoint", save))
        self._plugin = weakref.ref(plugin)
        self._logged_step = -1.0
        self._join_logs(trainer.callback_handler.callbacks)
        if self._runner is not None and state.global_step > 0:
            self._resume(plugin, args, state.global_step)

    def _attach(self, trainer: Any, model: Any) -> SpectralPlugin | None:
        config = self._config or config_of_environment()
        if config is None and not trainer.is_deepspeed_enabled:
            raise SpectralConfigError(
                f"SpectralCallback: no config was given, and {VARIABLE} is not set"
            )
        optimizer = None if trainer.is_deepspeed_enabled else trainer.optimizer
        self._runner = Runner(config)
        plugin = self._runner.attach(model, optimizer, writes_metrics=True)
        self._runner.watch_clipping()
        return plugin

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        metrics = {} if self.plugin is None else self.plugin.metrics()
        if logs is None or "loss" not in logs or metrics.get("step", -1.0) == self._logged_step:
            return
        self._logged_step = metrics["step"]
        named = {PREFIX + name: value for name, value in metrics.items()}
        logs |= named
        if state.log_history:
            state.log_history[-1] |= named

    def _save(self, trainer: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """First the plugin's state: a checkpoint that is whole has it, however it came to be."""
        plugin = self.plugin
        is_saved = plugin is not None and plugin.config.checkpoint.enabled
        # DeepSpeed's own checkpoints, in the same folder, carry it.
        if plugin is not None and is_saved and plugin.engine.checkpoints is None:
            trial = kwargs["trial"] if "trial" in kwargs else args[1]
            of_run = Path(trainer._get_output_dir(trial))
            plugin.save(_checkpoint(of_run, trainer.state.global_step) / FOLDER)
        return original(*args, **kwargs)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._close()

    def _close(self) -> None:
        """Detach, and restore what was wrapped."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._runner is not None:
            self._runner.stop()
        self._runner = self._plugin = None

    def _trainer(self, state: TrainerState) -> Any:
        """The Trainer, which callbacks are not given; several may share this one."""
        for trainer in [*self._tellers, *live(Trainer)]:
            if getattr(trainer, "state", None) is state:
                return trainer
        raise RuntimeError("SpectralCallback: no Trainer that is alive has the state of this event")

    def _join_logs(self, callbacks: list[Any]) -> None:
        """Come first in every event, so that all others are given the metrics; not the console."""
        callbacks.remove(self)
        callbacks.insert(0, self)

        def on_log(
            original: Callable[..., Any],
            args: Any,
            state: Any,
            control: Any,
            logs: dict[str, Any] | None = None,
            **kwargs: Any,
        ) -> Any:
            shown = {k: v for k, v in (logs or {}).items() if not k.startswith(PREFIX)}
            return original(args, state, control, logs=shown, **kwargs)

        self._handles += [
            WrappedMethod(callback, "on_log", on_log)
            for callback in callbacks
            if isinstance(callback, PrinterCallback | ProgressCallback)
        ]

    def _resume(self, plugin: SpectralPlugin, args: TrainingArguments, step: int) -> None:
        """Go on from the state in the checkpoint that the Trainer has resumed from (collective)."""
        checkpoint = self._resumed_from or _checkpoint(Path(str(args.output_dir)), step)
        newest = checkpoint / "latest"  # DeepSpeed's, with the name of its tag
        tag = newest.read_text("utf-8").strip() if newest.is_file() else ""
        folder = checkpoint / tag / FOLDER
        is_there = plugin.engine.everyone.maximum(float(folder.is_dir())) > 0
        if plugin.config.checkpoint.enabled and is_there:
            plugin.load(folder)
            return
        plugin.engine.restore_step(step)
        say(f"{checkpoint} has no state of the plugin; graph and reference are made of its weights")


def _checkpoint(of_run: Path, step: int) -> Path:
    return of_run / f"checkpoint-{step}"
