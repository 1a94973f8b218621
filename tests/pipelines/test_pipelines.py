"""Both region pipelines on both models: input forms, batching, output, errors, and loading from a folder."""

import functools
import http.server
import threading
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import TEXT_CONFIG, VISION_CONFIG, build_tiny
from PIL import Image
from stand_ins import tiny_clip, tiny_siglip
from torch.nn import functional as F
from transformers import pipeline

import pixclip_hf

TASKS = ("zero-shot-region-classification", "zero-shot-region-detection")
FEATURES = "region-feature-extraction"
LABELS = ["a red disc", "a blue square", "something else altogether"]
SIZES = [(40, 30), (32, 32), (25, 60), (64, 48), (33, 41)]


@pytest.fixture(params=["tiny_cloc", "tiny_pixclip"])
def tiny(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def extract(tiny):
    return pipeline(FEATURES, model=tiny[0], processor=tiny[1], device="cpu")


@pytest.fixture
def classify(tiny):
    return pipeline("zero-shot-region-classification", model=tiny[0], processor=tiny[1], device="cpu")


def make_image(index):
    width, height = SIZES[index % len(SIZES)]
    pixels = np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def make_boxes(index, count):
    width, height = SIZES[index % len(SIZES)]
    corners = np.random.default_rng(100 + index).uniform(0, 0.5, (count, 2)) * [width, height]
    return np.concatenate([corners, corners + np.array([width, height]) * 0.4], axis=1).tolist()


def make_masks(index, count):
    width, height = SIZES[index % len(SIZES)]
    masks = np.zeros((count, height, width), dtype=bool)
    for mask, (x1, y1, x2, y2) in zip(masks, make_boxes(index, count), strict=True):
        mask[int(y1) : int(y2) + 1, int(x1) : int(x2) + 1] = True
        mask[:: index + 2] = False
        mask[int(y1) + 1, int(x1) + 1] = True
    return list(masks)


REGIONS = {"boxes": make_boxes, "masks": make_masks}
# Ragged on purpose: 1 to 5 regions, the largest neither first nor last, and a last batch that is not full.
COUNTS = [2, 5, 1, 4, 3]


def make_batch(kind):
    images = [make_image(i) for i in range(len(COUNTS))]
    return images, [REGIONS[kind](i, count) for i, count in enumerate(COUNTS)]


def reference_embeddings(tiny, image, **regions):
    """One image through the processor and the model, without the pipeline."""
    model, processor = tiny
    with torch.no_grad():
        features = model.get_region_features(**processor(images=[image], return_tensors="pt", **regions)).pooler_output
    return features[0] / features[0].norm(dim=-1, keepdim=True)


def counted(monkeypatch, module, name):
    calls = []
    original = getattr(module, name)

    @functools.wraps(original)
    def call(*args, **kwargs):
        calls.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, call)
    return calls


@pytest.mark.parametrize("kind", ["boxes", "masks"])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_batched_equals_one_by_one(tiny, extract, kind, batch_size):
    images, regions = make_batch(kind)
    outputs = extract(images, **{kind: regions}, batch_size=batch_size, return_tensors=True)
    assert [tuple(output.shape) for output in outputs] == [(count, 16) for count in COUNTS]
    for image, one, output in zip(images, regions, outputs, strict=True):
        torch.testing.assert_close(output, reference_embeddings(tiny, image, **{kind: [one]}), atol=1e-5, rtol=0)
        torch.testing.assert_close(output, extract(image, **{kind: one}, return_tensors=True), atol=1e-5, rtol=0)
    # Regions of one image differ, or the equality above would say nothing of their order.
    assert (outputs[1][0] - outputs[1][1]).abs().max() > 1e-4


@pytest.mark.parametrize("change", [{"padding_side": "left"}, {"pad_token": None}], ids=["left", "no pad token"])
def test_batching_does_not_depend_on_the_tokenizer(tiny, extract, change):
    images, boxes = make_batch("boxes")
    expected = extract(images, boxes=boxes, batch_size=3, return_tensors=True)
    for name, value in change.items():
        setattr(tiny[1].tokenizer, name, value)
    other = pipeline(FEATURES, model=tiny[0], processor=tiny[1], device="cpu")
    for a, b in zip(expected, other(images, boxes=boxes, batch_size=3, return_tensors=True), strict=True):
        assert torch.equal(a, b)


def test_dicts_with_boxes_and_dicts_with_masks_share_a_list(tiny, extract):
    items = [
        {"image": make_image(0), "boxes": make_boxes(0, 2)},
        {"image": make_image(1), "masks": make_masks(1, 3)},
    ]
    outputs = extract(items, batch_size=2, return_tensors=True)
    for item, output in zip(items, outputs, strict=True):
        torch.testing.assert_close(output, extract(item, return_tensors=True), atol=1e-5, rtol=0)


def test_one_image_pass_for_all_regions(tiny_cloc, tiny_pixclip, monkeypatch):
    images, boxes = make_batch("boxes")
    for (model, processor), options in ((tiny_cloc, {}), (tiny_pixclip, {"mode": "pooled"})):
        extract = pipeline(FEATURES, model=model, processor=processor, device="cpu")
        calls = counted(monkeypatch, model.vision_model, "forward")
        extract(images, boxes=boxes, batch_size=2, **options)
        assert [len(call["pixel_values"]) for call in calls] == [2, 2, 1]


def test_mode_reaches_pixclip_and_is_refused_by_cloc(tiny_cloc, tiny_pixclip):
    image, masks = make_image(0), make_masks(0, 2)
    extract = pipeline(FEATURES, model=tiny_pixclip[0], processor=tiny_pixclip[1], device="cpu")
    for mode in ("prompted", "pooled"):
        inputs = tiny_pixclip[1](images=[image], masks=[masks], return_tensors="pt")
        with torch.no_grad():
            expected = F.normalize(tiny_pixclip[0].get_region_features(**inputs, mode=mode).pooler_output[0], dim=-1)
        torch.testing.assert_close(extract(image, masks=masks, mode=mode, return_tensors=True), expected)
    extract = pipeline(FEATURES, model=tiny_cloc[0], processor=tiny_cloc[1], device="cpu")
    with pytest.raises(ValueError, match="`mode`.*CLOCModel.*'pooled'"):
        extract(image, masks=masks, mode="pooled")


def test_output_format(tiny, extract):
    image = make_image(0)
    output = extract(image, boxes=[[4, 5, 20, 25], [0, 0, 8, 8]])
    assert [sorted(region) for region in output] == [["box", "embedding", "mask_area"]] * 2
    assert output[0]["box"] == {"xmin": 4, "ymin": 5, "xmax": 20, "ymax": 25}
    assert [region["mask_area"] for region in output] == [16 * 20, 64]
    assert all(type(region["mask_area"]) is int and type(region["embedding"][0]) is float for region in output)
    tensor = extract(image, boxes=[[4, 5, 20, 25], [0, 0, 8, 8]], return_tensors=True)
    assert tensor.dtype == torch.float32
    torch.testing.assert_close(torch.tensor([region["embedding"] for region in output]), tensor)
    torch.testing.assert_close(tensor.norm(dim=-1), torch.ones(2))


def test_masks_give_their_box_and_area(extract):
    mask = np.zeros((30, 40), dtype=np.uint8)
    mask[6:10, 8:20] = 255
    mask[6, 8] = 0
    (region,) = extract(make_image(0), masks=[mask])
    assert region["box"] == {"xmin": 8, "ymin": 6, "xmax": 20, "ymax": 10}
    assert region["mask_area"] == 4 * 12 - 1


def test_raw_embeddings_are_the_model_s(tiny, extract):
    image, boxes = make_image(2), make_boxes(2, 3)
    with torch.no_grad():
        inputs = tiny[1](images=[image], boxes=[boxes], return_tensors="pt")
        expected = tiny[0].get_region_features(**inputs).pooler_output[0]
    raw = extract(image, boxes=boxes, normalize=False, return_tensors=True)
    torch.testing.assert_close(raw, expected)
    assert (raw.norm(dim=-1) - 1).abs().max() > 1e-3


def test_box_format_and_normalized(extract):
    image = make_image(0)  # 40 x 30
    expected = extract(image, boxes=[[4, 6, 24, 21]], return_tensors=True)
    for boxes, options in (
        ([[4, 6, 20, 15]], {"box_format": "xywh"}),
        ([[0.1, 0.2, 0.6, 0.7]], {"normalized": True}),
    ):
        torch.testing.assert_close(extract(image, boxes=boxes, return_tensors=True, **options), expected)


def test_every_image_form_gives_the_same(extract, tmp_path):
    image, boxes = make_image(0), make_boxes(0, 2)
    path = tmp_path / "image.png"
    image.save(path)
    expected = extract(image, boxes=boxes, return_tensors=True)
    forms = [str(path), path, np.asarray(image), torch.from_numpy(np.array(image).transpose(2, 0, 1))]
    for form in forms:
        assert torch.equal(extract(form, boxes=boxes, return_tensors=True), expected)
        assert torch.equal(extract({"image": form, "boxes": boxes}, return_tensors=True), expected)
        assert torch.equal(extract([form], boxes=[boxes], return_tensors=True)[0], expected)
        assert torch.equal(extract({"image": form}, boxes=boxes, return_tensors=True), expected)


def test_an_url(extract, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # this server is on loopback
    monkeypatch.setenv("PIXCLIP_HF_LOCAL_ADDRESSES", "1")
    image, boxes = make_image(0), make_boxes(0, 2)
    image.save(tmp_path / "image.png")
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        output = extract(f"http://127.0.0.1:{server.server_port}/image.png", boxes=boxes, return_tensors=True)
        server.shutdown()
    assert torch.equal(output, extract(image, boxes=boxes, return_tensors=True))


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


class Records(torch.utils.data.Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


@pytest.mark.parametrize("form", ["generator", "iterator", "torch dataset", "datasets.Dataset", "tuple"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_collections_of_dicts(extract, form, batch_size):
    images, boxes = make_batch("boxes")
    items = [{"image": image, "boxes": one} for image, one in zip(images, boxes, strict=True)]
    expected = [extract(item, return_tensors=True) for item in items]
    if form == "generator":
        inputs = (item for item in items)
    elif form == "iterator":
        inputs = iter(items)
    elif form == "torch dataset":
        inputs = Records(items)
    elif form == "tuple":
        inputs = tuple(items)
    else:
        datasets = pytest.importorskip("datasets")
        columns = {"image": images, "boxes": boxes}
        inputs = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    outputs = extract(inputs, batch_size=batch_size, return_tensors=True)
    assert isinstance(outputs, list) == (form == "tuple")
    for output, one in zip(list(outputs), expected, strict=True):
        torch.testing.assert_close(output, one, atol=1e-5, rtol=0)


def test_a_generator_is_read_as_it_is_used(extract):
    drawn = []

    def items():
        for i in range(5):
            drawn.append(i)
            yield {"image": make_image(i), "boxes": make_boxes(i, 1)}

    next(iter(extract(items())))
    assert len(drawn) < 5


def test_an_empty_list_gives_an_empty_list(extract):
    assert extract([], boxes=[]) == []


def test_half_precision(tiny):
    model, processor = tiny
    image, boxes = make_image(0), make_boxes(0, 3)
    expected = reference_embeddings(tiny, image, boxes=[boxes])
    extract = pipeline(FEATURES, model=model.to(torch.bfloat16), processor=processor, device="cpu")
    output = extract([image, image], boxes=[boxes, boxes[:1]], batch_size=2, return_tensors=True)[0]
    assert output.dtype == torch.float32
    assert F.cosine_similarity(output, expected).min() > 0.99


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (make_image(0), {}, "`boxes` or `masks`"),
        ([make_image(0), make_image(1)], {}, "`boxes` or `masks`"),
        ({"image": make_image(0)}, {}, "`boxes` or `masks`"),
        ([make_image(0), make_image(1)], {"boxes": [[[0, 0, 8, 8]], None]}, "image 1: .*`boxes` or `masks`"),
        ([make_image(0), make_image(1)], {"boxes": [[[0, 0, 8, 8]], [[8, 8, 4, 12]]]}, r"image 1: boxes\[0\]"),
        ({"boxes": [[0, 0, 8, 8]]}, {}, "`image`"),
        ({"image": make_image(0), "box": [[0, 0, 8, 8]]}, {}, "got also box"),
        ({"image": make_image(0), "boxes": [[0, 0, 8, 8]]}, {"boxes": [[0, 0, 8, 8]]}, "`boxes` must be given once"),
        ([make_image(0), make_image(1)], {"boxes": [[[0, 0, 8, 8]]]}, "`boxes`.*got 1 for 2 images"),
        (make_image(0), {"boxes": [[8, 8, 4, 12]]}, "boxes"),
        (make_image(0), {"masks": [np.zeros((30, 40), dtype=bool)]}, "masks"),
    ],
)
def test_bad_input_is_named(extract, inputs, options, message):
    with pytest.raises(ValueError, match=message):
        extract(inputs, **options)


EMPTY = ([], (), np.zeros((0, 4)), torch.zeros(0, 4))


@pytest.mark.parametrize("form", ["list", "pairs", "generator", "dataset"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_detectors_that_found_nothing(extract, classify, form, batch_size):
    """An empty result in its place; the others are as without it."""
    pytest.importorskip("datasets")
    images = [make_image(number) for number in range(5)]
    boxes = [[], make_boxes(1, 2), [], [], make_boxes(4, 1)]
    if form == "generator":
        boxes[2] = EMPTY[2]
    items = [{"image": image, "boxes": own} for image, own in zip(images, boxes, strict=True)]

    def given():
        if form == "pairs":
            return images, {"boxes": boxes}
        if form == "dataset":
            import datasets

            return datasets.Dataset.from_list(items).cast_column("image", datasets.Image()), {}
        return (items if form == "list" else (item for item in items)), {}

    inputs, options = given()
    found = list(extract(inputs, batch_size=batch_size, return_tensors=True, **options))
    assert [tuple(rows.shape) for rows in found] == [(len(own), 16) for own in boxes]
    for number in (1, 4):
        expected = extract(images[number], boxes=boxes[number], return_tensors=True)
        torch.testing.assert_close(found[number], expected, atol=1e-5, rtol=0)
    inputs, options = given()
    labeled = list(classify(inputs, candidate_labels=LABELS, batch_size=batch_size, **options))
    assert [len(rows) for rows in labeled] == [len(own) for own in boxes]


@pytest.mark.parametrize("name", ["boxes", "masks"])
def test_one_image_without_regions(extract, classify, name):
    for empty in EMPTY:
        assert extract(make_image(0), **{name: empty}) == []
        assert classify(make_image(0), candidate_labels=LABELS, **{name: empty}) == []
        assert extract({"image": make_image(0), name: empty}, return_tensors=True).shape == (0, 16)
    with pytest.raises(FileNotFoundError, match="no/such.png"):
        extract("no/such.png", **{name: []})


def test_errors_name_the_item(extract):
    good = {"image": make_image(0), "boxes": make_boxes(0, 1)}
    for bad, kind, message in (
        ({"image": make_image(1), "boxes": [[8, 8, 4, 12]]}, ValueError, r"image 2: boxes\[0\] must have x1 > x0"),
        ({"image": "no/such.png", "boxes": []}, FileNotFoundError, "image 2: .*no/such.png"),
        ({"image": make_image(1)}, ValueError, "image 2: .*`boxes` or `masks`"),
    ):
        items = [good, good, bad, good]
        with pytest.raises(kind, match=message):
            extract(items)
        with pytest.raises(kind, match=message):
            list(extract(item for item in items))


def test_bad_generators_are_named(extract):
    with pytest.raises(ValueError, match="`boxes` or `masks`"):
        list(extract(make_image(i) for i in range(2)))
    with pytest.raises(ValueError, match="`boxes`.*generator"):
        extract((make_image(i) for i in range(2)), boxes=[[[0, 0, 8, 8]]] * 2)


def test_bad_files_are_named(extract, tmp_path):
    with pytest.raises(FileNotFoundError, match="no/such/file.png"):
        extract("no/such/file.png", boxes=[[0, 0, 8, 8]])
    (tmp_path / "corrupt.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="corrupt.png"):
        extract(tmp_path / "corrupt.png", boxes=[[0, 0, 8, 8]])


def test_wrong_types_are_named(extract):
    with pytest.raises(TypeError, match="`inputs`.*got 3"):
        extract(3, boxes=[[0, 0, 8, 8]])
    with pytest.raises(TypeError, match="regions"):
        extract(make_image(0), regions=[[0, 0, 8, 8]])


@pytest.mark.parametrize("template", ["{}", "a photo of {}, {brackets} kept."])
def test_scores_are_the_softmax_of_scaled_cosines(tiny, classify, template):
    model, processor = tiny
    image, masks = make_image(3), make_masks(3, 3)
    texts = [template.replace("{}", label) for label in LABELS]
    with torch.no_grad():
        features = model.get_text_features(**processor(text=texts, return_tensors="pt")).pooler_output
        text_embeds = features / features.norm(dim=-1, keepdim=True)
        region_embeds = reference_embeddings(tiny, image, masks=[masks])
        probabilities = (model.get_logit_scale() * region_embeds @ text_embeds.T).softmax(dim=-1)
    outputs = classify(image, masks=masks, candidate_labels=LABELS, hypothesis_template=template)
    assert len(outputs) == 3
    for output, expected in zip(outputs, probabilities, strict=True):
        assert sorted(output) == ["box", "labels", "mask_area", "scores"]
        assert output["scores"] == sorted(output["scores"], reverse=True)
        found = dict(zip(output["labels"], output["scores"], strict=True))
        torch.testing.assert_close(torch.tensor([found[label] for label in LABELS]), expected, atol=1e-5, rtol=1e-5)
    assert probabilities.std(dim=-1).max() > 1e-4


@pytest.fixture(params=["clip", "siglip"])
def upstream(request, tmp_path):
    """A folder of a tiny CLIP or SigLIP whose scores lie apart, and its zero-shot pipeline of transformers."""
    model, processor = {"clip": tiny_clip, "siglip": tiny_siglip}[request.param]()
    processor.tokenizer.model_max_length = 64
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter += 0.1 * torch.randn_like(parameter)
        model.logit_scale.fill_(1.5)
        if request.param == "siglip":
            model.logit_bias.fill_(-1.25)
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    if request.param == "siglip":
        # As SigLIP's own tokenizer: its tower reads the padding.
        processor.tokenizer.model_input_names = ["input_ids"]
    parts = {"tokenizer": processor.tokenizer, "image_processor": processor.image_processor}
    return str(tmp_path), pipeline("zero-shot-image-classification", model=model, **parts, device="cpu")


def test_scores_are_those_of_the_checkpoint(upstream):
    """The region that is the whole image, of a model as it was built: a softmax for CLIP, a sigmoid for SigLIP."""
    folder, reference = upstream
    image, mask = make_image(1), np.ones((32, 32), dtype=bool)
    expected = reference(image, candidate_labels=LABELS, hypothesis_template="{}")
    options = {"text_pooling": "eos"} if reference.model.config.model_type == "clip" else {}
    model = pixclip_hf.PixCLIPModel.from_vision_text_pretrained(folder, folder, text_projection="linear", **options)
    processor = pixclip_hf.PixCLIPProcessor.from_vision_text_pretrained(folder, folder)
    classify, find = (pipeline(task, model=model, processor=processor, device="cpu") for task in TASKS)
    (found,) = classify(image, masks=[mask], candidate_labels=LABELS)
    assert found["labels"] == [entry["label"] for entry in expected]
    assert found["scores"] == pytest.approx([entry["score"] for entry in expected], abs=1e-5)
    assert np.std(found["scores"]) > 1e-3
    by_itself = model.config.contrastive_objective == "sigmoid"
    assert (abs(sum(found["scores"]) - 1) > 0.05) == by_itself
    detected = find(image, masks=[mask], candidate_labels=LABELS, background=[], threshold=0)
    assert [entry["score"] for entry in detected] == pytest.approx(found["scores"], abs=1e-6)
    with_background = find(image, masks=[mask], candidate_labels=LABELS, threshold=0)
    same = [entry["score"] for entry in with_background] == pytest.approx(found["scores"], abs=1e-6)
    assert same == by_itself


@torch.no_grad()
def test_sigmoid_scores_by_their_formula(upstream):
    """CLOC compares regions by a temperature and a bias of their own."""
    folder, _ = upstream
    model = pixclip_hf.CLOCModel.from_vision_text_pretrained(folder, folder, contrastive_objective="sigmoid")
    processor = pixclip_hf.CLOCProcessor.from_vision_text_pretrained(folder, folder)
    model.region_logit_scale.log_scale.fill_(1.5)
    model.region_logit_scale.bias.fill_(-0.5)
    image, boxes = make_image(3), make_boxes(3, 2)
    output = model(**processor(images=image, boxes=boxes, text=LABELS))
    cosines = (output.region_embeds[0].double() @ output.text_embeds.double().T).numpy()
    expected = 1 / (1 + np.exp(-(np.exp(1.5) * cosines - 0.5)))
    classify = pipeline("zero-shot-region-classification", model=model, processor=processor, device="cpu")
    for row, found in zip(expected, classify(image, boxes=boxes, candidate_labels=LABELS), strict=True):
        scores = dict(zip(found["labels"], found["scores"], strict=True))
        assert [scores[label] for label in LABELS] == pytest.approx(row, abs=1e-5)
    assert expected.std() > 1e-3


@pytest.mark.parametrize("kind", ["boxes", "masks"])
def test_batched_classification_equals_one_by_one(classify, kind):
    images, regions = make_batch(kind)
    outputs = classify(images, **{kind: regions}, candidate_labels=LABELS, batch_size=2)
    assert [len(output) for output in outputs] == COUNTS
    for image, one, output in zip(images, regions, outputs, strict=True):
        for a, b in zip(output, classify(image, **{kind: one}, candidate_labels=LABELS), strict=True):
            assert (a["box"], a["mask_area"], a["labels"]) == (b["box"], b["mask_area"], b["labels"])
            assert a["scores"] == pytest.approx(b["scores"], abs=1e-5)


def test_texts_are_encoded_once_a_call(tiny, classify, monkeypatch):
    images, boxes = make_batch("boxes")
    calls = counted(monkeypatch, tiny[0], "get_text_features")
    before = classify(images, boxes=boxes, candidate_labels=LABELS, batch_size=2)
    assert len(calls) == 1
    with torch.no_grad():
        for parameter in tiny[0].parameters():
            parameter.mul_(-1.5)
    after = classify(images, boxes=boxes, candidate_labels=LABELS, batch_size=2)
    assert len(calls) == 2
    assert before[0][0]["scores"] != pytest.approx(after[0][0]["scores"], abs=1e-4)


def test_top_k_keeps_the_best(classify):
    image, boxes = make_image(0), make_boxes(0, 2)
    everything = classify(image, boxes=boxes, candidate_labels=LABELS)
    for k in (1, 2, 10):
        for some, full in zip(classify(image, boxes=boxes, candidate_labels=LABELS, top_k=k), everything, strict=True):
            assert some["labels"] == full["labels"][:k]
            assert some["scores"] == pytest.approx(full["scores"][:k])


def test_labels_may_be_given_at_construction(tiny):
    fixed = pipeline(
        "zero-shot-region-classification", model=tiny[0], processor=tiny[1], device="cpu", candidate_labels=LABELS
    )
    image, boxes = make_image(0), make_boxes(0, 1)
    assert sorted(fixed(image, boxes=boxes)[0]["labels"]) == sorted(LABELS)
    assert fixed(image, boxes=boxes, candidate_labels=["only this"])[0]["labels"] == ["only this"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "`candidate_labels`"),
        ({"candidate_labels": []}, ValueError, "`candidate_labels`.*empty"),
        ({"candidate_labels": ["a", " "]}, ValueError, r"`candidate_labels\[1\]`"),
        ({"candidate_labels": ["a", "b", "a"]}, ValueError, "`candidate_labels`.*'a' more than once"),
        ({"candidate_labels": "a, b"}, TypeError, "`candidate_labels`.*'a, b'"),
        ({"candidate_labels": ["a", 3]}, TypeError, "`candidate_labels`.*3"),
        (
            {"candidate_labels": ["a"], "hypothesis_template": "photo"},
            ValueError,
            "`hypothesis_template`.*'photo'",
        ),
        ({"candidate_labels": ["a"], "top_k": 0}, ValueError, "`top_k`.*0"),
    ],
)
def test_bad_labels_are_named(classify, options, error, message):
    with pytest.raises(error, match=message):
        classify(make_image(0), boxes=[[0, 0, 8, 8]], **options)


@pytest.mark.parametrize("prefix", ["CLOC", "PixCLIP"])
def test_a_model_without_text_tower_serves_both(prefix, request):
    config_class, model_class, processor_class = (
        getattr(pixclip_hf, prefix + part) for part in ("Config", "Model", "Processor")
    )
    with_text, processor = request.getfixturevalue(f"tiny_{prefix.lower()}")
    model = model_class(
        config_class(
            vision_config=with_text.config.vision_config,
            text_config=None,
            text_hidden_size=24,
            text_model_name="some/llm",
            projection_dim=16,
        )
    ).eval()
    processor = processor_class(processor.image_processor, text_model_name="some/llm")
    tiny = (model, processor)
    images, boxes = make_batch("boxes")
    extract = pipeline(FEATURES, model=model, processor=processor, device="cpu")
    for image, one, output in zip(
        images, boxes, extract(images, boxes=boxes, batch_size=2, return_tensors=True), strict=True
    ):
        torch.testing.assert_close(output, reference_embeddings(tiny, image, boxes=[one]), atol=1e-5, rtol=0)

    classify = pipeline("zero-shot-region-classification", model=model, processor=processor, device="cpu")
    with pytest.raises(ValueError, match="some/llm"):
        classify(images[0], boxes=boxes[0], candidate_labels=LABELS)
    states = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        text_embeds = F.normalize(model.get_text_features(text_states=states).pooler_output, dim=-1)
        scores = model.get_logit_scale() * reference_embeddings(tiny, images[0], boxes=[boxes[0]]) @ text_embeds.T
    options = {"boxes": boxes[0], "candidate_labels": LABELS, "text_states": states}
    for output, expected in zip(classify(images[0], **options), scores.softmax(dim=-1), strict=True):
        found = dict(zip(output["labels"], output["scores"], strict=True))
        torch.testing.assert_close(torch.tensor([found[label] for label in LABELS]), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="`text_states`.*got 2 for 3"):
        classify(images[0], **{**options, "text_states": states[:2]})
    with pytest.raises(ValueError, match="`text_states`.*`hypothesis_template`"):
        classify(images[0], hypothesis_template="a {}", **options)


def test_a_saved_folder_serves_both_pipelines(tiny, extract, classify, tmp_path):
    image, boxes = make_image(0), make_boxes(0, 2)
    tiny[0].save_pretrained(tmp_path)
    tiny[1].save_pretrained(tmp_path)
    loaded = pipeline(FEATURES, model=str(tmp_path), device="cpu")
    assert isinstance(loaded, pixclip_hf.RegionFeatureExtractionPipeline)
    assert torch.equal(
        loaded(image, boxes=boxes, return_tensors=True), extract(image, boxes=boxes, return_tensors=True)
    )
    loaded = pipeline("zero-shot-region-classification", model=str(tmp_path), device="cpu")
    assert loaded(image, boxes=boxes, candidate_labels=LABELS) == classify(image, boxes=boxes, candidate_labels=LABELS)


def test_images_with_about_as_many_regions_share_a_batch(extract, tiny, monkeypatch):
    counts = [6, 1, 5, 2, 1, 6]
    items = [{"image": make_image(i), "boxes": make_boxes(i, count)} for i, count in enumerate(counts)]
    calls = counted(monkeypatch, tiny[0], "get_region_features")
    outputs = extract(items, batch_size=2, return_tensors=True)
    assert [call["region_attention_mask"].sum(1).tolist() for call in calls] == [[1, 1], [2, 5], [6, 6]]
    for item, output in zip(items, outputs, strict=True):
        torch.testing.assert_close(output, extract(item, return_tensors=True), atol=1e-5, rtol=0)


def test_workers_give_the_same(extract):
    images, boxes = make_batch("boxes")
    items = [{"image": image, "boxes": one} for image, one in zip(images, boxes, strict=True)]
    expected = extract(items, batch_size=2, return_tensors=True)
    for inputs in (items, (item for item in items)):
        outputs = extract(inputs, batch_size=2, num_workers=2, return_tensors=True)
        for output, one in zip(outputs, expected, strict=True):
            assert torch.equal(output, one)


def stream(count, drawn):
    """Items of a tenth of the images, over and over."""
    items = [{"image": make_image(i), "boxes": make_boxes(i, 1 + i % 5)} for i in range(10)]
    for i in range(count):
        drawn.append(i)
        yield items[i % 10]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_generator_is_read_a_few_batches_ahead(extract, batch_size):
    drawn, ahead = [], []
    for done, output in enumerate(extract(stream(40, drawn), batch_size=batch_size, return_tensors=True)):
        assert len(output) == 1 + done % 10 % 5
        ahead.append(len(drawn) - done)
    assert len(ahead) == 40
    # Two are drawn to see what the generator yields.
    assert max(ahead) <= (1 if batch_size == 1 else 4 * batch_size) + 2


@pytest.mark.slow
def test_ten_thousand_images_need_no_more_memory_than_a_thousand(extract):
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    levels = []
    for done, _ in enumerate(extract(stream(10_000, []), batch_size=8, return_tensors=True), start=1):
        if done % 1000 == 0:
            levels.append(resident())
    assert len(levels) == 10
    # What every image left behind, were it only its embeddings and pixels, would be well above this.
    assert levels[-1] - levels[0] < 2000 * (3 * 32 * 32 * 4)


@pytest.fixture
def pointing():
    """A region-feature-extraction pipeline of a CLOC that points may prompt, and its model and processor."""
    config = pixclip_hf.CLOCConfig(
        vision_config=VISION_CONFIG, text_config=TEXT_CONFIG, projection_dim=16, prompter_points=True
    )
    torch.manual_seed(0)
    model = pixclip_hf.CLOCModel(config).eval()
    processor = build_tiny(pixclip_hf.CLOCConfig, pixclip_hf.CLOCModel, pixclip_hf.CLOCProcessor)[1]
    return pipeline(FEATURES, model=model, processor=processor, device="cpu"), model, processor


def test_points_in_a_pipeline(pointing):
    extract, model, processor = pointing
    images = [make_image(i) for i in range(3)]
    points = [[[[3, 4]], [[9, 9], [2, 8], [7, 7]]], [[[5, 5], [9, 3]]], []]
    labels = [[[1], [1, 0, 1]], [[0, 1]], []]
    batched = extract(images, points=points, point_labels=labels, batch_size=3, return_tensors=True)
    assert [len(rows) for rows in batched] == [2, 1, 0]
    for image, own, marks, rows in zip(images[:2], points, labels, batched, strict=False):
        alone = reference_embeddings((model, processor), image, points=[own], point_labels=[marks])
        torch.testing.assert_close(rows, alone, atol=1e-5, rtol=0)
    mixed = extract({"image": images[0], "points": [None, points[0][1]], "boxes": [[1, 1, 9, 9], None]})
    assert set(mixed[0]) == {"embedding", "box", "mask_area"}
    assert set(mixed[1]) == {"embedding", "points", "point_labels"}
    assert mixed[1]["point_labels"] == [1, 1, 1]
    boxes = extract(images[0], boxes=[[1, 1, 9, 9]], return_tensors=True)
    torch.testing.assert_close(torch.tensor(mixed[0]["embedding"]), boxes[0], atol=1e-5, rtol=0)


def test_points_without_an_embedding(pointing):
    extract, model, _ = pointing
    with torch.no_grad():
        model.prompter.point_prompt.fc2.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"Region 0, \{'points': \[\[3.0, 4.0\]\], .*, has NaN or infinite values"):
        extract(make_image(0), points=[[[3, 4]]])


def test_points_for_models_without_them(extract):
    with pytest.raises(ValueError, match=r"`region_points` needs a CLOC|points must be None for a model that"):
        extract(make_image(0), points=[[[3, 4]]])
