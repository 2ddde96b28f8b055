"""License notice and model card of converted weights.

The license of Apple's weights extends to derivatives. Whoever distributes a derivative must add the license text, an
attribution and a statement of changes.
"""

from __future__ import annotations

from pathlib import Path

from ..io.files import write_text
from ..models.checkpoint import NOTICE, save_notice
from .names import Family
from .report import Report, shortened

CARD = "README.md"
PROJECTS = {
    "tarflow": ("TarFlow", "https://github.com/apple/ml-tarflow", "2412.06329"),
    "starflow": ("STARFlow", "https://github.com/apple/ml-starflow", "2506.06276"),
}
LICENSE_URL = "https://github.com/apple/ml-starflow/blob/main/LICENSE_MODEL"
ATTRIBUTION = (
    "Apple Machine Learning Research Model is licensed under the "
    "Apple Machine Learning Research Model License Agreement."
)
# STARFlow's repository has a license for the weights. TarFlow's repository has a license for the code only.
TERMS = {
    "starflow": f"""\
Apple publishes its STARFlow weights under the Apple Machine Learning Research Model License Agreement:
{LICENSE_URL}
It permits non-commercial research only.""",
    "tarflow": f"""\
Apple's TarFlow repository has a license for its code and none for its weights. Without other terms from Apple, treat
the weights like those of STARFlow, under the Apple Machine Learning Research Model License Agreement:
{LICENSE_URL}
It permits non-commercial research only.""",
}
TEXT = """\
These weights are a Model Derivative. They were converted by starflow-kernels from a checkpoint of Apple's {project}
code ({url}): {source}

{terms}
The same terms hold for everything that is made from these weights, such as fine-tuned or quantized weights.
They do not hold if the checkpoint was trained from scratch, without weights of Apple. Delete this notice in that case.

To distribute the weights, add this notice, a copy of that agreement, and this attribution:

    {attribution}

Do not use the name, trademarks or logos of Apple to endorse or promote the weights. Apple has no part in this
conversion.

Changes to the original:

{changes}
"""
FRONT_MATTER = {
    "starflow": f"license: apple-amlr\nlicense_link: {LICENSE_URL}",
    "tarflow": f"license: other\nlicense_name: see-notice\nlicense_link: {NOTICE}",
}
CARD_TEXT = """\
---
{license}
library_name: starflow
tags: [normalizing-flow, {family}]
---
# {name}

{project} (arXiv {paper}), {parameters:,} parameters, {dtype}, converted for starflow-kernels.

```python
from starflow import Flow

flow = Flow.from_pretrained("{name}")
```

## License

{notice}"""


def write_notice_and_card(folder: Path, report: Report, source_dtype: str, name: str) -> None:
    """Write NOTICE and README.md beside converted weights.

    Args:
        folder: folder of the weights.
        report: report of the conversion.
        source_dtype: dtypes of the upstream weights.
        name: name of the folder in the model card.
    """
    family: Family = report.family
    project, url, paper = PROJECTS[family]
    changes = "\n".join(f"- {change}" for change in _changes(report, source_dtype))
    notice = TEXT.format(
        source=report.source,
        project=project,
        url=url,
        terms=TERMS[family],
        attribution=ATTRIBUTION,
        changes=changes,
    )
    card = CARD_TEXT.format(
        license=FRONT_MATTER[family],
        family=family,
        name=name,
        project=project,
        paper=paper,
        parameters=report.parameters,
        dtype=report.dtype,
        notice=notice,
    )
    save_notice(notice, folder)
    write_text(folder / CARD, card)


def _changes(report: Report, source_dtype: str) -> list[str]:
    dtype = (
        f"converted from {source_dtype} to {report.dtype}"
        if source_dtype != report.dtype
        else f"unchanged ({report.dtype})"
    )
    dropped = [f"{len(names)} ({reason}: {shortened(names)})" for reason, names in report.dropped_by_reason().items()]
    return [
        "File format: from a pickle of PyTorch to safetensors, with the settings in config.json.",
        f"Names: the {len(report.kept)} tensors have new names; conversion.json lists the old and the new ones.",
        "Shapes: dimensions of size one were removed from first tokens and class embeddings.",
        f"Dropped tensors: {', '.join(dropped) or 'none'}.",
        f"Data type: {dtype}.",
        "The weights were not trained further.",
    ]
