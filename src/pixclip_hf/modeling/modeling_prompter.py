"""The Prompter of CLOC: box and text prompts that read the image tokens of one pass, and the box head behind them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_cloc import CLOCConfig
from .modeling_regions import box_cxcywh_to_xyxy, patch_centers
from .modeling_text import ScaledLinear

# Of the Prompter's first queries and keys: enough to single out a box, not a patch of it.
QUERY_GAIN = 1.5


class FourierPositions(nn.Module):
    """Random Fourier features of points in [0, 1]² (Tancik et al. 2020), shared by patch centres and box corners."""

    def __init__(self, width: int, scale: float):
        super().__init__()
        self.scale = scale
        self.register_buffer("frequencies", torch.randn(2, width // 2) * scale)

    def forward(self, points: Tensor) -> Tensor:
        """(..., 2) to (..., width), float32."""
        # Not a matrix product, which autocast would take to half precision.
        angles = ((2 * points.float() - 1)[..., None] * self.frequencies.float()).sum(-2) * (2 * math.pi)
        # Sine and cosine of a frequency side by side: a head's slice of them holds both.
        return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)

    def over_boxes(self, boxes: Tensor) -> Tensor:
        """Mean of the features over each box, at the length of a point's: xyxy (..., 4) to (..., width), float32.

        Its product with a point's features is large inside the box and falls off around it.
        """
        corner, opposite = boxes.float().unflatten(-1, (2, 2)).unbind(-2)
        cycles = 2 * (opposite - corner)[..., None] * self.frequencies.float()
        fall_off = torch.sinc(cycles).prod(-2)
        means = self((corner + opposite) / 2) * fall_off.repeat_interleave(2, dim=-1)
        return F.normalize(means, dim=-1) * (means.shape[-1] / 2) ** 0.5


class CLOCPrompterLayer(nn.Module):
    """One pre-norm transformer encoder layer over a prompt token and the image tokens.

    What leaves the layer at its prompt token depends on the image tokens only through their keys and values: these are
    computed once an image and serve every prompt, so that R prompts cost R queries. `read_all` computes every output
    token instead.
    """

    def __init__(self, width: int, num_heads: int, intermediate_size: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = ScaledLinear(width, width)
        self.out_proj = ScaledLinear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = ScaledLinear(width, intermediate_size)
        self.fc2 = ScaledLinear(intermediate_size, width)

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
        attended = F.scaled_dot_product_attention(
            self._heads(self.q_proj(normed[:, patches:])),
            self._heads(self.k_proj(normed)),
            self._heads(self.v_proj(normed)),
            attn_mask=visible,
        )
        return self._rest(prompts, attended)

    def read_all(self, prompts: Tensor, tokens: Tensor) -> Tensor:
        """Every output token, prompt first: prompts (B, R, D) and image tokens (B, N, D) to (B, R, 1 + N, D)."""
        tokens = tokens[:, None].expand(-1, prompts.shape[1], -1, -1)
        states = torch.cat([prompts[:, :, None], tokens], dim=2)
        normed = self.norm1(states)
        attended = F.scaled_dot_product_attention(
            *(self._heads(projection(normed)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        )
        return self._rest(states, attended)


class CLOCPrompter(nn.Module):
    """Prompts over image tokens (CLOC, section 3.3): box prompts from the encodings of two corners, text prompts from
    a caption's embedding; one transformer layer.

    The image tokens carry the Fourier features of their patch centres, in the basis of the corner encodings. A box
    prompt also carries the mean of these features over the box, and the layer's query and key projections start as
    multiples of the identity: a prompt therefore looks into its box from the first step. The paper says neither; from
    random weights it decides whether shapes are learned in minutes.
    """

    def __init__(self, config: CLOCConfig):
        super().__init__()
        vision = config.vision_config
        width = vision.hidden_size
        self.positions = FourierPositions(width, config.position_scale)
        self.token_norm = nn.LayerNorm(width)
        if config.region_readout != "roi_align":
            self.box_fc1 = ScaledLinear(2 * width, width)
            self.box_fc2 = nn.Linear(width, width)
        if config.grounding:
            self.text_prompt = ScaledLinear(config.projection_dim, width)
        self.layer = CLOCPrompterLayer(
            width,
            config.prompter_num_attention_heads or vision.num_attention_heads,
            config.prompter_intermediate_size or vision.intermediate_size,
        )

    def place(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Image tokens (B, N, D) of a patch grid, normalised and with their positions."""
        positions = self.positions(patch_centers(grid, tokens.device))
        return self.token_norm(tokens) + positions.to(tokens.dtype)

    def box_prompts(self, boxes: Tensor) -> Tensor:
        """Boxes (B, R, 4), xyxy in [0, 1], to prompts (B, R, D)."""
        dtype = self.box_fc1.weight.dtype
        corners = self.positions(boxes.unflatten(-1, (2, 2))).flatten(-2).to(dtype)
        return self.positions.over_boxes(boxes).to(dtype) + self.box_fc2(F.gelu(self.box_fc1(corners)))


class CLOCBoxHead(nn.Module):
    """Prompter output at a text prompt to the box of that text."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, 4)

    def forward(self, states: Tensor) -> Tensor:
        """(..., D) to (..., 4): xyxy; centre and size lie in [0, 1]."""
        return box_cxcywh_to_xyxy(self.fc2(F.gelu(self.fc1(self.norm(states)))).sigmoid())
