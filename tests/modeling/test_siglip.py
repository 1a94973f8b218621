"""SigLIP with its own text tower: step 0 equals the model that the weights came from, in any batch."""

import pytest
import torch
import transformers
from builders import build_batch, build_config, text_config, vision_config
from transformers import AutoModel

import pixclip_hf
from pixclip_hf.modeling.modeling_text import encode_text

MODELS = {"cloc": pixclip_hf.CLOCModel, "pixclip": pixclip_hf.PixCLIPModel}
PROCESSORS = {"cloc": pixclip_hf.CLOCProcessor, "pixclip": pixclip_hf.PixCLIPProcessor}
SIZES = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {"hidden_size": 32, "image_size": 32, "patch_size": 8, **SIZES}
# The text tower's own head brings its states to the width of the images, as in the giant SigLIP 2.
TEXT = {"hidden_size": 24, "projection_size": 32, "max_position_embeddings": 16, **SIZES}
TOKENS = {"vocab_size": 259, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 258}


def build_source(name):
    text = TEXT | TOKENS
    if name == "siglip":
        return transformers.SiglipModel(transformers.SiglipConfig(vision_config=VISION, text_config=text))
    if name == "siglip2":
        vision = {name: value for name, value in VISION.items() if name != "image_size"} | {"num_patches": 16}
        return transformers.Siglip2Model(transformers.Siglip2Config(vision_config=vision, text_config=text))
    return transformers.SiglipTextModel(transformers.SiglipTextConfig(**text))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folders of a tiny SigLIP, a SigLIP 2 of variable resolution and a text tower alone, whose weights matter."""
    root = tmp_path_factory.mktemp("sources")
    for number, name in enumerate(("siglip", "siglip2", "text")):
        torch.manual_seed(number)
        source = build_source(name)
        with torch.no_grad():
            for parameter in source.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
            if name != "text":
                # Above CLIP's bound of 4.6, as public checkpoints are.
                source.logit_scale.fill_(4.7655)
                source.logit_bias.fill_(-12.9)
        source.save_pretrained(root / name)
    return {name: str(root / name) for name in ("siglip", "siglip2", "text")}


@pytest.fixture
def pixels():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def tokens(length=16, seed=0):
    """Three texts of different lengths, filled up as the tokenizer does, and their mask."""
    ids = torch.randint(2, 258, (3, length), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(length) < torch.tensor([[4], [length - 3], [length]])).long()
    return ids * mask, mask


def build(family, sources, vision="siglip", text="siglip", **changes):
    return MODELS[family].from_vision_text_pretrained(sources[vision], sources[text], **changes)


@torch.no_grad()
@pytest.mark.parametrize("family", MODELS)
def test_equals_its_siglip_in_features_and_logits(family, sources, pixels):
    source, model = AutoModel.from_pretrained(sources["siglip"]), build(family, sources)
    ids, mask = tokens()
    expected = source(input_ids=ids, pixel_values=pixels)
    assert expected.logits_per_image.std() > 1
    for attention_mask in (mask, None, torch.ones_like(mask)):
        found = model(pixels, input_ids=ids, attention_mask=attention_mask)
        for name in ("image_embeds", "text_embeds", "logits_per_image", "logits_per_text"):
            assert torch.equal(found[name], expected[name]), name
    assert torch.equal(model.get_text_features(ids, mask).pooler_output, source.get_text_features(ids).pooler_output)
    expected = source.get_image_features(pixels).pooler_output
    assert torch.equal(model.get_image_features(pixels).pooler_output, expected)
    if family == "pixclip":
        masks = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(1)) > 0.5
        assert torch.equal(model.get_region_features(pixels, masks).pooler_output[:, 0], expected)


@torch.no_grad()
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("text", ("siglip2", "text"))
def test_text_towers_of_other_checkpoints(text, family, sources):
    model = build(family, sources, text=text)
    source = AutoModel.from_pretrained(sources[text])
    ids, mask = tokens()
    expected = getattr(source, "text_model", source)(ids).pooler_output
    assert torch.equal(model.get_text_features(ids, mask).pooler_output, expected)
    # Two sides that have not met have no temperature in common.
    assert model.config.contrastive_objective == "softmax" and model.get_logit_bias() is None


@torch.no_grad()
def test_a_text_does_not_depend_on_its_batch(sources):
    """Neither on the padding side, nor on the length of the batch, nor on what stands in the padding."""
    model = build("pixclip", sources)
    ids, mask = tokens()
    expected = model.get_text_features(ids, mask).pooler_output
    noise = torch.where(mask.bool(), ids, torch.randint(2, 258, ids.shape))
    left = [
        torch.stack([row.roll(16 - int(m.sum())) for row, m in zip(rows, mask, strict=True)]) for rows in (noise, mask)
    ]
    wide = [torch.nn.functional.pad(rows, (0, 9), value=value) for rows, value in ((noise, 7), (mask, 0))]
    for inputs in ((noise, mask), left, wide):
        assert torch.equal(model.get_text_features(*inputs).pooler_output, expected)
    for row in range(3):
        length = int(mask[row].sum())
        alone = model.get_text_features(ids[row : row + 1, :length], mask[row : row + 1, :length]).pooler_output
        torch.testing.assert_close(alone[0], expected[row], atol=1e-5, rtol=1e-5)
    longer, wide = torch.full((1, 17), 5), torch.ones(1, 17)
    with pytest.raises(ValueError, match="at most 16 tokens per text.*got 17"):
        model.get_text_features(longer, wide)
    with pytest.raises(ValueError, match="`position_ids` must be None for a 'siglip_text_model' tower"):
        model.get_text_features(ids, mask, position_ids=torch.arange(16)[None])


def test_the_padding_of_siglip_2_is_not_what_its_configuration_says(sources):
    config = transformers.SiglipTextConfig(**TEXT, vocab_size=256_000)
    assert config.pad_token_id == 1
    tower = transformers.SiglipTextModel(config).eval()
    ids = torch.tensor([[5, 6, 1]])
    with torch.no_grad():
        found = encode_text(tower, ids, None, "tower").pooler_output
        expected = tower(torch.nn.functional.pad(ids, (0, 13), value=0)).pooler_output
        assert torch.equal(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("family", MODELS)
def test_scale_and_bias(family, sources, tmp_path, pixels):
    """CLIP's bound on the temperature holds for a softmax alone."""
    model = build(family, sources)
    assert model.config.contrastive_objective == "sigmoid"
    assert model.logit_scale().item() == pytest.approx(117.4, abs=0.1)
    assert model.logit_scale.get_bias().item() == pytest.approx(-12.9)
    if family == "cloc":
        assert (model.get_logit_scale().item(), model.get_logit_bias().item()) == (
            pytest.approx(14.285, abs=1e-2),
            -10,
        )
    softmax = build(family, sources, contrastive_objective="softmax")
    assert softmax.logit_scale().item() == pytest.approx(100) and softmax.get_logit_bias() is None
    given = build(family, sources, logit_scale_init_value=2.0, logit_bias_init_value=-3.0)
    assert given.logit_scale.log_scale == 2 and given.logit_scale.bias == -3
    model.save_pretrained(tmp_path)
    again, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids, mask = tokens()
    both = [one(pixels, input_ids=ids, attention_mask=mask).logits_per_image for one in (model, again)]
    assert torch.equal(*both)
    # A region model that was trained with a sigmoid gives it on.
    heir = MODELS[family].from_vision_text_pretrained(tmp_path, tmp_path, text_projection="linear")
    assert torch.equal(heir(pixels, input_ids=ids, attention_mask=mask).logits_per_image, both[0])


def build_siglip_tokenizer(tokenizer, lowers):
    from tokenizers import normalizers

    tokenizer.model_max_length = 9
    tokenizer.init_kwargs["do_lower_case"] = True
    if lowers:
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


@torch.no_grad()
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("lowers", (True, False))
def test_processor(lowers, family, sources, tiny_tokenizer, tmp_path):
    """Texts of the tower's length, in lower case, whether the tokenizer sees to it or only says so."""
    build_siglip_tokenizer(tiny_tokenizer, lowers).save_pretrained(sources["siglip"])
    transformers.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(sources["siglip"])
    processor = PROCESSORS[family].from_vision_text_pretrained(sources["siglip"], sources["siglip"])
    processor.save_pretrained(tmp_path)
    model, source = build(family, sources), AutoModel.from_pretrained(sources["siglip"])
    for one in (processor, PROCESSORS[family].from_pretrained(tmp_path)):
        assert one.reads_padding and one.lowercase_texts is not lowers
        inputs = one(text=["A Cat", "Two dogs and a ", "a cat"])
        assert inputs["input_ids"].shape == (3, 16) and inputs["attention_mask"].all()
        reference = tiny_tokenizer(["a cat", "two dogs and a ", "a cat"], padding="max_length", max_length=16,
                                   truncation=True, return_tensors="pt")  # fmt: skip
        assert torch.equal(inputs["input_ids"], reference["input_ids"])
        found = model.get_text_features(**inputs).pooler_output
        assert torch.equal(found, source.get_text_features(reference["input_ids"]).pooler_output)
        assert torch.equal(found[0], found[2])
    regions = processor(
        images=torch.zeros(3, 40, 40, dtype=torch.uint8), boxes=[[0, 0, 9, 9]], region_text=["cut here please, now"],
        max_length=5,
    )  # fmt: skip
    assert regions["region_input_ids"].shape == (1, 1, 16)
    assert regions["region_input_ids"][0, 0, 4:].tolist() == [258, *[0] * 11]
    for changes, message in (
        ({"padding": "longest"}, "padding must be None or True or 'max_length' for a text tower.*'longest'"),
        ({"padding_side": "left"}, "padding_side must be None or 'right'.*'left'"),
        ({"truncation": False}, r"text has 23 tokens, more than the text tower takes, 16"),
    ):
        with pytest.raises(ValueError, match=message):
            processor(text="twenty characters ...", **changes)
    with pytest.raises(ValueError, match="reads_padding=True needs a tokenizer whose model_max_length.*got no tok"):
        PROCESSORS[family](processor.image_processor, reads_padding=True)
    with pytest.raises(ValueError, match="max_position_embeddings must be None for a 'siglip_text_model' tower"):
        PROCESSORS[family].from_vision_text_pretrained(
            sources["siglip"], sources["siglip"], max_position_embeddings=32
        )


@pytest.mark.parametrize("family", MODELS)
def test_trains(family, sources):
    """Every parameter of both towers, and scale and bias, get a gradient."""
    model = build(family, sources).train()
    batch = build_batch(family)
    for name in ("input_ids", "region_input_ids"):
        batch[name] = batch[name] + 5
    output = model(**batch)
    output.loss.backward()
    assert output.loss.isfinite()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without
    assert model.logit_scale.bias.grad != 0 and model.logit_scale.log_scale.grad != 0


def test_configurations(sources):
    siglip = text_config("siglip_text_model", projection_size=40)
    for family in MODELS:
        config = build_config(family, text_config=siglip, text_pooling=None)
        assert (config.text_pooling, config.text_hidden_size) == ("tower", 40)
        assert build_config(family, text_pooling=None).text_pooling == {"cloc": "eos", "pixclip": "mean"}[family]
    for changes, message in (
        ({"text_config": siglip, "text_pooling": "mean"}, "got 'mean' for 'siglip_text_model'"),
        ({"text_pooling": "tower"}, "'tower' for 'clip_text_model'"),
        ({"text_config": siglip, "text_pooling": None, "text_hidden_size": 24}, r"projection_size` \(40\)"),
        (
            {"contrastive_objective": "hinge"},
            "`contrastive_objective` must be one of 'softmax', 'sigmoid', got 'hinge'",
        ),
        ({"equal_texts": "maybe"}, "`equal_texts` must be one of 'left_out', 'positive', got 'maybe'"),
        ({"equal_texts": "positive"}, "`equal_texts='positive'` needs `contrastive_objective='sigmoid'`"),
    ):
        with pytest.raises(ValueError, match=message):
            build_config("pixclip", **changes)
    with pytest.raises(ValueError, match="can be changed in CLIP text towers"):
        build("pixclip", sources, max_position_embeddings=32)
    tower = AutoModel.from_config(transformers.SiglipTextConfig(**TEXT, **TOKENS))
    with pytest.raises(ValueError, match="`pooling` 'mean' does not fit a 'siglip_text_model' tower"):
        encode_text(tower, torch.ones(1, 4, dtype=torch.long), None, "mean")
    assert vision_config("siglip")["model_type"] == "siglip_vision_model"


@torch.no_grad()
def test_one_image_equals_where_the_weights_lie_alike(sources, pixels):
    """The last product of one image multiplies a matrix with a vector, which MKL rounds by the address of the matrix;
    transformers maps checkpoints into memory at any address."""
    source, model = AutoModel.from_pretrained(sources["siglip"]), build("pixclip", sources)
    for one in (source, model):
        for parameter in one.parameters():
            parameter.data = parameter.data.clone()
    expected = source.get_image_features(pixels[:1]).pooler_output
    assert torch.equal(model.get_image_features(pixels[:1]).pooler_output, expected)


@pytest.mark.parametrize("family", MODELS)
def test_loss_equals_its_siglips(family, sources, pixels):
    source, model = AutoModel.from_pretrained(sources["siglip"]), build(family, sources)
    ids, mask = tokens()
    expected = source(input_ids=ids, pixel_values=pixels, return_loss=True).loss
    found = model(pixels, input_ids=ids, attention_mask=mask, return_loss=True)
    assert found.loss_parts.keys() == {"image_text"}
    torch.testing.assert_close(found.loss, expected, atol=1e-5, rtol=1e-6)


@torch.no_grad()
def test_exports_texts_of_any_length(sources):
    from pixclip_hf.export import export_text_half

    model = build("cloc", sources)
    exported = export_text_half(model, "torch")
    ids, mask = tokens()
    for length in (16, 7):
        expected = torch.nn.functional.normalize(
            model.get_text_features(ids[:, :length], mask[:, :length]).pooler_output, dim=-1
        )
        found = exported(input_ids=ids[:, :length], attention_mask=mask[:, :length])["text_embeds"]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
