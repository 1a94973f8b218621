"""The file that recipes and launchers name does what `pixclip-hf train` does."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import run_pretrain

from pixclip_hf.training import command

ROOT = Path(__file__).parents[2]
SMALL = [
    "--max_steps", "1", "--per_device_train_batch_size", "4", "--scenes_train_images", "8", "--scenes_eval_images",
    "2", "--image_size", "32", "--report_to", "none", "--use_cpu", "--disable_tqdm", "True",
]  # fmt: skip


def test_it_is_the_command(tmp_path, monkeypatch):
    assert run_pretrain.main is command.main
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model_type: pixclip\nlearning_rate: 0.5\n")
    given = [str(recipe), "--output_dir", str(tmp_path / "run"), "--learning_rate", "0.25", *SMALL]
    monkeypatch.setattr(sys, "argv", ["run_pretrain.py", *given])
    runpy.run_path(str(ROOT / "examples" / "run_pretrain.py"), run_name="__main__")
    text = (tmp_path / "run" / "run_arguments.json").read_text()
    assert '"model_type": "pixclip"' in text and '"learning_rate": 0.25' in text


@pytest.mark.slow
def test_accelerate_launches_it(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model_type: cloc\n")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    given = ["examples/run_pretrain.py", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "run"), *SMALL]
    result = subprocess.run(
        [*launch, *given], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "model.safetensors").is_file()
