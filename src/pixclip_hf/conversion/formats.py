"""What kind of checkpoint a file is, by names that only this kind has."""

from collections.abc import Container

from .checkpoint import Checkpoint


def check_source(checkpoint: Checkpoint, source: str) -> None:
    """Refuses a file that is not what it was called.

    Raises:
        ValueError: the names in the file belong to another source, or to none.
    """
    kinds, description = kind_of(checkpoint.tensors)
    if source not in kinds:
        hint = f": convert it as {' or '.join(map(repr, kinds))}" if kinds else ""
        raise ValueError(f"{str(checkpoint.path)!r} is no {source!r} checkpoint, but {description}{hint}.")


def kind_of(names: Container[str]) -> tuple[tuple[str, ...], str]:
    """(sources that such a file may be, what it is)."""
    for known, kinds, description in (
        ("visual.alpha_patch_embed.proj.weight", ("pixclip",), "a PixCLIP with EVA02-CLIP's image tower"),
        ("visual.patch_embed.proj.weight", (), "an EVA-CLIP or timm tower without a mask projection"),
        ("visual.conv1_alpha.weight", ("alpha-clip",), "an Alpha-CLIP"),
        ("conv1_alpha.weight", ("alpha-clip",), "the visual half of an Alpha-CLIP"),
        ("visual.layer1.0.conv1.weight", (), "a CLIP with a ResNet as image tower"),
        ("input_resolution", ("clip",), "OpenAI's own CLIP"),
        ("visual.conv1.weight", ("clip", "open-clip"), "a CLIP without a mask projection"),
        (
            "vision_model.embeddings.patch_embedding.weight",
            (),
            "a checkpoint of transformers, which `from_vision_text_pretrained` takes",
        ),
    ):
        if known in names:
            return kinds, description
    return (), "a file of unknown kind"
