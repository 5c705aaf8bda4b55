"""Adapters: a folder of peft (LoRA, DoRA, …) on the base model, read as the whole model it makes.

Layer by layer: a base weight is loaded, peft merges the adapter into it, and it is forgotten.
"""

import copy
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spectral_ds.cli.errors import UserError
from spectral_ds.cli.merge.architecture import Architecture, class_of
from spectral_ds.cli.merge.folder import Folder, Stored, dtype_of, fingerprint_of

CONFIG = "adapter_config.json"
# The name that peft gives an adapter.
NAME = "default"
# What it puts before the names of what an adapter has, and into those of what it wraps.
PREFIX, WRAPPED = "base_model.model.", ".base_layer."
# Where tokenizers have chat templates but the first.
MORE_TEMPLATES = "additional_chat_templates"
# What peft keeps of the base weights, and needs to take an adapter out again.
TO_UNMERGE = ("trainable_tokens_original",)
# Values of init_lora_weights that take a part out of the base weights: peft does so again when it
# loads an adapter, but for those that it needs data for.
TAKEN, TAKEN_BY_DATA = ("pissa", "olora", "loftq"), ("corda", "lora_ga")


class Adapter:
    """An adapter as a whole model, in the dtype of the base model.

    Raises:
        UserError: peft is missing, cannot read it, or it changes what the base stores in parts.
    """

    def __init__(self, given: str, base: Folder) -> None:
        self.given, self.path, self._base = given, Path(given), base
        peft = _peft(given)
        self._settings = _read(given, lambda: peft.PeftConfig.from_pretrained(given))
        self._require_base_as_it_is()
        self._saved: dict[str, torch.Tensor] = _read(
            given, lambda: peft.load_peft_weights(given, device="cpu")
        )
        self.config = _config(self._settings, base, self._saved)
        architecture = Architecture.of(self.config, given)
        names = {id(p): name for name, p in architecture.model.named_parameters()}
        # Buffers that are saved too: statistics of norms.
        state = architecture.model.state_dict()
        held = [*architecture.model.named_parameters(), *architecture.model.named_buffers()]
        shapes = {name: tuple(each.shape) for name, each in held if name in state}
        tied = architecture.model.named_parameters(remove_duplicate=False)
        same = {name: names[id(parameter)] for name, parameter in tied}
        self._model: Any = _read(
            given,
            lambda: peft.PeftModel.from_pretrained(
                architecture.model, given, low_cpu_mem_usage=True
            ).get_base_model(),
        )
        self._layers: dict[str, Any] = {}
        self._whole: dict[str, torch.Tensor] = {}
        self._take_others(self._changed(names, shapes, same), shapes, same)
        for path, layer in self._layers.values():
            self._fill(path, layer)
        self._base_name: dict[str, str] = {}
        stored = {}
        inside = {architecture.short(name): name for name in shapes}
        for name, place in architecture.places(base.stored).items():
            full = inside.get(place.parameter)
            if full is None:  # a head that this model lacks
                continue
            if place.pattern and (full in self._layers or full in self._whole):
                raise UserError(
                    f"{given}: changes {full}, which {base.given} stores in parts ({name}); merge "
                    "it with peft first: merge_and_unload() and save_pretrained(NEW)"
                )
            own = name if place.pattern else full
            self._base_name[own] = name
            stored[own] = base.stored[name]
        dtype = dtype_of(base.stored)
        for full in [*self._layers, *self._whole]:
            if full not in stored:
                if full in self._layers:
                    raise UserError(f"{given}: changes {full}, which {base.given} does not have")
                own_dtype = self._whole[full].dtype
                is_number = own_dtype.is_floating_point
                stored[full] = Stored(shapes[full], dtype if is_number else own_dtype)
        self.stored: Mapping[str, Stored] = stored

    def _require_base_as_it_is(self) -> None:
        """Refuse an adapter that does not add to the base weights, but to what it left of them."""
        start = str(getattr(self._settings, "init_lora_weights", ""))
        if start.lower().startswith(TAKEN_BY_DATA):
            raise UserError(
                f"{self.given}: init_lora_weights = {start!r} has changed the base weights, and "
                "peft cannot do so again; save it where it was trained, as plain LoRA: "
                "save_pretrained(NEW, path_initial_model_for_weight_conversion=UNTRAINED)"
            )
        if start.lower().startswith(TAKEN):
            raise self._unread(f"init_lora_weights = {start!r} has changed the base weights")

    def _changed(
        self,
        names: Mapping[int, str],
        shapes: Mapping[str, tuple[int, ...]],
        same: Mapping[str, str],
    ) -> tuple[str, ...]:
        """Find layers that the adapter changes, and modules that it has whole; their paths.

        Args:
            names: of the model's parameters, by their identity.
            shapes, same: see `_take_others`.
        """
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import ModulesToSaveWrapper

        paths = []
        found: dict[str, nn.Module] = dict(self._model.named_modules())
        for path, module in found.items():
            if isinstance(module, BaseTunerLayer):
                weight: Any = getattr(module.get_base_layer(), "weight", None)
                # Another one where the adapter has saved it too.
                name = names.get(id(weight), f"{path}.weight")
                self._require_own(path, name, same)
                if weight is None or name not in shapes:
                    raise self._unread(f"changes {path}, which has no weight of its own")
                self._layers[name] = path, module
                paths.append(f"{path}.")
            elif isinstance(module, ModulesToSaveWrapper):
                for inner in module.modules_to_save[NAME].state_dict():
                    name = f"{path}.{inner}"
                    self._require_own(path, name, same)
                    if (key := f"{PREFIX}{name}") not in self._saved:
                        raise self._unread(f"lacks {key}")
                    self._whole[name] = self._saved[key]
                paths.append(f"{path}.")
        return tuple(paths)

    def _require_own(self, path: str, name: str, same: Mapping[str, str]) -> None:
        """Refuse to change one of two tied parameters: what becomes of the other differs."""
        owner = same.get(name)
        others = [each for each, its in same.items() if its == owner and each != name]
        if others:
            raise self._unread(f"changes {path}, and {name} is tied to {others[0]}")

    def _take_others(
        self,
        paths: tuple[str, ...],
        shapes: Mapping[str, tuple[int, ...]],
        same: Mapping[str, str],
    ) -> None:
        """Take parameters of the model itself that were trained and saved too, such as biases.

        Args:
            paths: of modules whose own parameters are known.
            shapes: of the model's parameters, and of the buffers that it saves.
            same: the one of these that each name is of, also a tied one.
        """
        if getattr(self._settings, "lora_bias", False):
            raise self._unread("has lora_bias")
        for key, value in self._saved.items():
            name = key.removeprefix(PREFIX).replace(WRAPPED, ".")
            name = same.get(name, name)
            if name in self._whole:
                if not torch.equal(value, self._whole[name]):
                    raise self._unread(f"saves two values of {name}")
            elif name in shapes and name not in self._layers:
                if tuple(value.shape) != shapes[name]:
                    raise self._unread(f"saves {name} of another shape than {shapes[name]}")
                self._whole[name] = value
            elif not name.startswith(paths):
                raise self._unread(f"saves {key}, which belongs to no layer that it changes")

    def _unread(self, what: str) -> UserError:
        return UserError(
            f"{self.given}: {what}; merge it with peft first: merge_and_unload() and "
            "save_pretrained(NEW)"
        )

    def read(self, name: str) -> torch.Tensor:
        dtype = self.stored[name].dtype
        if name in self._whole:
            return self._whole[name].to(dtype)
        if name not in self._layers:
            return self._base.read(self._base_name[name])
        path, layer = self._layers[name]
        saved = self._saved.get(f"{PREFIX}{path}{WRAPPED}weight")
        tensor = self._base.read(self._base_name[name]) if saved is None else saved
        # Copies: peft adds in place and remembers it, and a file's tensor may be read again.
        layer = copy.deepcopy(layer)
        own = tensor.to(torch.float32, copy=True)
        layer.get_base_layer().weight = nn.Parameter(own, requires_grad=False)
        with torch.no_grad():
            layer.merge()
        merged: torch.Tensor = layer.get_base_layer().weight.detach().to(dtype)
        return merged

    def _fill(self, path: str, layer: nn.Module) -> None:
        """Put what an adapter has of a layer in place: peft has left it without memory."""
        for name, value in [*layer.named_parameters(), *layer.named_buffers()]:
            parts = name.split(".")
            if NAME not in parts or parts[0] in TO_UNMERGE:
                continue
            at = parts.index(NAME)
            key = PREFIX + ".".join((path, *parts[:at], *parts[at + 1 :]))
            saved = self._saved.get(key, self._saved.get(key.removesuffix(".weight")))
            if saved is None and not isinstance(value, nn.Parameter) and not value.is_meta:
                continue  # a constant, which peft makes anew
            if saved is None or saved.shape != value.shape:
                raise self._unread(f"lacks {key}, or it has another shape")
            owner: Any = layer.get_submodule(".".join(parts[:-1]))
            new = saved.float() if saved.is_floating_point() else saved
            if isinstance(value, nn.Parameter):
                new = nn.Parameter(new, requires_grad=False)
            if isinstance(owner, nn.ParameterDict):
                owner[parts[-1]] = new
            else:
                setattr(owner, parts[-1], new)

    def fingerprint(self) -> str:
        weights = [*self.path.glob("adapter_model.*"), self.path / CONFIG]
        return fingerprint_of(sorted(weights))

    def small_files(self) -> dict[str, Path | str]:
        found = self._base.small_files()
        for each in sorted((*self.path.glob("*"), *self.path.glob(f"{MORE_TEMPLATES}/*"))):
            if each.is_file() and _is_of_tokenizer(each):
                found[each.relative_to(self.path).as_posix()] = each
        with tempfile.TemporaryDirectory() as folder:
            self.config.save_pretrained(folder)
            found["config.json"] = (Path(folder) / "config.json").read_text(encoding="utf-8")
        return found

    def tokenizer_folder(self) -> Path | None:
        own = self.path if (self.path / "tokenizer_config.json").exists() else None
        return own or self._base.tokenizer_folder()

    def whole_model(self, base: nn.Module) -> nn.Module:
        """The model with the adapter merged into it; takes `base`, of the class of `config`."""
        peft = _peft(self.given)
        merged: nn.Module = peft.PeftModel.from_pretrained(base, self.given).merge_and_unload()
        return merged


def _is_of_tokenizer(path: Path) -> bool:
    return (
        "token" in path.name
        or path.suffix in (".jinja", ".model")
        or path.name in ("vocab.txt", "merges.txt", "vocab.json")
    )


def is_adapter(given: str) -> bool:
    """Whether a folder is one of peft."""
    return (Path(given) / CONFIG).exists()


def _peft(given: str) -> Any:
    try:
        import peft
    except ImportError:
        raise UserError(f"{given}: is an adapter and needs: pip install peft") from None
    return peft


def _read(given: str, read: Any) -> Any:
    try:
        return read()
    except Exception as error:  # there is no end to what a broken file raises
        raise UserError(f"{given}: peft cannot read it: {' '.join(str(error).split())}") from error


# The class that peft trains for a task, by what stands in its configuration.
CLASS_OF_TASK = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def _config(settings: Any, base: Folder, saved: Mapping[str, torch.Tensor]) -> Any:
    """The configuration of the model that the adapter was trained on, with its class."""
    import transformers

    config = transformers.AutoConfig.for_model(**json.loads(base.config.to_json_string(False)))
    task = getattr(settings.task_type, "value", settings.task_type)
    if task is None:
        kind = class_of(config)
    else:
        mapping = getattr(transformers, CLASS_OF_TASK[task])._model_mapping
        try:
            kind = mapping[type(config)]
        except KeyError:
            raise UserError(f"{base.given}: transformers has no model of it for {task}") from None
    if task in ("SEQ_CLS", "TOKEN_CLS"):
        heads = [
            each for name, each in saved.items() if HEAD_OF_LABELS.intersection(name.split("."))
        ]
        if heads:
            config.num_labels = len(heads[-1])
    config.architectures = [kind.__name__]
    return config


HEAD_OF_LABELS = frozenset(("classifier", "score"))
