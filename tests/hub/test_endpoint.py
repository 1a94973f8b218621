"""The handler of a published model, called as the server of an Inference Endpoint does."""

import base64
import io
import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from conftest import TEXT_CONFIG, VISION_CONFIG, build_tiny, build_tokenizer
from hub_server import running_hub
from PIL import Image
from processes import running_process
from transformers import pipeline

import pixclip_hf
from pixclip_hf import endpoint
from pixclip_hf.hub import main, write_folder
from pixclip_hf.processing.processing_regions import encode_rle
from pixclip_hf.training import add_lora
from pixclip_hf.versions import SUPPORTED

BOXES = [[2, 3, 20, 18], [0, 0, 9, 9]]
LABELS = ["dark", "bright", "a long text"]
# As the server does: it has the folder on its path, and takes the class from the file.
SERVE = """
import importlib.util, json, sys

def handler_of(folder):
    spec = importlib.util.spec_from_file_location("handler", f"{folder}/handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EndpointHandler(str(folder))
"""


def base64_of(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return base64.b64encode(buffer.getvalue()).decode()


IMAGE = Image.linear_gradient("L").resize((32, 24)).convert("RGB")
MASKS = np.zeros((2, 24, 32), dtype=bool)
MASKS[0, 3:18, 2:20], MASKS[1, :9, :9] = True, True
RLES = [encode_rle(mask) for mask in MASKS]
PNGS = [base64_of(Image.fromarray(mask)) for mask in MASKS]
REQUEST = {"inputs": {"image": base64_of(IMAGE), "boxes": BOXES}, "parameters": {"candidate_labels": LABELS}}


def build_grounding():
    """A CLOC that grounds and takes masks and points."""
    config = pixclip_hf.CLOCConfig(
        vision_config=dict(VISION_CONFIG), text_config=dict(TEXT_CONFIG), projection_dim=16, grounding=True,
        prompter_points=True,
    )  # fmt: skip
    image_processor = pixclip_hf.RegionImageProcessor(size={"height": 32, "width": 32})
    processor = pixclip_hf.CLOCProcessor(image_processor=image_processor, tokenizer=build_tokenizer())
    return pixclip_hf.CLOCModel(config).eval(), processor


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each model as it is pushed."""
    place = tmp_path_factory.mktemp("endpoint")
    pixclip = (pixclip_hf.PixCLIPConfig, pixclip_hf.PixCLIPModel, pixclip_hf.PixCLIPProcessor)
    write_folder(*build_grounding(), place / "cloc", "org/cloc", handler=True)
    write_folder(*build_tiny(*pixclip), place / "pixclip", "org/pixclip", handler=True)
    return place


@pytest.fixture(scope="module")
def handlers(folders):
    names = {}
    exec(SERVE, names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.path", list(sys.path))  # handler.py adds to it
        return {name: names["handler_of"](folders / name) for name in ("cloc", "pixclip")}


def answer(handler, request):
    """The answer to a request, both as JSON."""
    return json.loads(json.dumps(handler(json.loads(json.dumps(request))), allow_nan=False))


@pytest.mark.parametrize("name", ["cloc", "pixclip"])
@pytest.mark.parametrize(
    ("regions", "given"),
    [
        ({"boxes": BOXES}, {"boxes": BOXES}),
        ({"masks": RLES}, {"masks": RLES}),
        ({"masks": PNGS}, {"masks": list(MASKS)}),
    ],
    ids=["boxes", "run lengths", "files"],
)
def test_regions_as_the_pipelines(folders, handlers, name, regions, given):
    image = {"image": base64_of(IMAGE)}
    extract, classify = (pipeline(task, model=str(folders / name), device="cpu") for task in endpoint.TASKS[:2])
    found = answer(handlers[name], {"inputs": {**image, **regions}})
    assert found == extract(IMAGE, **given) and len(found[0]["embedding"]) == 16
    found = answer(handlers[name], {"inputs": {**image, **regions}, "parameters": {"candidate_labels": LABELS}})
    assert found == classify(IMAGE, **given, candidate_labels=LABELS) and sorted(found[0]["labels"]) == sorted(LABELS)


def test_options_and_other_tasks(folders, handlers):
    image = {"image": base64_of(IMAGE)}
    cloc = handlers["cloc"]
    parameters = {"candidate_labels": LABELS, "hypothesis_template": "so {}", "top_k": 1, "normalized": True}
    boxes = [[0.1, 0.1, 0.5, 0.5]]
    classify = pipeline(endpoint.CLASSES, model=str(folders / "cloc"), device="cpu")
    found = answer(cloc, {"inputs": {**image, "boxes": boxes}, "parameters": parameters})
    assert found == classify(IMAGE, boxes=boxes, **parameters) and len(found[0]["labels"]) == 1
    ground = pipeline(endpoint.GROUNDING, model=str(folders / "cloc"), device="cpu")
    options = {"candidate_labels": LABELS, "threshold": -1}
    found = answer(cloc, {"inputs": image, "parameters": {"task": "region-grounding", **options}})
    assert found == ground(IMAGE, **options) and len(found) == 3
    extract = pipeline(endpoint.FEATURES, model=str(folders / "cloc"), device="cpu")
    points = {"points": [[[4, 5], [9, 9]], [[20, 20]]], "point_labels": [[1, 0], [1]]}
    assert answer(cloc, {"inputs": {**image, **points}}) == extract(IMAGE, **points)
    assert answer(cloc, {"inputs": {**image, "boxes": []}, "parameters": None}) == []
    # Upright, as everywhere.
    exif = Image.Exif()
    exif[274] = 6
    turned = {"image": base64_of(IMAGE, "JPEG", exif=exif), "boxes": [[0, 0, 24, 32]]}
    assert answer(cloc, {"inputs": turned})[0]["box"] == {"xmin": 0, "ymin": 0, "xmax": 24, "ymax": 32}


NO_IMAGE = base64.b64encode(b"no image at all").decode()


@pytest.mark.parametrize(
    ("inputs", "parameters", "message"),
    [
        ({"image": None}, {}, "`inputs.image` must be an image file in base64, got none"),
        ({"image": "no base64!"}, {}, "`inputs.image` must be an image file in base64, got 'no base64!'"),
        ({"image": NO_IMAGE}, {}, "`inputs.image`: the file is not an image"),
        ({"image": 5}, {}, "`inputs.image` must be .*, got 5"),
        ({"boxes": None}, {}, "needs `boxes` or `masks`, or `points`"),
        ({"boxes": [[1, 2, 3]]}, {}, r"boxes must have shape \(R, 4\)"),
        ({"boxes": [[1, 2, 9, "x"]]}, {}, "boxes must be numbers"),
        ({"boxes": [BOXES[0], [9, 9, 1, 1]]}, {}, r"boxes\[1\] must have x1 > x0"),
        ({"boxes": {"a": 1}}, {}, "`inputs.boxes` must be a list of regions, got {'a': 1}"),
        ({"boxes": [[0, 0, 9, 9]] * 257}, {}, "`inputs.boxes` must hold at most 256 regions, got 257"),
        ({"boxes": None, "masks": [PNGS[0], 7]}, {}, r"`inputs.masks\[1\]` must be a run-length .*, got 7"),
        ({"boxes": None, "masks": [NO_IMAGE]}, {}, r"`inputs.masks\[0\]`: the file is not an image"),
        ({"boxes": None, "masks": [base64_of(IMAGE)]}, {}, r"masks\[0\] must have shape \(H, W\)"),
        (
            {"boxes": None, "masks": [base64_of(Image.new("1", (9, 9), 1))]}, {},
            r"`inputs.masks\[0\]` must have the size of its image, 32 x 24, got \(9, 9\)",
        ),
        ({"boxes": None, "masks": [{"size": [9, 9], "counts": [0, 81]}]}, {}, r"masks\[0\] has \(height, width\)"),
        ({"boxes": None, "masks": [{"size": [24, 32]}]}, {}, r"masks\[0\]: an RLE must be a dict"),
        ({"boxes": None, "points": [[4, 5]]}, {}, r"points\[0\] must hold the points of a region"),
        ({"boxes": None, "points": [7]}, {}, r"`inputs.points\[0\]` must be a list of points, got 7"),
        ({"boxes": None, "points": [[[1, 1]] * 65]}, {}, r"`inputs.points\[0\]` must hold at most 64 points, got 65"),
        ({"boxes": None, "points": [[[99, 5]]]}, {}, r"points\[0\]\[0\] must lie in its image of width 32"),
        ({"path": "x"}, {}, "`inputs` takes the fields image, boxes, .*, got also 'path'"),
        ({}, {"batch_size": 9}, "`parameters` takes the fields .*, got also 'batch_size'"),
        ({}, {"task": "text-generation"}, "`parameters.task` must be one of .*, got 'text-generation'"),
        ({}, {"task": "region-grounding", "candidate_labels": LABELS}, "`inputs` takes the fields image, got"),
        ({}, [], r"`parameters` must be an object, got \[\]"),
        ({}, {"candidate_labels": "dark"}, "`parameters.candidate_labels` must be a list of texts, got 'dark'"),
        ({}, {"candidate_labels": ["a", 5]}, r"`parameters.candidate_labels\[1\]` must be a text, got 5"),
        ({}, {"candidate_labels": ["a", " "]}, r"`candidate_labels\[1\]` must not be empty"),
        ({}, {"candidate_labels": ["a"] * 1025}, "must hold at most 1024 texts, got 1025"),
        ({}, {"candidate_labels": ["a", "b" * 10_001]}, r"labels\[1\]` must have at most 10000 characters, got 10001"),
        ({}, {"candidate_labels": ["a"], "top_k": True}, "`parameters.top_k` must be a whole number, got True"),
        ({}, {"normalized": 1}, "`parameters.normalized` must be true or false, got 1"),
        ({}, {"mode": "pooled"}, "`mode` is not an option of CLOCModel"),
    ],
)  # fmt: skip
def test_bad_requests(handlers, inputs, parameters, message):
    request = {"inputs": {"image": base64_of(IMAGE), "boxes": BOXES, **inputs}, "parameters": parameters}
    with pytest.raises(ValueError, match=message):
        answer(handlers["cloc"], request)


def test_bad_forms_and_limits(handlers, monkeypatch):
    for data, message in (
        ([], r"`data` must be an object, got \[\]"),
        ({}, "`inputs` must be an object, got None"),
        ({"inputs": "text"}, "`inputs` must be an object, got 'text'"),
        ({**REQUEST, "options": {}}, "`data` takes the fields inputs, parameters, got also 'options'"),
    ):
        with pytest.raises(ValueError, match=message):
            handlers["cloc"](data)
    with pytest.raises(ValueError, match="a task of this model, which has no box head, got 'region-grounding'"):
        handlers["pixclip"]({"inputs": {"image": "x"}, "parameters": {"task": "region-grounding"}})
    masks = {"inputs": {"image": base64_of(IMAGE), "masks": RLES}}
    for name, most, request, message in (
        ("MOST_BYTES", 30, REQUEST, "`inputs.image` must have at most 30 bytes"),
        ("MOST_PIXELS", 767, REQUEST, "`inputs.image` must have at most 767 pixels, got 32 x 24"),
        ("MOST_MASK_PIXELS", 1535, masks, "`inputs.masks` must have at most 1535 pixels together, got 2 of 32 x 24"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(endpoint, name, most)
            with pytest.raises(ValueError, match=message):
                handlers["cloc"](request)
            patch.setattr(endpoint, name, 4 * most)
            assert len(handlers["cloc"](request)) == 2 or name == "MOST_BYTES"


def test_nothing_that_a_request_names_is_opened(handlers, tmp_path, monkeypatch):
    monkeypatch.setenv("PIXCLIP_HF_LOCAL_ADDRESSES", "1")
    monkeypatch.chdir(tmp_path)
    paths = [tmp_path / "a.png", Path("imag")]  # the second is base64 too
    for path in paths:
        IMAGE.save(path, format="PNG")
    for name in (str(paths[0]), paths[0].as_uri(), str(paths[1]), "http://127.0.0.1:9/a.png"):
        for inputs in ({"image": name, "boxes": BOXES}, {"image": base64_of(IMAGE), "masks": [name]}):
            with pytest.raises(ValueError, match=r"must be an image file in base64|the file is not an image"):
                handlers["cloc"]({"inputs": inputs})


def test_the_card_names_the_handler(folders, tiny_cloc, tmp_path):
    for name in ("cloc", "pixclip"):
        assert "`handler.py` serves the model" in (folders / name / "README.md").read_text(encoding="utf-8")
    write_folder(*tiny_cloc, tmp_path / "cloc", "org/cloc")
    assert "handler" not in (tmp_path / "cloc" / "README.md").read_text(encoding="utf-8")


def test_whole_models_alone(tiny_cloc, tmp_path, capsys):
    model, processor = tiny_cloc
    with pytest.raises(ValueError, match="`handler` serves a whole model, got adapters: pass `merge=True` too"):
        write_folder(add_lora(model, r=2), processor, tmp_path / "lora", "org/lora", base_model="org/b", handler=True)
    with pytest.raises(SystemExit):
        main(["--repo_id", "org/cloc", "--space", "org/demo", "--handler"])
    assert "`--model` is needed" in capsys.readouterr().err


@pytest.mark.slow
def test_pushed_served_and_deleted(folders, handlers, tmp_path):
    expected = answer(handlers["cloc"], REQUEST)
    with running_hub() as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": hub.token}
        with running_process(tmp_path, **settings) as author:
            push = ["--model", str(folders / "cloc"), "--repo_id", "team/cloc"]
            author.run(f"from pixclip_hf.hub import main\nmain({[*push, '--handler']})")
            repository = hub.repositories["model", "team/cloc"]
            assert len(repository.commits) == 2  # the Hub's own, and one
            pushed = dict(repository.find("main")[1])
            author.run(f"main({push})")
            kept = repository.find("main")[1].keys()
    own = {name for name in pushed if name in ("handler.py", "requirements.txt") or name.startswith("pixclip_hf/")}
    assert pushed.keys() - kept == own and {"handler.py", "pixclip_hf/endpoint.py"} <= own
    requirements = pushed["requirements.txt"].decode().splitlines()
    assert f"torch{SUPPORTED['torch']}" in requirements and f"transformers=={version('transformers')}" in requirements
    for name, content in pushed.items():
        path = tmp_path / "repository" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (tmp_path / "request.json").write_text(json.dumps(REQUEST))
    with running_process(tmp_path) as server:
        printed = server.run(
            SERVE
            + """
handler = handler_of("repository")
import pixclip_hf, torch
torch.set_num_threads(1)
print(json.dumps(handler(json.load(open("request.json")))))
print(pixclip_hf.__file__)
"""
        ).splitlines()
    assert Path(printed[-1]).resolve().is_relative_to(tmp_path / "repository")
    found = json.loads(printed[-2])
    assert [row["labels"] for row in found] == [row["labels"] for row in expected]
    np.testing.assert_allclose([row["scores"] for row in found], [row["scores"] for row in expected], atol=1e-6)
