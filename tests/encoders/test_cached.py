"""The encoding cache: nothing is computed twice, and nothing stale is read."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from stand_ins import tiny_clip

from pixclip_hf.encoders.cached import CachedEncoder, fingerprint
from pixclip_hf.encoders.region_encoder import RegionEncoder
from pixclip_hf.encoders.view_encoder import ViewEncoder
from pixclip_hf.images import StoredImage
from pixclip_hf.scenes.dataset import make_scene, scenes_dataset


@pytest.fixture
def scenes():
    return [make_scene(index, size=32) for index in range(5)]


def encode(encoder, scenes):
    images = encoder.encode_images([scene["image"] for scene in scenes])
    regions = encoder.encode_records(scenes)
    texts = encoder.encode_texts([region["caption"] for scene in scenes for region in scene["regions"]])
    return images, regions, texts


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ("cloc", "pixclip"))
def test_a_second_run_reads_what_the_first_wrote(family, request, scenes, tmp_path):
    parts = request.getfixturevalue(f"tiny_{family}")
    plain = encode(CachedEncoder(RegionEncoder(*parts), progress=False), scenes)
    first = CachedEncoder(RegionEncoder(*parts), tmp_path, shard_size=2, progress=False)
    written = encode(first, scenes)
    texts = sum(len(scene["regions"]) for scene in scenes)
    assert first.computed == 3 + 3 + -(-texts // 2) == len(list(tmp_path.glob("*.safetensors")))
    assert not list(tmp_path.glob("*.tmp"))
    second = CachedEncoder(RegionEncoder(*parts), tmp_path, shard_size=2, progress=False)
    read = encode(second, scenes)
    assert second.computed == 0
    assert_same(written, plain)
    for one, other in zip(written, read, strict=True):
        assert_same(one if isinstance(one, list) else [one], other if isinstance(other, list) else [other])


def test_an_interrupted_run_goes_on(tiny_cloc, scenes, tmp_path):
    encoder = RegionEncoder(*tiny_cloc)
    images, embed = [scene["image"] for scene in scenes], encoder.encode_images

    def fail_at_the_third(part, **options):
        if part[0].tobytes() == images[2].tobytes():
            raise KeyboardInterrupt
        return embed(part, **options)

    encoder.encode_images = fail_at_the_third
    with pytest.raises(KeyboardInterrupt):
        CachedEncoder(encoder, tmp_path, shard_size=2, progress=False).encode_images(images)
    encoder.encode_images = embed
    again = CachedEncoder(encoder, tmp_path, shard_size=2, progress=False)
    torch.testing.assert_close(
        again.encode_images(images), embed(images, convert_to_tensor=True), atol=1e-5, rtol=1e-5
    )
    assert again.computed == 2


def test_what_changes_is_computed_anew(tiny_pixclip, scenes, tmp_path):
    model, processor = tiny_pixclip

    def computed(function, **options):
        encoder = CachedEncoder(RegionEncoder(model, processor, **options), tmp_path, progress=False)
        function(encoder)
        return encoder.computed

    def regions(encoder):
        return encoder.encode_records(scenes)

    assert computed(regions) == 1 and computed(regions) == 0
    # A mask, a name of what is shown, the settings, the processor, the weights.
    scenes[0]["regions"][0]["mask"] = scenes[0]["regions"][1]["mask"]
    assert computed(regions) == 1 and computed(regions) == 0
    assert computed(lambda encoder: encoder.encode_records(scenes, name="crops")) == 1
    assert computed(regions, max_length=5) == 1
    images = [scene["image"] for scene in scenes]
    for unscaled in (False, True):
        assert computed(lambda encoder, unscaled=unscaled: encoder.encode_images(images, unscaled)) == 1
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    assert computed(regions) == 1 and computed(regions) == 0
    with torch.no_grad():
        model.visual_projection.weight[0, 0] += 1e-6
    assert computed(regions) == 1 and computed(regions) == 0


def test_what_is_shown_of_a_region(tiny_cloc, scenes):
    """`show` turns each region into a record of its own; the rows stay with their image."""
    encoder = CachedEncoder(RegionEncoder(*tiny_cloc), shard_size=2, progress=False)
    scenes[1]["regions"] = []

    def show(image, region):
        return {"image": image.rotate(90), "regions": [region]}

    found = encoder.encode_records(scenes, show, name="turned")
    assert [len(rows) for rows in found] == [len(scene["regions"]) for scene in scenes]
    turned = [{**scene, "image": scene["image"].rotate(90)} for scene in scenes]
    assert_same(found, encoder.encode_records(turned))


def test_paths_and_stored_images(tiny_cloc, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    encoder = CachedEncoder(RegionEncoder(*tiny_cloc), tmp_path / "cache", progress=False)
    found = encoder.encode_images([str(tmp_path / "a.png")])
    torch.testing.assert_close(found, encoder.encode_images([image]), atol=1e-6, rtol=1e-6)
    assert encoder.computed == 2
    status = os.stat(tmp_path / "a.png")
    image.rotate(90).save(tmp_path / "a.png")
    os.utime(tmp_path / "a.png", ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    assert (encoder.encode_images([str(tmp_path / "a.png")]) - found).abs().max() > 1e-4
    scenes = scenes_dataset(3, size=32)
    stored = [StoredImage(scenes, index) for index in range(3)]
    expected = encoder.encode_images([scenes[index]["image"] for index in range(3)])
    torch.testing.assert_close(encoder.encode_images(stored), expected, atol=1e-6, rtol=1e-6)
    before = encoder.computed
    encoder.encode_images(stored)
    assert encoder.computed == before
    with pytest.raises(TypeError, match="`image` must be a PIL image, a path or a StoredImage, got int"):
        encoder.encode_images([3])


def test_fingerprints(tiny_cloc):
    model, processor = tiny_clip()
    keys = {fingerprint(ViewEncoder(model, processor, view)) for view in ("crop", "blur")}
    keys.add(fingerprint(RegionEncoder(*tiny_cloc)))
    assert len(keys) == 3
    assert fingerprint(ViewEncoder(model, processor, "blur")) in keys
    with pytest.raises(ValueError, match="`shard_size` must be at least 1, got 0"):
        CachedEncoder(RegionEncoder(*tiny_cloc), shard_size=0)
