"""Tiny models and batches of every kind, a loop reference of the contrastive loss, and ranks without processes."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import AutoConfig

import pixclip_hf

FAMILIES = ("cloc", "pixclip")
VISION_KINDS = ("clip", "siglip", "eva02")
TEXT_KINDS = ("clip_text", "bert", "llama")
CONFIGS = {"cloc": pixclip_hf.CLOCConfig, "pixclip": pixclip_hf.PixCLIPConfig}
MODELS = {"cloc": pixclip_hf.CLOCModel, "pixclip": pixclip_hf.PixCLIPModel}
VISION_MODELS = {"cloc": pixclip_hf.CLOCVisionModel, "pixclip": pixclip_hf.PixCLIPVisionModel}
POOLINGS = {"clip_text": "eos", "bert": "cls", "llama": "mean"}
VOCABULARY, EOS = 60, 59


def vision_config(kind, **changes):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {"model_type": f"{kind}_vision_model", "image_size": 32, "patch_size": 8, **sizes, **changes}


def text_config(kind, **changes):
    config = {
        "model_type": {"clip_text": "clip_text_model"}.get(kind, kind),
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 40,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": EOS,
    }
    if kind == "bert":
        config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return config | changes


def text_tower_config(kind, **changes):
    config = text_config(kind, **changes)
    return AutoConfig.for_model(config.pop("model_type"), **config)


def build_config(family, vision="clip", text="clip_text", **changes):
    given = {
        "vision_config": vision_config(vision),
        "text_config": None if text is None else text_config(text),
        "text_hidden_size": 24 if text is None else None,
        "text_pooling": POOLINGS.get(text, "mean"),
        "projection_dim": 16,
    }
    return CONFIGS[family](**given | changes)


def build_model(family, vision="clip", text="clip_text", seed=0, **changes):
    """A model in eval mode, its weights shaken."""
    torch.manual_seed(seed)
    return shake(MODELS[family](build_config(family, vision, text, **changes)).eval(), seed)


def shake(model, seed=0):
    """Random weights wide enough that every part matters: the zeros and ones of a new model hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("log_scale"):
                parameter += 0.1 * noise
            elif parameter.ndim > 1:
                parameter.copy_(noise * (0.3 if "embed" in name else parameter[0].numel() ** -0.5))
            else:
                parameter += 0.2 * noise
    return model


def build_texts(*shape, length=9, seed=0, padding="right"):
    """(token ids, attention mask) of texts of different lengths that end in EOS; padding is random tokens."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.tensor(shape).prod())
    ids = torch.randint(2, EOS, (count, length), generator=generator)
    mask = torch.zeros_like(ids)
    for row in range(count):
        real = 3 + (row * 2 + seed) % (length - 2)
        ids[row, real - 1] = EOS
        mask[row, :real] = 1
        if padding == "left":
            ids[row], mask[row] = ids[row].roll(length - real), mask[row].roll(length - real)
    return ids.reshape(*shape, length), mask.reshape(*shape, length)


def build_batch(family, crops=True, captions=True, region_texts=True, counts=(3, 1, 2), seed=1):
    """A batch with ragged regions; PixCLIP gets masks, CLOC boxes."""
    generator = torch.Generator().manual_seed(seed)
    images, slots = len(counts), max(counts)
    batch = {
        "pixel_values": torch.randn(images, 3, 32, 32, generator=generator),
        "region_attention_mask": (torch.arange(slots) < torch.tensor(counts)[:, None]).long(),
    }
    if family == "cloc":
        corners = torch.rand(images, slots, 2, 2, generator=generator)
        batch["region_boxes"] = torch.cat([corners.amin(2), corners.amax(2)], dim=-1)
    else:
        batch["region_masks"] = torch.rand(images, slots, 32, 32, generator=generator) > 0.6
        if crops:
            batch["crop_pixel_values"] = torch.randn(images, slots, 3, 32, 32, generator=generator)
            batch["crop_masks"] = torch.rand(images, slots, 32, 32, generator=generator) > 0.4
    if captions:
        batch["input_ids"], batch["attention_mask"] = build_texts(images, seed=seed + 1)
    if region_texts:
        batch["region_input_ids"], batch["region_text_attention_mask"] = build_texts(images, slots, seed=seed + 2)
    return batch


def region_key(family):
    return "region_boxes" if family == "cloc" else "region_masks"


def loss_names(family, crops=True, captions=True):
    if family == "cloc":
        return ({"image_text"} if captions else set()) | {"region_text", "grounding_l1", "grounding_giou"}
    return (
        {"mask_text"} | ({"image_text"} if captions else set()) | ({"crop_text", "local_global"} if crops else set())
    )


def contrastive_by_loops(embeds, texts, scale, ids=None, valid=None, threshold=None):
    """Symmetric InfoNCE, one row, one direction, one negative at a time."""
    rows = [i for i in range(len(embeds)) if valid is None or valid[i]]
    total = embeds.sum() * 0
    for i in rows:
        for queries, keys in ((embeds, texts), (texts, embeds)):
            terms = [scale * (queries[i] * keys[i]).sum()]
            for j in rows:
                same_text = ids is not None and ids[i] == ids[j]
                too_similar = threshold is not None and (texts[i] * texts[j]).sum() > threshold
                if j != i and not same_text and not too_similar:
                    terms.append(scale * (queries[i] * keys[j]).sum())
            total = total + torch.logsumexp(torch.stack(terms), 0) - terms[0]
    return total / (2 * max(len(rows), 1))


def run_ranks(count, function):
    """`function(rank, gather)` on `count` threads; `gather` concatenates what every rank brought, graphs included."""
    barrier, brought = threading.Barrier(count, timeout=60), [None] * count

    def run(rank):
        def gather(rows):
            brought[rank] = rows
            barrier.wait()
            everything, offset = torch.cat(brought), sum(len(part) for part in brought[:rank])
            barrier.wait()
            return everything, offset

        return function(rank, gather)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))
