"""The model card of a saved folder: what it says is so, and what somebody edited is left alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import curvprune as cp
from tests import tiny

IDS = torch.arange(64).reshape(4, 16) % 60


def saved(folder: Path, **settings: str) -> Path:
    model = tiny.llama()
    data = [{"input_ids": row[None]} for row in IDS]
    asked = cp.Settings(**settings)
    return cp.quantize(model, data, bits=4, group_size=16, settings=asked).save(folder)


def card(folder: Path) -> tuple[dict, str]:
    """The metadata and the text of a card."""
    _, head, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head), text


def test_metadata_say_what_the_folder_is(tmp_path):
    head, text = card(saved(tmp_path / "for transformers"))
    assert head["library_name"] == "transformers"
    assert head["pipeline_tag"] == "text-generation"
    assert {"curvprune", "quantized", "compressed-tensors"} <= set(head["tags"])
    assert "base_model" not in head  # it came from no hub
    head, text = card(saved(tmp_path / "for curvprune", target="curvprune"))
    assert head["library_name"] == "curvprune" and "compressed-tensors" not in head["tags"]
    assert "from_pretrained" not in text


def test_the_code_of_a_card_loads_the_folder(tmp_path):
    folder = saved(tmp_path / "out")
    blocks = re.findall(r"```python\n(.*?)```", card(folder)[1], re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        names: dict = {}
        exec(block.replace("FOLDER", str(folder)), names)
        with torch.no_grad():
            assert names["model"](input_ids=IDS).logits.isfinite().all()


def test_sizes_are_those_of_the_file(tmp_path):
    folder = saved(tmp_path / "out")
    stored = (folder / "model.safetensors").stat().st_size
    parameters = sum(p.numel() for p in tiny.llama().parameters())
    text = card(folder)[1]
    assert f"{8 * stored / parameters:.2f} bits a weight" in text
    row = next(line for line in text.splitlines() if line.startswith("| 16 bits"))
    assert f"{2 * parameters / stored:.2f}" in row


def test_a_verdict_and_the_controls_are_on_the_card(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3))
    x = torch.randn(300, 12)
    data = [(x[i : i + 1], torch.tensor([i % 3])) for i in range(300)]
    budget = cp.Budget("loss", max_drop=0.5)
    result = cp.quantize(model, data, bits=[2, 4], budget=budget)
    head, text = card(result.save(tmp_path / "out"))
    assert f"**{result.verdict.status}**" in text and "model=model" in text
    assert "pipeline_tag" not in head
    controls = [t.name for t in result.trials if t.kind == "control" and not t.note]
    assert controls
    for name in controls[:4]:
        assert f"| {name} |" in text


@pytest.mark.parametrize("text", ["my own words", ""])
def test_a_card_that_was_edited_is_not_lost(tmp_path, text):
    folder = saved(tmp_path / "out")
    saved(folder)  # over itself: nobody has touched the card
    path = folder / "README.md"
    path.write_text(path.read_text(encoding="utf-8").replace("Size", "My size") + text)
    cp.load(folder)  # what a folder holds besides is nobody's business
    with pytest.raises(ValueError, match=r"README\.md, which curvprune did not write or which has"):
        saved(folder)


def test_a_dense_copy_does_not_take_the_card_of_another_folder(tmp_path):
    out = cp.export_dense(saved(tmp_path / "in"), tmp_path / "out")
    assert not (out / "README.md").exists()


def test_names_are_no_markup(tmp_path):
    class Odd(nn.Sequential):
        pass

    Odd.__name__ = "<script>alert(1)</script> | [x](y)"
    model = Odd(nn.Linear(8, 4))
    data = [(torch.randn(1, 8), torch.zeros(1, 4)) for _ in range(8)]
    text = card(cp.quantize(model, data, bits=4, loss="regression").save(tmp_path / "out"))[1]
    assert re.search(r"(?<!\\)[<|\[]", text.split("\n## ")[0].replace("# ", "")) is None
