"""Folders that `transformers` wrote, with the logits it computed: `pytest tests/test_interchange.py`.

transformers 5.23 wrote tests/transformers/*: random weights, hidden size 16; the other direction (what we write, it
reads) is checked by hand, since the tests may not install it.
"""

import json
from pathlib import Path

import pytest
import torch

from model import load_model, save_model

FOLDERS = sorted((Path(__file__).parent / "transformers").iterdir())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_a_folder_written_by_transformers_gives_its_logits(folder):
    expected = json.loads((folder / "logits.json").read_text(encoding="utf-8"))
    with torch.no_grad():
        logits = load_model(folder)(torch.tensor(expected["input_ids"]))
    assert (logits - torch.tensor(expected["logits"])).abs().max() < 2e-5


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_what_we_write_again_holds_the_same_names_shapes_and_bits(folder, tmp_path):
    model = load_model(folder)
    save_model(tmp_path, model)
    again = load_model(tmp_path)
    assert again.config == model.config
    for (name, a), (other, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == other and torch.equal(a, b)
    ours = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    theirs = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for key in ("architectures", "model_type", "hidden_size", "head_dim", "tie_word_embeddings"):
        if key in theirs:
            assert ours[key] == theirs[key]
