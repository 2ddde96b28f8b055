"""The license notice and the model card of converted weights."""

import json

import pytest
import torch
import yaml

from starflow import Flow
from starflow.convert import convert, export_upstream
from starflow.pipelines import FlowModel, TarFlowPipeline

ATTRIBUTION = (
    "Apple Machine Learning Research Model is licensed under the "
    "Apple Machine Learning Research Model License Agreement."
)


@pytest.fixture
def converted(tarflow):
    path, _, out = tarflow
    convert(path, out)
    return out


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_notice_has_the_attribution_and_says_where_the_license_is(converted):
    notice = (converted / "NOTICE").read_text()
    assert ATTRIBUTION in notice and "a Model Derivative" in notice and "non-commercial research only" in notice
    assert "https://github.com/apple/ml-starflow/blob/main/LICENSE_MODEL" in notice
    assert "imagenet_model_4_64_3_1_0.15.pth" in notice and "TarFlow repository has a license for its code" in notice


def test_the_notice_states_the_changes(tarflow):
    path, _, out = tarflow
    convert(path, out, dtype=torch.bfloat16)
    notice = (out / "NOTICE").read_text()
    assert "from a pickle of PyTorch to safetensors" in notice and "the 54 tensors have new names" in notice
    assert "Dropped tensors: 4 (dead buffer: blocks.*.attn_mask, var)" in notice
    assert "converted from float32 to bfloat16" in notice


def test_the_model_card_holds_the_notice(converted):
    card = (converted / "README.md").read_text()
    assert card.endswith((converted / "NOTICE").read_text())
    assert front_matter(card)["license"] == "other"


def test_the_model_card_names_the_license_of_starflow(starflow):
    path, config, out = starflow
    convert(path, out, config)
    assert front_matter((out / "README.md").read_text())["license"] == "apple-amlr"
    assert "publishes its STARFlow weights under" in (out / "NOTICE").read_text()


def test_notice_and_card_belong_to_the_conversion(tarflow, converted):
    assert {"NOTICE", "README.md"} <= set(json.loads((converted / "conversion.json").read_text())["files"])
    convert(tarflow[0], converted, overwrite=True, dtype=torch.bfloat16)
    assert "bfloat16" in (converted / "NOTICE").read_text()


def test_an_export_keeps_the_notice(converted, tmp_path):
    report = export_upstream(converted, tmp_path / "upstream")
    assert "NOTICE" in report.files
    assert (tmp_path / "upstream" / "NOTICE").read_bytes() == (converted / "NOTICE").read_bytes()


def test_a_flow_keeps_its_notice(converted, tmp_path):
    Flow.from_pretrained(converted).save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "NOTICE").read_bytes() == (converted / "NOTICE").read_bytes()


def test_a_pipeline_keeps_the_notice_of_its_flow(converted, tmp_path):
    notice = (converted / "NOTICE").read_text()
    TarFlowPipeline(FlowModel.from_flow(Flow.from_pretrained(converted))).save_pretrained(tmp_path / "first")
    TarFlowPipeline.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    for folder in (tmp_path / "first", tmp_path / "second"):
        assert (folder / "transformer" / "NOTICE").read_text() == notice
        assert (folder / "README.md").read_text().endswith(notice)
    assert "NOTICE" in export_upstream(tmp_path / "second", tmp_path / "upstream").files


def test_weights_of_other_origin_have_no_notice(converted, tmp_path):
    flow = Flow(Flow.from_pretrained(converted).config)
    flow.save_pretrained(tmp_path / "own")
    assert "NOTICE" not in export_upstream(tmp_path / "own", tmp_path / "upstream").files
