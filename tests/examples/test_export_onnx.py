"""The export example: both halves on disk, close to the model."""

import export_onnx
import pytest


@pytest.mark.parametrize("family", ("cloc", pytest.param("pixclip", marks=pytest.mark.slow)))
@pytest.mark.parametrize("format", ("torch", pytest.param("onnx", marks=pytest.mark.slow)))
def test_export(family, format, request, tmp_path, capsys):
    if format == "onnx":
        pytest.importorskip("onnxruntime", reason="needs pip install pixclip-hf[onnx]")
    for part in request.getfixturevalue(f"tiny_{family}"):
        part.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    found = export_onnx.main(["--model", str(tmp_path / "model"), "--format", format, "--output_dir", str(out)])
    assert set(found) == {"image_embeds", "region_embeds", "text_embeds"} and max(found.values()) < 1e-4
    suffix = {"torch": "pt2", "onnx": "onnx"}[format]
    assert all((out / half / f"model.{suffix}").is_file() for half in ("image", "text"))
    assert "text_embeds" in capsys.readouterr().out
