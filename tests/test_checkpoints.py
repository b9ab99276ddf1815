"""common/checkpoints.py: whole files, names on disk, what does not fit, runs that are there or not."""

import json

import pytest
import torch

from common.checkpoints import (
    expect_weights,
    read_config,
    read_trainer,
    read_weights,
    replacing,
    save_weights,
    to_disk_names,
    write_trainer,
)
from common.cli import find_run

WEIGHTS = {
    "model.layers.0.mixer.in_proj.weight": torch.arange(6.0).view(2, 3),
    "model.layers.1.mixer.experts.up_proj": torch.arange(12.0).view(2, 3, 2),  # [E, F, C]
    "model.layers.1.mixer.gate.e_score_correction_bias": torch.ones(2),
}


def test_an_exception_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_weights_go_to_disk_by_other_names_and_come_back(tmp_path):
    names = set(to_disk_names(WEIGHTS))
    assert "backbone.layers.0.mixer.in_proj.weight" in names
    assert "backbone.layers.1.mixer.experts.1.up_proj.weight" in names
    save_weights(tmp_path / "out", {"hidden_size": 3}, WEIGHTS)
    read = read_weights(tmp_path / "out")
    assert read.keys() == WEIGHTS.keys() and all(torch.equal(read[name], WEIGHTS[name]) for name in read)
    assert read_config(tmp_path / "out")["hidden_size"] == 3


@pytest.mark.parametrize(("change", "message"), [
    (lambda w: w.pop("b"), "b missing"),
    (lambda w: w.update(b=torch.ones(3)), r"b \[3\]"),
    (lambda w: w.update(c=torch.ones(3)), "c unexpected"),
])  # fmt: skip
def test_weights_that_do_not_fit_are_named(change, message):
    expected = dict(a=torch.ones(1), b=torch.ones(2))
    expect_weights(dict(expected), expected, "here")
    wrong = dict(expected)
    change(wrong)
    with pytest.raises(ValueError, match=f"here does not fit its config: {message}"):
        expect_weights(wrong, expected, "here")


def test_the_state_of_a_run_is_read_back_and_another_file_is_refused(tmp_path):
    path = tmp_path / "trainer.pt"
    write_trainer(path, dict(step=3, model=WEIGHTS))
    assert read_trainer(path, ("step", "model"))["step"] == 3
    with pytest.raises(ValueError, match="not a checkpoint of this version"):
        read_trainer(path, ("step", "scaler"))
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="is damaged"):
        read_trainer(path, ("step",))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="only 'nemotron_h' is read here"):
        read_config(tmp_path)


def test_a_run_is_new_or_resumed_and_never_written_over(tmp_path):
    assert find_run(tmp_path, None, False, "lla") == tmp_path / "lla"
    with pytest.raises(FileNotFoundError, match="there is no run"):
        find_run(tmp_path, None, True, "lla")
    folder = tmp_path / "lla"
    folder.mkdir()
    write_trainer(folder / "trainer.pt", {})
    assert find_run(tmp_path, None, False, "lla") == tmp_path / "lla-2"
    assert find_run(tmp_path, None, True, "hybrid") == find_run(tmp_path, "lla", True, "hybrid") == tmp_path / "lla"
    with pytest.raises(ValueError, match="has a run already"):
        find_run(tmp_path, "lla", False, "lla")
