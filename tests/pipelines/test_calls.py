"""Calls of pipelines: integers, prompts and generators of any kind, callbacks, interruption, offloading."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from diffusers.callbacks import PipelineCallback
from support import components
from support.flows import make

from starflow import ConfigError
from starflow.pipelines import FlowModel, TarFlowPipeline

CPU = torch.device("cpu")
PROMPTS = ["a red cat", "three small dog"]


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


@pytest.fixture(scope="module")
def pipe():
    return components.pipeline()


@pytest.fixture
def tarflow():
    made = TarFlowPipeline(FlowModel.from_flow(make()))
    made.set_progress_bar_config(disable=True)
    return made


def latents(pipe, *arguments, count: int = 1, **options) -> torch.Tensor:
    """Return the output of the flow for seeds 0, 1, ..."""
    options = {"generator": seeds(*range(count)), "output_type": "latent", "denoise": 0, **options}
    return pipe(*arguments, **options).images


@pytest.mark.parametrize("kind", [tuple, np.array], ids=["tuple", "array"])
def test_prompts_are_texts_of_any_kind(pipe, kind):
    expected = latents(pipe, PROMPTS, count=2, negative_prompt=PROMPTS[::-1])
    assert torch.equal(latents(pipe, kind(PROMPTS), count=2, negative_prompt=kind(PROMPTS[::-1])), expected)


@pytest.mark.parametrize(
    "labels",
    [
        range(3),
        (0, 1, 2),
        np.arange(3, dtype=np.uint8),
        torch.arange(3, dtype=torch.int32),
        [np.int64(i) for i in range(3)],
    ],
    ids=lambda labels: f"{type(labels).__name__} {getattr(labels, 'dtype', '')}",
)
def test_class_labels_are_integers_of_any_kind(tarflow, labels):
    assert torch.equal(latents(tarflow, labels, count=3), latents(tarflow, [0, 1, 2], count=3))


@pytest.mark.parametrize("number", [np.int64, np.uint8, torch.tensor], ids=["int64", "uint8", "tensor"])
def test_counts_and_sizes_are_integers_of_any_kind(pipe, number):
    def draw(number):
        options = {"num_images_per_prompt": number(2), "height": number(8), "width": number(24)}
        return latents(pipe, "a cat", count=2, denoise_batch_size=number(1), **options)

    assert torch.equal(draw(number), draw(int))


def test_a_label_may_be_a_tensor_without_dimensions(tarflow):
    assert torch.equal(latents(tarflow, torch.tensor(2)), latents(tarflow, 2))


def test_generators_may_be_a_tuple(pipe):
    expected = latents(pipe, PROMPTS, count=2)
    assert torch.equal(latents(pipe, PROMPTS, generator=tuple(seeds(0, 1))), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"generator": 5}, "generator: expected a torch.Generator, or one per image, got 5"),
        ({"generator": [5]}, "generator: expected a torch.Generator"),
        ({"generator": []}, "generator: 0 of them for 1 images"),
        ({"num_images_per_prompt": 1.0}, "num_images_per_prompt=1.0: expected an integer of at least 1"),
        ({"num_images_per_prompt": True}, "num_images_per_prompt=True"),
        ({"num_images_per_prompt": [1]}, r"num_images_per_prompt=\[1\]"),
        ({"denoise_batch_size": 0}, "denoise_batch_size=0: expected an integer of at least 1"),
        ({"height": 16.0}, "height=16.0: expected a multiple of 2 pixels"),
        ({"prompt": np.array([])}, "list of at least one string"),
        ({"prompt": ()}, "list of at least one string"),
        ({"prompt": None, "prompt_embeds": torch.zeros(0, 12, 16)}, "prompt_embeds: expected .* N at least 1"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "unknown prompt_embeds; there are latents alone"),
    ],
    ids=str,
)
def test_wrong_kinds_are_named(pipe, arguments, message):
    with pytest.raises(ConfigError, match=message):
        pipe(**{"prompt": "a cat", **arguments})


def test_no_classes_are_refused(tarflow):
    with pytest.raises(ConfigError, match=r"class_labels=\[\]"):
        tarflow([])


@pytest.mark.parametrize(("names", "expected"), [(["latents"], {"latents"}), ([], set()), (None, set())])
def test_a_callback_gets_the_tensors_that_it_names(pipe, names, expected):
    seen = []
    pipe(
        "a cat",
        callback_on_step_end=lambda pipe, step, block, tensors: seen.append(set(tensors)),
        callback_on_step_end_tensor_inputs=names,
    )
    assert seen == [expected] * 3


def test_a_callback_of_diffusers_names_its_tensors_itself(pipe):
    class Watch(PipelineCallback):
        tensor_inputs = ("prompt_embeds",)

    with pytest.raises(ConfigError, match="unknown prompt_embeds"):
        pipe("a cat", callback_on_step_end=Watch())


def test_an_interrupted_call_returns_the_latents_of_its_block(pipe):
    seen = []

    def stop(pipe, step, block, tensors):
        seen.append(tensors["latents"])
        pipe._interrupt = True

    images = latents(pipe, "a cat", callback_on_step_end=stop, denoise=1.0, certify=True)
    assert pipe.interrupt and len(seen) == 1 and torch.equal(images, seen[0])
    assert len(pipe("a cat", callback_on_step_end=stop).images) == 1
    assert torch.equal(latents(pipe, "a cat"), latents(pipe, "a cat")) and not pipe.interrupt


def test_a_call_is_interrupted_without_a_callback(pipe):
    """Another thread may set the attribute at any time; here a report of progress does."""

    def stop(done, total):
        pipe._interrupt = True

    report = pipe("a cat", progress=stop).report
    assert report.count == 1 and report.blocks == []


def images(pipe, **options) -> torch.Tensor:
    return pipe("a cat", generator=seeds(0), output_type="pt", denoise=1.0, certify=True, **options).images


def test_a_pipeline_with_all_weights_offloaded(pipe):
    """What enable_sequential_cpu_offload does, which asks for an accelerator."""
    accelerate = pytest.importorskip("accelerate")
    offloaded = components.pipeline()
    for part in (offloaded.text_encoder, offloaded.transformer, offloaded.vae):
        accelerate.cpu_offload(part, CPU)
    assert torch.equal(images(offloaded), images(pipe))
    assert all(parameter.is_meta for parameter in offloaded.transformer.parameters())


@pytest.mark.parametrize(
    "kind", [{"num_blocks_per_group": 1}, {"offload_type": "leaf_level"}], ids=["blocks", "layers"]
)
def test_a_pipeline_with_groups_of_weights_on_disk(pipe, kind, tmp_path):
    offloaded = components.pipeline()
    others = ["text_encoder", "vae"]
    offloaded.enable_group_offload(CPU, exclude_modules=others, offload_to_disk_path=str(tmp_path), **kind)
    assert torch.equal(images(offloaded), images(pipe))


@pytest.mark.parametrize(
    "kind", [{"num_blocks_per_group": 2}, {"num_blocks_per_group": 1, "use_stream": True}], ids=str
)
def test_groups_in_the_order_of_the_density_are_refused(kind):
    with pytest.raises(ConfigError, match="group offloading: a flow takes num_blocks_per_group=1 and use_stream=False"):
        components.flow_model().enable_group_offload(CPU, **kind)


def test_layerwise_casting_is_refused():
    with pytest.raises(ConfigError, match="no layerwise casting: quantize='int8' or 'fp8'"):
        components.flow_model().enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn)
