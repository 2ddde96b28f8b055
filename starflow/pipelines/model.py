"""Flow as a component of a pipeline."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin

from ..errors import CheckpointError, ConfigError
from ..io.files import permit_reading
from ..models.calibration import read_calibration, save_calibration
from ..models.checkpoint import read_notice, save_notice
from ..models.config import FlowConfig
from ..models.flow import Flow


class FlowModel(ModelMixin, Flow, ConfigMixin):
    """A `Flow` that diffusers saves and loads, with the same names of weights.

    `save_pretrained` and `from_pretrained` take the arguments of diffusers: several weight files (max_shard_size),
    variants, dtype, device_map. They include the calibration and the notice. Weights or settings that do not fit raise
    CheckpointError.

    Args:
        fields: the fields of `FlowConfig`.
    """

    # model_index.json names this module, so that files inside this package can move.
    __module__ = "starflow.pipelines"
    # Whole blocks run in one call of an op: accelerate must not split them.
    _no_split_modules = ("FlowBlock",)
    # The device of diffusers is meta while accelerate offloads weights.
    device = Flow.device

    def __init__(self, **fields: Any):
        config = FlowConfig.from_dict(fields)
        self.register_to_config(**config.to_dict())
        Flow.__init__(self, config)
        self._gradient_checkpointing_func = None

    # diffusers reads the names of the settings from this signature.
    __init__.__signature__ = inspect.Signature(
        [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)]
        + [
            inspect.Parameter(
                f.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if f.default is dataclasses.MISSING else f.default,
            )
            for f in dataclasses.fields(FlowConfig)
        ]
    )

    @property
    def config(self) -> FlowConfig:
        """Configuration of the flow."""
        return self._flow_config

    @config.setter
    def config(self, config: FlowConfig) -> None:
        self._flow_config = config

    @classmethod
    def from_flow(cls, flow: Flow) -> FlowModel:
        """Return the same flow as a FlowModel; both share the weights."""
        with torch.device("meta"):
            model = cls(**flow.config.to_dict())
        model.load_state_dict(flow.state_dict(), assign=True)
        model.calibration, model.notice = flow.calibration, flow.notice
        return model.train(flow.training)

    @classmethod
    def from_config(cls, config: dict[str, Any], *arguments, **options):
        """Build a model of the mapping in a config.json, strictly.

        Args:
            config: the mapping.
            arguments: see `diffusers.ConfigMixin.from_config`.
            options: see `diffusers.ConfigMixin.from_config`.

        Raises:
            CheckpointError: a setting is unknown, missing or out of range.
        """
        fields = {name: value for name, value in config.items() if not name.startswith("_")}
        try:
            FlowConfig.from_dict({**fields, **{k: v for k, v in options.items() if k in cls._get_init_keys(cls)}})
        except ConfigError as error:
            raise CheckpointError(f"config of the flow: {error}") from None
        return super().from_config(config, *arguments, **options)

    @classmethod
    @torch.inference_mode(False)
    def from_pretrained(cls, folder, **options):
        """Read a folder that `save_pretrained` wrote.

        Args:
            folder: the folder.
            options: see `diffusers.ModelMixin.from_pretrained`. The weights are copied, so that the files may change
                later; disable_mmap=False maps the files.

        Raises:
            CheckpointError: a file is missing or damaged, or the weights do not fit the configuration.
        """
        options.setdefault("disable_mmap", True)
        wants_info = options.pop("output_loading_info", False)
        try:
            model, info = super().from_pretrained(folder, output_loading_info=True, **options)
        except CheckpointError:
            raise
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{folder}: {' '.join(str(error).split())}") from None
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info.get(problem):
                names = ", ".join(map(str, sorted(info[problem])[:3]))
                raise CheckpointError(f"{folder}: {problem.replace('_', ' ')} {names}: weights do not fit config.json")
        folder = Path(folder, options.get("subfolder") or "")
        model.calibration, model.notice = read_calibration(folder, model.config), read_notice(folder)
        return (model, info) if wants_info else model

    def enable_layerwise_casting(self, *arguments, **options):
        """Raise ConfigError: weights in one byte are the option `quantize` of a call."""
        raise ConfigError(
            "a flow has no layerwise casting: quantize='int8' or 'fp8' of a call holds its weights in one byte"
        )

    # Pipelines pass every option of diffusers on.
    @functools.wraps(ModelMixin.enable_group_offload)
    def enable_group_offload(self, *arguments, **options):
        """Offload blocks or layers, see `diffusers.ModelMixin.enable_group_offload`.

        Raises:
            ConfigError: a group holds several blocks, or groups are prefetched on a stream.
        """
        call = inspect.signature(ModelMixin.enable_group_offload).bind(self, *arguments, **options)
        call.apply_defaults()
        kind, blocks, stream = (call.arguments[name] for name in ("offload_type", "num_blocks_per_group", "use_stream"))
        # diffusers loads several blocks, or the next one, in the order of the density direction; sampling reverses it.
        if stream or (kind == "block_level" and blocks != 1):
            raise ConfigError("group offloading: a flow takes num_blocks_per_group=1 and use_stream=False")
        super().enable_group_offload(*arguments, **options)

    # Pipelines look at the signature for the options that they pass on.
    @functools.wraps(ModelMixin.save_pretrained)
    def save_pretrained(self, folder, *arguments, **options):
        """Write weights, configuration and calibration, see `diffusers.ModelMixin.save_pretrained`."""
        super().save_pretrained(folder, *arguments, **options)
        permit_reading(folder)
        save_calibration(self.calibration, folder)
        save_notice(self.notice, folder)
