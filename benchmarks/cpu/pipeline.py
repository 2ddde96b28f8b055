"""Times of the stages of a text-to-image pipeline: text, flow, denoising, decoding. Random weights, real classes.

    python -m benchmarks.cpu.pipeline --json benchmarks/results/pipeline_cpu.json

The proportions are those of the released 3B model on a smaller scale: one deep block that the text reaches and guidance
acts on, an autoencoder of 8 pixels a latent. A result counts only where the certificate is below 1e-4. The floors of
flow and denoising are operations / peak, measured in the same run.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from diffusers import AutoencoderKL
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

from starflow.pipelines import FlowModel, STARFlowPipeline

from ..command import benchmark
from ..machine import peak_flops

TEXT_DIM, TEXT_LEN, GUIDANCE, CERTIFICATE = 256, 128, 3.6, 1e-4


def build() -> STARFlowPipeline:
    """Return a pipeline of 128-pixel images."""
    torch.manual_seed(0)
    flow = FlowModel(
        image_size=16, image_channels=4, patch_size=1, channels=256, layers=[2, 2, 2, 12], scale="softplus",
        soft_clip=4.0, start=True, rotary="interleaved", patch_order="hwc", sequence_order="L2R", final_norm=True,
        condition_blocks="last", text_dim=TEXT_DIM, text_len=TEXT_LEN, noise_std=0.3,
    )  # fmt: skip
    for name, parameter in flow.named_parameters():
        if "proj_out" in name:
            torch.nn.init.normal_(parameter.data, std=0.01)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 128, 128), layers_per_block=2, latent_channels=4, sample_size=128,
    )  # fmt: skip
    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    tokenizer = T5TokenizerFast(
        vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0), *letters], extra_ids=0
    )
    text_encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer), d_model=TEXT_DIM, d_kv=32, num_heads=8, d_ff=512, num_layers=6,
            feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip
    pipe = STARFlowPipeline(flow.eval(), vae.eval(), text_encoder.eval(), tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def operations(flow: FlowModel, batch: int, guided: bool) -> int:
    """Return the operations of one pass over all tokens: products, causal half of attention, rows of guidance."""
    total, tokens = 0, flow.config.grid[0] * flow.config.grid[1]
    for i, layers in enumerate(flow.config.layers):
        reached = flow.config.conditioned(i)
        length, rows = tokens + TEXT_LEN * reached, batch * (1 + (guided and reached))
        width = flow.config.block_channels(i)
        total += rows * layers * (2 * length * 12 * width**2 + 2 * length**2 * width)
    return total


def measure(batch: int, repeats: int) -> dict:
    """Return the medians of the stages and their shares."""
    pipe, prompts = build(), [f"prompt {chr(97 + i)}" for i in range(batch)]

    def draw():
        generators = [torch.Generator().manual_seed(i) for i in range(batch)]
        return pipe(prompts, guidance_scale=GUIDANCE, generator=generators, certify=True).report

    draw()
    reports = [draw() for _ in range(repeats)]
    certificate = max(report.certificate for report in reports)
    assert certificate < CERTIFICATE, f"not exact: {certificate}"
    seconds = {stage: statistics.median(r.stages[stage] for r in reports) for stage in reports[0].stages}
    timed = {stage: value for stage, value in seconds.items() if stage != "certify"}
    peak = peak_flops()
    floors = {
        "flow": operations(pipe.transformer, batch, guided=True) / peak,
        "denoise": 2 * operations(pipe.transformer, batch, guided=False) / peak,
    }
    return {
        "case": f"128 px, batch {batch}, guidance {GUIDANCE}",
        "parameters": sum(parameter.numel() for parameter in pipe.transformer.parameters()),
        "method": reports[0].method,
        "seconds": seconds,
        "share": {stage: value / sum(timed.values()) for stage, value in timed.items()},
        "floor_seconds": floors,
        "images_per_second": batch / sum(timed.values()),
        "certificate": certificate,
    }


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=5)


def results(args: argparse.Namespace) -> dict:
    return {"rows": [measure(batch, args.repeats) for batch in args.batch]}


main = benchmark(__doc__, results, options, threads=1)


if __name__ == "__main__":
    main()
