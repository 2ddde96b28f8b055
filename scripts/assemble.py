"""Assemble the pipeline folder of a text-conditional flow on latents from its trained parts.

python scripts/assemble.py --flow runs/flow --vae runs/autoencoder --text runs/text --out runs/pipeline
"""

from __future__ import annotations

import argparse

from starflow import Flow
from starflow.data.prompts import load_text
from starflow.models.autoencoder import load_vae
from starflow.pipelines import FlowModel, STARFlowPipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flow", required=True, help="folder of a run of starflow train")
    parser.add_argument("--vae", required=True, help="folder of the autoencoder")
    parser.add_argument("--text", required=True, help="folder with text_encoder/ and tokenizer/")
    parser.add_argument(
        "--denoise", type=float, default=1.0, help="factor of the score step; 0 with a fine-tuned decoder"
    )
    parser.add_argument("--out", required=True, help="folder to write")
    args = parser.parse_args()
    tokenizer, text_encoder = load_text(args.text)
    flow = FlowModel.from_flow(Flow.from_pretrained(args.flow))
    STARFlowPipeline(flow, load_vae(args.vae), text_encoder, tokenizer, denoise=args.denoise).save_pretrained(args.out)


if __name__ == "__main__":
    main()
