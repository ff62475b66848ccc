"""The page of an inspection: whole in itself, and what it shows is escaped."""

import json

import torch

from abliterate.pages.charts import heat_map
from abliterate.pages.inspection_page import write_inspection_page
from tests.inspection.test_reading import inspected
from tests.support.changed_models import SIZES, changed, each_writer, project
from tests.support.tiny_models import save_tiny_model


def test_the_page_has_verdict_map_and_tensors(tmp_path):
    base = save_tiny_model(tmp_path / "base", dtype=torch.bfloat16, **SIZES)
    model = changed(base, tmp_path / "<out>", each_writer(lambda w, _: project(w)))
    report = inspected(model, base).report
    page, data = write_inspection_page(report, tmp_path / "page", command="abliterate inspect <out>")
    text = page.read_text()
    assert "Directions were projected out of it" in text
    assert text.count("<svg") == 2
    assert "attn: o_proj, 2: 1.000" in text
    assert "model.layers.2.mlp.down_proj.weight" in text
    assert "&lt;out&gt;" in text
    assert "<out>" not in text
    assert json.loads(data.read_text())["verdict"] == "directional"
    alone = write_inspection_page(inspected(model).report, tmp_path / "alone", command="x")[0].read_text()
    assert "without a base" in alone


def test_a_map_without_cells_is_no_figure():
    assert heat_map([], caption="c", x_name="x", legend="l").html == ""
    assert heat_map([("a", [None, 0.5])], caption="c", x_name="x", legend="l").html.count("<rect") == 1
