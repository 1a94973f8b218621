"""The Prompter of CLOC: region and text prompts read the image tokens of one pass; and the box head behind it."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_cloc import POOLED_READOUTS, CLOCConfig
from .modeling_points import CLOCPointMask, CLOCPointPrompts, has_points, point_windows
from .modeling_positions import FourierPositions, full_precision
from .modeling_regions import box_coverage, box_cxcywh_to_xyxy, mask_boxes, mask_patch_weights, patch_centers
from .modeling_text import ScaledLinear
from .modeling_vision import VISION_ADAPTERS

# Gain of the first queries and keys: enough to single out a region, not a patch of it.
QUERY_GAIN = 1.5
# Coverage that the prior gives to patches outside the region: they stay visible, as context.
OUTSIDE_COVERAGE = 1e-3


class RegionPrompts(NamedTuple):
    """What prompts each region, whether it came as a box, a mask or points.

    Args:
        positions (`(B, R, D)`): mean of the Fourier features over the region, float32.
        refinement (`(B, R, D)`): what the corners of its box (the tight one of a mask) or its points add to them.
        coverage (`(B, R, N)`): share of each patch that lies inside the region, float32.
    """

    positions: Tensor
    refinement: Tensor
    coverage: Tensor

    def with_points(self, points: "RegionPrompts", by_point: Tensor) -> "RegionPrompts":
        """These prompts, but those of `points` where `by_point` (B, R) is true."""
        pairs = zip(points, self, strict=True)
        return RegionPrompts(*(torch.where(by_point[..., None], point, other) for point, other in pairs))


class PlacedTokens(NamedTuple):
    """Image tokens as the Prompter reads them: normalized content `(B, N, D)` and the Fourier features `(N, D)` of the
    patch centers."""

    content: Tensor
    positions: Tensor


def attend(config: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Attention `(B, heads, R, d)` of a prompt layer with an additive or boolean `bias`, by the backend that the
    configuration names: `"eager"` by its formula, any other by torch's `sdpa`. Flash attention takes no bias, and for
    the few prompts of an image flex attention would compile more than it saves."""
    if config is None or config._attn_implementation != "eager":
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    logits = query @ key.transpose(-1, -2) * scale
    if bias is not None:
        logits = logits.masked_fill(~bias, float("-inf")) if bias.dtype == torch.bool else logits + bias
    return logits.softmax(-1, dtype=torch.float32).to(query.dtype) @ value


class CLOCPrompterLayer(nn.Module):
    """One pre-norm transformer layer over the image tokens: a prompt looks by position and reads content.

    With the content c_n = LN(token_n) and the position φ_n of each patch, and the share cov_rn of patch n inside
    region r, head h of a prompt p attends with

        logit_hn = (q_pos · k_pos_n + q_con · k_con_n) / sqrt(d) + g_h log(cov_rn + 0.001)

    where k_pos comes from φ_n and k_con from c_n; the prior on the right holds for regions alone. What is read is
    v_n from c_n (for texts, which must say where, from φ_n too); the prompt is no key. A new layer is a soft pooling:
    regions look by position alone, texts by content alone, and neither the prompt itself nor the feed-forward part
    adds anything. Keys and values are computed once per image and serve every prompt. The paper (section 3.3) asks for
    one transformer layer and leaves this open.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        intermediate_size: int,
        prior: bool,
        texts: bool,
        config: Any = None,
    ):
        super().__init__()
        self.config, self.num_heads = config, num_heads
        self.norm1 = nn.LayerNorm(width)
        self.position_query = nn.Linear(width, width, bias=False)
        self.position_key = nn.Linear(width, width, bias=False)
        self.content_query = nn.Linear(width, width, bias=False)
        self.content_key = ScaledLinear(width, width, bias=False)
        if texts:
            self.text_position_query = nn.Linear(width, width, bias=False)
            self.text_content_query = ScaledLinear(width, width, bias=False)
            self.text_position_value = ScaledLinear(width, width, bias=False)
        self.v_proj = ScaledLinear(width, width)
        self.out_proj = ScaledLinear(width, width)
        self.prompt_proj = nn.Linear(width, width, bias=False)
        self.prior_gain = nn.Parameter(torch.ones(num_heads)) if prior else None
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = ScaledLinear(width, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, width)

    @property
    def identities(self) -> list[nn.Linear]:
        """Projections that start as a multiple of the identity."""
        return [self.position_query, self.position_key]

    @property
    def zeros(self) -> list[nn.Linear]:
        """Projections that start at zero."""
        of_texts = [self.text_position_query] if hasattr(self, "text_position_query") else []
        return [self.content_query, self.prompt_proj, self.fc2, *of_texts]

    def forward(self, prompts: Tensor, tokens: PlacedTokens, coverage: Tensor | None = None) -> Tensor:
        """Prompts (B, R, D) to what each reads, (B, R, D): those of regions with a coverage, those of texts without.

        Only through here do the hooks of a model on several devices find the layer's own weights.
        """
        if coverage is None:
            return self.read_texts(prompts, tokens)
        return self.read_regions(prompts, tokens, coverage)

    def read_regions(self, prompts: Tensor, tokens: PlacedTokens, coverage: Tensor) -> Tensor:
        """Prompts (B, R, D) of regions with their coverage (B, R, N) to what each reads, (B, R, D)."""
        prior = None
        if self.prior_gain is not None:
            prior = self.prior_gain.float()[:, None, None] * (coverage.float() + OUTSIDE_COVERAGE).log()[:, None]
        normed = self.norm1(prompts)
        queries = [self.position_query(normed), self.content_query(normed)]
        return self._read(prompts, queries, tokens, self.v_proj(tokens.content), prior)

    def read_texts(self, prompts: Tensor, tokens: PlacedTokens) -> Tensor:
        """Prompts (B, T, D) of texts to what each reads, (B, T, D)."""
        normed = self.norm1(prompts)
        queries = [self.text_position_query(normed), self.text_content_query(normed)]
        positions = self.text_position_value(tokens.positions.to(tokens.content.dtype))
        return self._read(prompts, queries, tokens, self.v_proj(tokens.content) + positions, None)

    def _read(
        self, prompts: Tensor, queries: list[Tensor], tokens: PlacedTokens, values: Tensor, prior: Tensor | None
    ) -> Tensor:
        positions = self.position_key(self.norm1(tokens.positions.to(tokens.content.dtype)))
        keys = [positions.expand_as(tokens.content), self.content_key(tokens.content)]
        # One product over both halves is the sum of the products of each.
        query, key = (torch.cat([self._heads(half) for half in halves], dim=-1).float() for halves in (queries, keys))
        value = self._heads(values).float()
        with full_precision(query):
            read = attend(self.config, query, key, value, prior, scale=value.shape[-1] ** -0.5)
        states = self.out_proj(read.to(prompts.dtype).transpose(-3, -2).flatten(-2)) + self.prompt_proj(prompts)
        return states + self.fc2(F.gelu(self.fc1(self.norm2(states))))

    def _heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)


class CLOCFirstPrompterLayer(nn.Module):
    """The layer of pixclip-hf 0.1 (`prompter_layer="first"`): plain pre-norm self-attention of a prompt token and the
    image tokens, whose positions are added to their content.

    What leaves the layer at its prompt token depends on the image tokens only through their keys and values: these are
    computed once per image and serve every prompt, so that R prompts cost R queries. `read_all` computes every output
    token instead.
    """

    def __init__(self, width: int, num_heads: int, intermediate_size: int, config: Any = None):
        super().__init__()
        self.config, self.num_heads = config, num_heads
        self.scale = (width // num_heads) ** -0.5
        self.norm1 = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = ScaledLinear(width, width)
        self.out_proj = ScaledLinear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = ScaledLinear(width, intermediate_size)
        self.fc2 = ScaledLinear(intermediate_size, width)

    @property
    def identities(self) -> list[nn.Linear]:
        """Projections that start as a multiple of the identity."""
        return [self.q_proj, self.k_proj]

    @property
    def zeros(self) -> list[nn.Linear]:
        """Projections that start at zero: none."""
        return []

    def _heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)

    def _rest(self, states: Tensor, attended: Tensor) -> Tensor:
        states = states + self.out_proj(attended.transpose(-3, -2).flatten(-2))
        return states + self.fc2(F.gelu(self.fc1(self.norm2(states))))

    def forward(self, prompts: Tensor, tokens: Tensor) -> Tensor:
        """The layer's output at each prompt: prompts (B, R, D) and image tokens (B, N, D) to (B, R, D)."""
        regions, patches = prompts.shape[1], tokens.shape[1]
        normed = self.norm1(torch.cat([tokens, prompts], dim=1))
        # A prompt sees the image and itself, never another prompt.
        own = torch.eye(regions, dtype=torch.bool, device=prompts.device)
        visible = torch.cat([own.new_ones(regions, patches), own], dim=1)
        query, key = self._heads(self.q_proj(normed[:, patches:])), self._heads(self.k_proj(normed))
        attended = attend(self.config, query, key, self._heads(self.v_proj(normed)), visible, self.scale)
        return self._rest(prompts, attended)

    def read_all(self, prompts: Tensor, tokens: Tensor) -> Tensor:
        """Every output token, prompt first: prompts (B, R, D) and image tokens (B, N, D) to (B, R, 1 + N, D)."""
        tokens = tokens[:, None].expand(-1, prompts.shape[1], -1, -1)
        states = torch.cat([prompts[:, :, None], tokens], dim=2)
        normed = self.norm1(states)
        query, key = self._heads(self.q_proj(normed)), self._heads(self.k_proj(normed))
        attended = attend(self.config, query, key, self._heads(self.v_proj(normed)), None, self.scale)
        return self._rest(states, attended)


class CLOCPrompter(nn.Module):
    """Prompts over image tokens (CLOC, section 3.3): a region prompt from the mean position of a box or mask and the
    encodings of two corners, or from points, a text prompt from a caption's embedding; one transformer layer.

    Patches, corners and regions share one Fourier basis, and the layer's first position queries and keys are multiples
    of the identity: a prompt therefore looks into its region from the first step. The paper does not say so; from
    random weights it decides whether shapes are learned in minutes.
    """

    def __init__(self, config: CLOCConfig):
        super().__init__()
        vision = config.vision_config
        width = vision.hidden_size
        self.first_edition = config.prompter_layer == "first"
        self.readout = config.region_readout
        self.positions = FourierPositions(width, config.position_scale)
        self.token_norm = nn.LayerNorm(width)
        if config.region_readout not in POOLED_READOUTS:
            self.box_fc1 = ScaledLinear(2 * width, width)
            self.box_fc2 = nn.Linear(width, width)
        if config.prompter_points:
            self.point_prompt = CLOCPointPrompts(width)
            self.point_mask = CLOCPointMask(width)
        if config.grounding:
            self.text_prompt = ScaledLinear(config.projection_dim, width)
        sizes = (
            width,
            config.prompter_num_attention_heads or vision.num_attention_heads,
            config.prompter_intermediate_size or VISION_ADAPTERS.of(vision).feed_forward_width(vision),
        )
        self.layer: Any
        if self.first_edition:
            self.layer = CLOCFirstPrompterLayer(*sizes, config=config)
        else:
            kinds = {"prior": config.prompter_prior, "texts": config.grounding}
            self.layer = CLOCPrompterLayer(*sizes, **kinds, config=config)

    def forward(
        self,
        tokens: Tensor,
        grid: tuple[int, int],
        boxes: Tensor | None = None,
        masks: Tensor | None = None,
        text_embeds: Tensor | None = None,
        points: Tensor | None = None,
        point_labels: Tensor | None = None,
    ) -> Tensor:
        """What each prompt reads of its image, `(B, R, D)`.

        Args:
            tokens (`(B, N, D)`): patch tokens of a tower.
            grid: (rows, columns) of patches.
            boxes (`(B, R, 4)`), masks (`(B, R, H, W)`), text_embeds (`(B, R, projection_dim)`): the prompts, one of
                the three.
            points (`(B, R, P, 2)`), point_labels (`(B, R, P)`): prompts of their own, or in place of the box or mask
                of the regions that have any point; label 1 for positive points, 0 for negative ones, -1 for padding.
        """
        placed = self.place(tokens, grid)
        if text_embeds is not None:
            return self.read_texts(text_embeds, placed)
        prompts = None
        if boxes is not None or masks is not None:
            prompts = self.mask_prompts(masks, grid) if boxes is None else self.box_prompts(boxes, grid)
        if points is not None:
            by_points = self.point_prompts(points, point_labels, placed, grid)
            prompts = by_points if prompts is None else prompts.with_points(by_points, has_points(point_labels))
        return self.read_regions(prompts, placed)

    def place(self, tokens: Tensor, grid: tuple[int, int]) -> PlacedTokens:
        """Image tokens (B, N, D) of a patch grid with their positions."""
        return PlacedTokens(self.token_norm(tokens), self.positions(patch_centers(grid, tokens.device)))

    def box_prompts(self, boxes: Tensor, grid: tuple[int, int]) -> RegionPrompts:
        """Boxes (B, R, 4), xyxy in [0, 1], as prompts."""
        return RegionPrompts(self.positions.over_boxes(boxes), self._refine(boxes), box_coverage(boxes, grid))

    def mask_prompts(self, masks: Tensor, grid: tuple[int, int]) -> RegionPrompts:
        """Masks (B, R, H, W) as prompts."""
        coverage = mask_patch_weights(masks, grid)
        positions = self.positions.over_patches(coverage, grid)
        return RegionPrompts(positions, self._refine(mask_boxes(masks)), coverage)

    def point_prompts(
        self, points: Tensor, labels: Tensor, tokens: PlacedTokens, grid: tuple[int, int]
    ) -> RegionPrompts:
        """Points (B, R, P, 2), xy in [0, 1], with labels (B, R, P) as prompts: the soft mask of what lies under them
        prompts as a given mask does, and where they are takes the place of its box."""
        features, content = self.positions(points), tokens.content
        under = (point_windows(points, grid).flatten(1, 2).to(content) @ content).unflatten(1, points.shape[1:3])
        coverage = self.point_mask(features, under, labels, *tokens)
        return RegionPrompts(
            self.positions.over_patches(coverage, grid), self.point_prompt(features, under, labels), coverage
        )

    def _refine(self, boxes: Tensor) -> Tensor:
        corners = self.positions(boxes.unflatten(-1, (2, 2))).flatten(-2).to(self.box_fc1.weight.dtype)
        return self.box_fc2(F.gelu(self.box_fc1(corners)))

    def read_regions(self, regions: RegionPrompts, tokens: PlacedTokens) -> Tensor:
        """What each region reads of its image: (B, R, D)."""
        prompts = regions.positions.to(regions.refinement) + regions.refinement
        if not self.first_edition:
            return self.layer(prompts, tokens, regions.coverage)
        if self.readout == "mean":
            return self.layer.read_all(prompts, _added(tokens)).mean(2)
        return self.layer(prompts, _added(tokens))

    def read_texts(self, text_embeds: Tensor, tokens: PlacedTokens) -> Tensor:
        """What texts (B, T, projection_dim) read of each image: (B, T, D)."""
        prompts = self.text_prompt(text_embeds)
        if not self.first_edition:
            return self.layer(prompts, tokens)
        return self.layer(prompts, _added(tokens))


def _added(tokens: PlacedTokens) -> Tensor:
    return tokens.content + tokens.positions.to(tokens.content)


class CLOCBoxHead(nn.Module):
    """Prompter output at a text prompt to the box of that text."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, 4)

    def forward(self, states: Tensor) -> Tensor:
        """(..., D) to (..., 4): xyxy; center and size lie in [0, 1]."""
        return box_cxcywh_to_xyxy(self.fc2(F.gelu(self.fc1(self.norm(states)))).sigmoid())
