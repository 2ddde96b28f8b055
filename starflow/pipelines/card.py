"""Model card of a saved pipeline."""

from __future__ import annotations

from ..models.flow import Flow

CARD = """\
---
library_name: starflow
pipeline_tag: {tag}
tags: [normalizing-flow, starflow, diffusers]
---
# {name}

{kind}: {blocks} flow blocks of {layers} layers, {parameters:,} parameters.
An image of {side}x{side} pixels is {tokens} tokens of {token_dim} values. Trained with {noise}.

## Use
    pip install 'starflow-kernels[models]'

```python
from starflow.pipelines import {pipeline}

pipe = {pipeline}.from_pretrained("{name}")
{call}
image.save("image.png")
```

Guidance: `guidance_scale` is the weight w >= 0 added to the conditional prediction; 0 is sampling without guidance.
"""
CALLS = {
    "STARFlowPipeline": 'image = pipe("a red heart", guidance_scale={guidance:g}).images[0]',
    "classes": "image = pipe(class_labels=0).images[0]",
    "unconditional": "image = pipe().images[0]",
}
KINDS = {
    "STARFlowPipeline": ("text-to-image", "Text to image on the latents of an autoencoder (arXiv 2506.06276)"),
    "classes": ("unconditional-image-generation", "Class-conditional flow on pixels (arXiv 2412.06329)"),
    "unconditional": ("unconditional-image-generation", "Unconditional flow on pixels (arXiv 2412.06329)"),
}


def model_card(pipeline: str, flow: Flow, side: int, name: str, guidance: float) -> str:
    """Return a model card in Markdown with front matter.

    Args:
        pipeline: name of the pipeline's class.
        flow: the flow.
        side: side of an image in pixels.
        name: name of the model.
        guidance: default guidance weight of the pipeline.
    """
    config = flow.config
    kind = pipeline if pipeline in KINDS else "classes" if config.num_classes else "unconditional"
    tag, description = KINDS[kind]
    card = CARD.format(
        tag=tag,
        name=name,
        kind=description,
        pipeline=pipeline,
        call=CALLS[kind].format(guidance=guidance),
        blocks=len(config.layers),
        layers=", ".join(map(str, config.layers)),
        parameters=sum(parameter.numel() for parameter in flow.parameters()),
        tokens=config.grid[0] * config.grid[1],
        token_dim=config.token_dim,
        side=side,
        noise=f"Gaussian noise of {config.noise_std}" if config.noise_std else f"{config.levels} dequantized levels",
    )
    return f"{card}\n## License\n\n{flow.notice}" if flow.notice else card
