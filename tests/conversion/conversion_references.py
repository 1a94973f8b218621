"""Random checkpoints under the public code's names, and small references of what the public code computes."""

import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel

MASK_SCALE = 0.5, 0.26


def random(*shape, scale=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = shape[-1] ** -0.5 if scale is None and len(shape) > 1 else scale or 0.3
    return torch.randn(shape, generator=generator) * scale


def seeded(shapes):
    """name -> random tensor; names that end in `norm` weights lie around 1."""
    state = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        state[name] = random(*shape, seed=seed)
        if len(shape) == 1 and name.endswith("weight"):
            state[name] += 1
    return state


def eva_checkpoint(
    width=128, hidden=150, layers=3, patch=4, side=3, dimension=20, llm=24, tables=None, biases=True, rope_grid=16
):
    """The public PixCLIP's names and random numbers; with `tables`, the width of a head, rotary tables too."""
    shapes = {
        "logit_scale": (),
        "visual.cls_token": (1, 1, width),
        "visual.pos_embed": (1, side**2 + 1, width),
        "visual.patch_embed.proj.weight": (width, 3, patch, patch),
        "visual.patch_embed.proj.bias": (width,),
        "visual.alpha_patch_embed.proj.weight": (width, 1, patch, patch),
        "visual.head.weight": (dimension, width),
    }
    if biases:
        shapes |= {"visual.alpha_patch_embed.proj.bias": (width,), "visual.head.bias": (dimension,)}
    norms = ["visual.norm"]
    for index in range(layers):
        block = f"visual.blocks.{index}"
        norms += [f"{block}.norm1", f"{block}.norm2", f"{block}.attn.inner_attn_ln"]
        shapes[f"{block}.attn.k_proj.weight"] = (width, width)
        for name in ("q_proj", "v_proj", "proj"):
            shapes |= {f"{block}.attn.{name}.weight": (width, width), f"{block}.attn.{name}.bias": (width,)}
        for name, size in (("w1", (hidden, width)), ("w2", (hidden, width)), ("w3", (width, hidden))):
            shapes |= {f"{block}.mlp.{name}.weight": size, f"{block}.mlp.{name}.bias": size[:1]}
        shapes |= {f"{block}.mlp.ffn_ln.weight": (hidden,), f"{block}.mlp.ffn_ln.bias": (hidden,)}
    for name in norms:
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    adaptor = "text.text_adaptor"
    for index in range(4):
        shapes |= {f"{adaptor}.{index}.ln.{name}": (llm,) for name in ("weight", "bias")}
        shapes |= {f"{adaptor}.{index}.fn.0.weight": (2 * llm, llm), f"{adaptor}.{index}.fn.0.bias": (2 * llm,)}
        shapes |= {f"{adaptor}.{index}.fn.3.weight": (llm, 2 * llm), f"{adaptor}.{index}.fn.3.bias": (llm,)}
    shapes |= {f"{adaptor}.4.weight": (llm,), f"{adaptor}.4.bias": (llm,)}
    shapes |= {f"{adaptor}.5.weight": (dimension, llm), f"{adaptor}.5.bias": (dimension,)}
    state = seeded(shapes)
    if tables:
        angles = eva_angles(side, tables, rope_grid)
        for name in ("visual", *(f"visual.blocks.{index}.attn" for index in range(layers))):
            state[f"{name}.rope.freqs_cos"] = angles.cos().repeat_interleave(2, -1)
            state[f"{name}.rope.freqs_sin"] = angles.sin().repeat_interleave(2, -1)
    return state


def eva_angles(side, head_width, rope_grid=16):
    """(side², head_width / 2): the angle of each pair of channels at each patch, one at a time."""
    pairs = head_width // 4
    rows = []
    for row in range(side):
        for column in range(side):
            rows.append(
                [
                    place / side * rope_grid * 10000 ** (-pair / pairs)
                    for place in (row, column)
                    for pair in range(pairs)
                ]
            )
    return torch.tensor(rows)


def eva_image_features(state, pixels, mask=None, head_width=64, rope_grid=16):
    """(image features, normed patch tokens) of the public PixCLIP; positions turn as complex numbers."""

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], state[f"visual.{name}.weight"], state[f"visual.{name}.bias"], 1e-6)

    def linear(name, x):
        return F.linear(x, state[f"visual.{name}.weight"], state.get(f"visual.{name}.bias"))

    def patches(name, x):
        weight = state[f"visual.{name}.proj.weight"]
        return F.conv2d(x, weight, state.get(f"visual.{name}.proj.bias"), stride=weight.shape[-1])

    grid = patches("patch_embed", pixels)
    if mask is not None:
        grid = grid + patches("alpha_patch_embed", (mask.float() - MASK_SCALE[0]) / MASK_SCALE[1])
    x = (
        torch.cat([state["visual.cls_token"].repeat(len(pixels), 1, 1), grid.flatten(2).mT], 1)
        + state["visual.pos_embed"]
    )
    phase = torch.polar(torch.ones(()), eva_angles(grid.shape[-1], head_width, rope_grid))

    def turn(x):
        turned = torch.view_as_complex(x[:, :, 1:].unflatten(-1, (-1, 2)).contiguous()) * phase
        return torch.cat([x[:, :, :1], torch.view_as_real(turned).flatten(-2)], 2)

    for index in range(1 + max(int(name.split(".")[2]) for name in state if name.startswith("visual.blocks."))):
        block = f"blocks.{index}"
        normed = norm(f"{block}.norm1", x)
        q, k, v = (torch.stack(linear(f"{block}.attn.{part}_proj", normed).split(head_width, -1), 1) for part in "qkv")
        weights = (turn(q) @ turn(k).mT / head_width**0.5).softmax(-1)
        joined = torch.cat((weights @ v).unbind(1), -1)
        x = x + linear(f"{block}.attn.proj", norm(f"{block}.attn.inner_attn_ln", joined))
        normed = norm(f"{block}.norm2", x)
        gated = F.silu(linear(f"{block}.mlp.w1", normed)) * linear(f"{block}.mlp.w2", normed)
        x = x + linear(f"{block}.mlp.w3", norm(f"{block}.mlp.ffn_ln", gated))
    x = norm("norm", x)
    return linear("head", x[:, 0]), x[:, 1:]


def eva_text_features(state, states):
    """The public PixCLIP's text adaptor."""
    x = states / states.norm(dim=-1, keepdim=True)

    def part(name, function, x):
        weight, bias = (state[f"text.text_adaptor.{name}.{kind}"] for kind in ("weight", "bias"))
        return F.linear(x, weight, bias) if function == "linear" else F.layer_norm(x, x.shape[-1:], weight, bias)

    for index in range(4):
        inner = part(f"{index}.fn.0", "linear", part(f"{index}.ln", "norm", x))
        x = x + part(f"{index}.fn.3", "linear", 0.5 * inner * (1 + torch.erf(inner / 2**0.5)))
    return part("5", "linear", part("4", "norm", x))


def build_clip(
    activation="quick_gelu", head_width=64, text_head_width=64, vocabulary=60, text_heads=2, positions=13, **vision
):
    """A random transformers CLIP: the reference of what its state dict in OpenAI's names computes."""
    text = {
        "hidden_size": text_heads * text_head_width,
        "intermediate_size": 70,
        "num_hidden_layers": 1,
        "num_attention_heads": text_heads,
        "max_position_embeddings": positions,
        "vocab_size": vocabulary,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
        "hidden_act": activation,
    }
    image = {
        "hidden_size": 2 * head_width,
        "intermediate_size": 100,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 18,
        "patch_size": 6,
        "hidden_act": activation,
    }
    model = CLIPModel(CLIPConfig(vision_config=image | vision, text_config=text, projection_dim=20)).eval()
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(model.named_parameters()):
            if parameter.ndim:
                noise = random(*parameter.shape, seed=seed)
                parameter.copy_(noise + 1 if "norm" in name and name.endswith("weight") else noise)
    return model


def openai_state(model, mask=False, joint="in_proj_"):
    """The weights of a transformers CLIP in OpenAI's names; with `mask`, those of an Alpha-CLIP."""
    old = model.state_dict()
    state = {
        "visual.conv1.weight": old["vision_model.embeddings.patch_embedding.weight"],
        "visual.class_embedding": old["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": old["vision_model.embeddings.position_embedding.weight"],
        "visual.proj": old["visual_projection.weight"].T.contiguous(),
        "token_embedding.weight": old["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": old["text_model.embeddings.position_embedding.weight"],
        "text_projection": old["text_projection.weight"].T.contiguous(),
        "logit_scale": old["logit_scale"],
    }
    norms = {
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
        "ln_final": "text_model.final_layer_norm",
    }
    for prefix, tower, between in (("visual.", "vision_model", joint), ("", "text_model", "in_proj_")):
        for index in range(len(getattr(model, tower).encoder.layers)):
            block, layer = f"{prefix}transformer.resblocks.{index}", f"{tower}.encoder.layers.{index}"
            for kind in ("weight", "bias"):
                state[f"{block}.attn.{between}{kind}"] = torch.cat(
                    [old[f"{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
                )
            norms |= {f"{block}.ln_{i}": f"{layer}.layer_norm{i}" for i in (1, 2)}
            norms |= {f"{block}.mlp.c_fc": f"{layer}.mlp.fc1", f"{block}.mlp.c_proj": f"{layer}.mlp.fc2"}
            norms[f"{block}.attn.out_proj"] = f"{layer}.self_attn.out_proj"
    state |= {f"{new}.{kind}": old[f"{name}.{kind}"] for new, name in norms.items() for kind in ("weight", "bias")}
    if mask:
        state["visual.conv1_alpha.weight"] = random(*state["visual.conv1.weight"][:, :1].shape, seed=99, scale=0.1)
    return {name: tensor.clone() for name, tensor in state.items()}


def alpha_image_features(model, state, pixels, mask):
    """What Alpha-CLIP computes: CLIP with one more convolution added to its patches."""
    scaled = (mask.float() - MASK_SCALE[0]) / MASK_SCALE[1]
    patch = model.vision_model.embeddings.patch_embedding
    extra = F.conv2d(scaled, state["visual.conv1_alpha.weight"], stride=patch.stride)
    hook = patch.register_forward_hook(lambda module, inputs, output: output + extra)
    try:
        return model.get_image_features(pixels).pooler_output
    finally:
        hook.remove()
