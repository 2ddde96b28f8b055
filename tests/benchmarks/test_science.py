"""The benchmarks of scientific flows run from end to end, in a size of seconds."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("zuko", reason="flows are compared with those of zuko")

from benchmarks.cpu import posterior_sampling
from benchmarks.science import boltzmann, posteriors
from benchmarks.science.flows import Peer, fit, token_flow


@pytest.fixture(autouse=True)
def threads():
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@pytest.mark.parametrize("system, flows", [("double wells", ["TokenFlow", "NSF"]), ("Lennard-Jones", ["TokenFlow"])])
def test_boltzmann_generators(tmp_path, system, flows):
    sizes = ["--seconds", "0.1", "--count", "100", "--steps", "20", "--warmup", "10"]
    boltzmann.main([*sizes, "--systems", system, "--flows", *flows, "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["rows"]) == 3 * len(flows) and len(found["references"]) == 1
    assert all(0 < row["ess"] <= 1 for row in found["rows"])


def test_posteriors(tmp_path):
    sizes = ["--seconds", "0.1", "--simulations", "300", "--tests", "40", "--draws", "19"]
    posteriors.main([*sizes, "--json", str(tmp_path / "found.json")])
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [row["case"] for row in rows][:2] == ["two moons, exact posterior", "two moons, TokenFlow"]
    assert all(0 <= p <= 1 for row in rows for p in row.get("p_values", {}).values())


def test_estimators_of_sbi(tmp_path):
    pytest.importorskip("sbi", reason="estimators are those of sbi")
    from benchmarks.science import sbi_estimators

    sizes = ["--seconds", "0.1", "--simulations", "300", "--observations", "1", "--compared", "50", "--drawn", "50"]
    sbi_estimators.main([*sizes, "--simulators", "Gaussian linear", "--json", str(tmp_path / "found.json")])
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert rows[0]["case"] == "Gaussian linear, reference" and len(rows) == 4
    assert all(0.3 <= row["c2st"] <= 1 for row in rows)


def test_posterior_sampling(tmp_path):
    sizes = ["--seconds", "0.1", "--simulations", "300", "--tests", "40", "--count", "20", "--repeats", "1"]
    posterior_sampling.main([*sizes, "--json", str(tmp_path / "found.json")])
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert len(rows) == 8
    assert max(row["error"] for row in rows) < 1e-4


@pytest.mark.parametrize("kind", ["TokenFlow", "NSF", "MAF"])
def test_rsample_has_the_density_of_its_samples(kind):
    flow = token_flow(4, condition=2) if kind == "TokenFlow" else Peer(kind, 4, 2)
    condition = torch.randn(6, 2)
    x, log_prob = flow.rsample(6, condition)
    torch.testing.assert_close(log_prob, flow.log_prob(x, condition), rtol=1e-4, atol=1e-4)


def test_training_keeps_the_best_parameters_on_held_out_data():
    flow = torch.nn.Linear(1, 1, bias=False)
    seen = []

    def validate():
        seen.append(flow.weight.item())
        return abs(len(seen) - 3)

    steps = fit(flow, lambda: flow.weight.sum(), 0.2, 1e-2, validate, checks=5)
    assert steps > 0 and len(seen) == 5
    assert flow.weight.item() == seen[2]
