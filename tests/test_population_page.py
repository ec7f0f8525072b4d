"""The examples of docs/population-statistics.md run as they stand."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import torch
from torch import nn
from typer.testing import CliRunner

from batchnorm.cli.app import app

PAGE = (Path(__file__).parent.parent / "docs" / "population-statistics.md").read_text(encoding="utf-8")


class _Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.backbone(x))


def _steps():
    model = _Model()
    swa_model = torch.optim.swa_utils.AveragedModel(model)
    swa_model.update_parameters(model)
    pairs = [(torch.randn(8, 3), torch.randn(8, 2)) for _ in range(4)]
    return {
        "model": model,
        "swa_model": swa_model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "scaler": torch.amp.GradScaler("cpu"),
        "loss": nn.functional.mse_loss,
        "loader": pairs,
        "loader_of_steps": [pairs[:2], pairs[2:]],
    }


def test_the_python_of_the_page_runs(capsys):
    names = _steps()
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, "population-statistics.md", "exec"), names)
    assert "1 layers recalibrated" in capsys.readouterr().out
    assert names["swa_model"].module.backbone[1].num_batches_tracked == 4
    assert names["report"].nothing_moved


def test_the_command_of_the_page_runs_on_averaged_weights(tmp_path, monkeypatch):
    (command,) = re.findall(r"^    batchnorm (recalibrate .*)$", PAGE, flags=re.MULTILINE)
    (tmp_path / "my").mkdir()
    source = "from torch import nn\ndef resnet():\n    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))\n"
    (tmp_path / "my" / "models.py").write_text(source)
    data = "import torch\ndef train_loader():\n    return torch.manual_seed(0) and torch.randn(40, 3).split(9)\n"
    (tmp_path / "my" / "data.py").write_text(data)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    from safetensors.torch import load_file, save_file

    save_file(average.module.state_dict(), tmp_path / "swa.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    result = CliRunner().invoke(app, shlex.split(command))
    for name in ("my", "my.models", "my.data"):
        sys.modules.pop(name, None)
    assert result.exit_code == 0, result.output
    new = load_file("swa-ready.safetensors")
    torch.manual_seed(0)
    values = average.module[0](torch.randn(40, 3)).detach()
    torch.testing.assert_close(new["1.running_var"], values.var(0))
    torch.testing.assert_close(new["0.weight"], model[0].weight.detach())
