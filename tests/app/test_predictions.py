"""What the demo computes, draws and remembers, without Gradio and without a browser."""

import numpy as np
import pytest
import torch
from conftest import build_tiny
from PIL import Image
from tiny_sam import save_tiny_sam

import pixclip_hf
from pixclip_hf import RegionEncoder
from pixclip_hf.app.drawing import draw_drawn, draw_place, enlarged, shown_scale
from pixclip_hf.app.predictions import (
    Region,
    TextScore,
    box_of_corners,
    cut_texts,
    embed_regions,
    find_text,
    mask_of_layers,
    read_texts,
    region_kinds,
    score_regions,
    search_region,
    search_text,
)
from pixclip_hf.app.results import place_html, scores_html
from pixclip_hf.app.session import ALSO_ON, BESIDE, BOX, NEW_POINT, Session
from pixclip_hf.mask_models import MaskModel, masks_from_points

BOXED = Region(box=(2.0, 3.0, 20.0, 18.0))
POINTED = Region(points=((5.0, 6.0), (20.0, 20.0)), point_labels=(1, 0))


@pytest.fixture(scope="module")
def image():
    return Image.linear_gradient("L").resize((40, 30)).convert("RGB")


@pytest.fixture(scope="module")
def masked():
    mask = np.zeros((30, 40), dtype=bool)
    mask[4:20, 8:15] = mask[10:12, 15:30] = True
    return Region(mask=mask)


@pytest.fixture(scope="module")
def cloc():
    return RegionEncoder(*build_tiny(pixclip_hf.CLOCConfig, pixclip_hf.CLOCModel, pixclip_hf.CLOCProcessor))


@pytest.fixture(scope="module")
def pixclip():
    classes = (pixclip_hf.PixCLIPConfig, pixclip_hf.PixCLIPModel, pixclip_hf.PixCLIPProcessor)
    return RegionEncoder(*build_tiny(*classes))


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sam")
    save_tiny_sam(folder)
    return MaskModel.from_pretrained(str(folder), device="cpu")


def test_regions_of_all_kinds_keep_their_order(cloc, image, masked):
    regions = [masked, BOXED, Region(box=(0.0, 0.0, 9.0, 9.0)), masked, BOXED]
    found = embed_regions(cloc, image, regions)
    boxes = cloc.encode_regions(image, boxes=[[2, 3, 20, 18], [0, 0, 9, 9]], prompt="box")
    masks = cloc.encode_regions(image, masks=[masked.mask, masked.mask], prompt="mask")
    assert np.abs(boxes[0] - masks[0]).max() > 1e-4
    np.testing.assert_allclose(found, np.stack([masks[0], boxes[0], boxes[1], masks[0], boxes[0]]), atol=1e-6)
    with pytest.raises(ValueError, match="No region is drawn"):
        embed_regions(cloc, image, [])


def test_a_model_of_masks_takes_boxes_as_rectangles(pixclip, image, masked):
    rectangle = np.zeros((30, 40), dtype=bool)
    rectangle[3:18, 2:20] = True
    found = embed_regions(pixclip, image, [BOXED, masked, Region(mask=rectangle)])
    np.testing.assert_allclose(found[0], found[2], atol=1e-6)
    assert np.abs(found[0] - found[1]).max() > 1e-4


def test_points_need_a_model_that_reads_them(cloc, image, sam):
    assert region_kinds(cloc) == ("box", "mask") and region_kinds(cloc, sam) == ("box", "mask", "point")
    with pytest.raises(ValueError, match="This model reads no points"):
        embed_regions(cloc, image, [POINTED])
    (mask,) = masks_from_points(sam, image, [[[5, 6], [20, 20]]], [[1, 0]])
    found = embed_regions(cloc, image, [BOXED, POINTED], sam)
    np.testing.assert_allclose(found[1], embed_regions(cloc, image, [Region(mask=mask)])[0], atol=1e-6)


def test_a_model_that_reads_points_gets_them(image):
    model, processor = build_tiny(pixclip_hf.CLOCConfig, pixclip_hf.CLOCModel, pixclip_hf.CLOCProcessor)
    config = pixclip_hf.CLOCConfig.from_dict(model.config.to_dict() | {"prompter_points": True})
    torch.manual_seed(0)
    encoder = RegionEncoder(pixclip_hf.CLOCModel(config), processor)
    assert region_kinds(encoder) == ("box", "mask", "point")
    found = embed_regions(encoder, image, [POINTED, BOXED])
    wanted = encoder.encode_regions(image, points=[[[5, 6], [20, 20]]], point_labels=[[1, 0]], prompt="point")
    np.testing.assert_allclose(found[0], wanted[0], atol=1e-6)


@pytest.mark.parametrize("family", ("cloc", "pixclip"))
def test_scores_are_those_of_the_pipeline(family, image, request):
    encoder = request.getfixturevalue(family)
    texts = ["dark", "bright", "a long text about a gradient"]
    (best,) = score_regions(encoder, image, [BOXED], texts)
    classify = pixclip_hf.ZeroShotRegionClassificationPipeline(
        model=encoder.model, processor=encoder.processor, device="cpu"
    )
    (wanted,) = classify(image, boxes=[list(BOXED.box)], candidate_labels=texts)
    assert [score.text for score in best] == wanted["labels"]
    np.testing.assert_allclose([score.share for score in best], wanted["scores"], atol=1e-5)
    assert all(-1 <= score.cosine <= 1 for score in best) and best[0].cosine >= best[-1].cosine


def test_where_a_text_is(cloc, pixclip, image):
    found = find_text(cloc, image, "dark")
    boxes, scores = cloc.find_scored_boxes(image, ["dark"])
    assert found.values.shape == (24, 24) and found.box == boxes[0].tolist() and found.score == float(scores[0])
    assert find_text(pixclip, image, "dark").box is None
    assert draw_place(image, found).size == enlarged(image).size
    assert "finds no boxes" in place_html(find_text(pixclip, image, "dark")) and "Box" in place_html(found)
    with pytest.raises(ValueError, match="No text is given"):
        find_text(cloc, image, " ")


def test_texts_are_read_by_line(cloc):
    assert read_texts(" a disc\n\na star \n") == ["a disc", "a star"]
    for lines in (None, "", " \n "):
        with pytest.raises(ValueError, match="No text is given"):
            read_texts(lines)
    with pytest.raises(ValueError, match="got 'a disc' more than once"):
        read_texts("a disc\na star\na disc ")
    assert cut_texts(cloc, ["a disc", 300 * "long "]) == 1
    assert "only the beginning counts" in scores_html([], [], cut=1) and scores_html([], []).count("<p") == 0


def test_corners_in_any_order_give_a_box_inside():
    wanted = (2.0, 3.0, 20.0, 18.0)
    for first, second in (((2, 3), (20, 18)), ((20, 18), (2, 3)), ((2, 18), (20, 3))):
        assert box_of_corners(first, second, (40, 30)) == wanted
    assert box_of_corners((-5, 29.9), (50, 40), (40, 30)) == (0.0, 29.0, 40.0, 30.0)
    assert box_of_corners((7, 7), (7, 7), (40, 30)) == (7.0, 7.0, 8.0, 8.0)


def test_what_is_painted_becomes_a_mask():
    layer = np.zeros((300, 400, 4), dtype=np.uint8)
    layer[100:200, 40:60] = 255
    mask = mask_of_layers([Image.fromarray(layer)], (40, 30))
    assert mask.shape == (30, 40) and mask[10:20, 4:6].all() and mask.sum() == 20
    # A stroke that is thinner than a pixel of the image stays.
    thin = np.zeros((300, 400, 4), dtype=np.uint8)
    thin[101, 41:44] = 255
    assert mask_of_layers([Image.fromarray(thin)], (40, 30)).sum() == 1
    both = mask_of_layers([Image.fromarray(layer), Image.fromarray(thin[:, ::-1].copy())], (40, 30))
    assert both.sum() == 21
    with pytest.raises(ValueError, match="Nothing is painted"):
        mask_of_layers([Image.fromarray(np.zeros_like(layer))], (40, 30))
    with pytest.raises(ValueError, match="Nothing is painted"):
        mask_of_layers([], (40, 30))


def test_a_region_is_one_of_three():
    with pytest.raises(ValueError, match="got none"):
        Region()
    with pytest.raises(ValueError, match="got box, points"):
        Region(box=(0, 0, 1, 1), points=((0, 0),), point_labels=(1,))
    with pytest.raises(ValueError, match="one label per point, got 0 for 1"):
        Region(points=((0, 0),))


def test_clicks(image):
    empty = Session()
    with pytest.raises(ValueError, match="There is no image"):
        empty.clicked(0, 0, BOX)
    session, scale = empty.with_image(image), shown_scale(image.size)
    assert scale == 13 and enlarged(image).size == (520, 390)
    session = session.clicked(260, 195, BOX)
    assert session.regions == () and "opposite corner" in session.summary
    assert session.without_last().corner is None
    session = session.clicked(129, 64, BOX)
    (region,) = session.regions
    np.testing.assert_allclose(region.box, [129.5 / 13, 64.5 / 13, 260.5 / 13, 195.5 / 13])
    with pytest.raises(ValueError, match="no region of points"):
        session.clicked(0, 0, ALSO_ON)
    session = session.clicked(130, 130, NEW_POINT).clicked(143, 130, ALSO_ON).clicked(519, 389, BESIDE)
    assert session.regions[1].point_labels == (1, 1, 0) and len(session.regions) == 2
    assert session.summary == "2 regions of an image of 40 × 30 pixels."
    assert session.without_last().regions == session.regions[:1]
    assert session.with_image(image).regions == ()


def test_pictures_show_what_was_drawn(image, masked):
    plain = np.asarray(enlarged(image)).astype(int)

    def changed(regions, corner=None):
        return np.abs(np.asarray(draw_drawn(image, regions, corner)) - plain).max(axis=2) > 8

    box, mask, points = (changed([region]) for region in (BOXED, masked, POINTED))
    assert box[3 * 13, 100] and not box[10 * 13, 8 * 13]  # its outline, and not what is inside
    assert mask[5 * 13, 10 * 13] and not mask[25 * 13, 35 * 13]
    assert points[6 * 13, 5 * 13] and points[20 * 13, 20 * 13]
    assert changed([], (20, 20))[20 * 13, 20 * 13] and not changed([]).any()
    assert shown_scale((4000, 3000)) == 1024 / 4000 and shown_scale((600, 20)) == 1.0
    assert enlarged(Image.new("RGB", (4000, 3))).size == (1024, 1)


def test_texts_on_the_page_are_escaped(masked):
    html = scores_html([masked], [[TextScore("<img src=x onerror=alert(1)>", 0.5, 1.0)]])
    assert "<img" not in html and "&lt;img" in html and "100 %" in html


@pytest.mark.slow
def test_search_by_text_and_by_region(cloc, image, masked, sam, tmp_path):
    pytest.importorskip("lancedb")
    from pixclip_hf.embedding.command import main
    from pixclip_hf.search import Collection

    for part in (cloc.model, cloc.processor):
        part.save_pretrained(tmp_path / "model")
    main(["--source", "scenes:4", "--model", str(tmp_path / "model"), "--output", str(tmp_path / "photos")])
    collection = Collection(tmp_path / "photos", store="exact")
    (hits,) = collection.search("a disc", top=3)
    found = search_text(collection, "a disc", top=3)
    assert [hit.id for hit in found] == [hit.id for hit in hits] and max(found[0].image.size) == 256
    by_box, by_mask = (search_region(collection, image, region, top=3) for region in (BOXED, masked))
    assert [hit.cosine for hit in by_box] != [hit.cosine for hit in by_mask]
    with pytest.raises(ValueError, match="A search takes a box or a mask"):
        search_region(collection, image, POINTED)
    assert len(search_region(collection, image, POINTED, top=2, mask_model=sam)) == 2
