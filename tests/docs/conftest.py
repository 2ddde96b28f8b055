"""Fixtures of the tests of the documentation."""

from __future__ import annotations

from pathlib import Path

import pytest

from starflow import Flow


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory) -> Path:
    """Folders by the names that the pages use for large downloads, with small random parts of the same classes."""
    pytest.importorskip("diffusers", reason="pipelines need diffusers")
    from support import components

    folder = tmp_path_factory.mktemp("stand_ins")
    components.save(folder / "my-starflow")
    Flow.save_pretrained(components.flow_model(), folder / "converted")
    components.vae().save_pretrained(folder / "sd-vae-ft-ema")
    for part in (components.text_encoder(), components.tokenizer()):
        part.save_pretrained(folder / "flan-t5-xl")
    return folder
