"""Text towers of both models: any Hugging Face text model, pooled and projected; one adapter per family."""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModel,
    PreTrainedModel,
    Siglip2TextConfig,
    Siglip2TextModel,
    SiglipTextConfig,
    SiglipTextModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging

from .configuration_region_text import SELF_POOLING_TEXT_TOWERS
from .modeling_adapters import AdapterRegistry

# transformers builds these towers as parts of their models only.
AutoModel.register(SiglipTextConfig, SiglipTextModel, exist_ok=True)
AutoModel.register(Siglip2TextConfig, Siglip2TextModel, exist_ok=True)

logger = logging.get_logger(__name__)

MAX_LOG_SCALE = math.log(100)
GEMMA_VOCABULARY = 256_000


class LogitScale(nn.Module):
    """Learned inverse temperature, kept as its logarithm, and, of a sigmoid, the learned bias of the logits.

    Without a bias the temperature is that of a softmax, and at most 100 (CLIP, section 2.5); checkpoints trained with
    a sigmoid lie above.

    A module of its own, so that PEFT's `modules_to_save` can name it.

    Args:
        init_value: logarithm of the initial inverse temperature.
        init_bias: initial bias; None for a softmax.
    """

    def __init__(self, init_value: float, init_bias: float | None = None):
        super().__init__()
        self.init_value, self.init_bias = init_value, init_bias
        self.log_scale = nn.Parameter(torch.tensor(float(init_value)))
        self.bias = None if init_bias is None else nn.Parameter(torch.tensor(float(init_bias)))

    def forward(self) -> Tensor:
        """Scalar: the inverse temperature."""
        log_scale: Tensor = self.log_scale
        if self.bias is None:
            # The bound shifts the value and leaves the gradient: checkpoints of CLIP lie on it, where a clamp would
            # hold them for good.
            log_scale = log_scale - (log_scale.detach() - MAX_LOG_SCALE).clamp(min=0)
        # Sharded training gives the parameter a dimension.
        return log_scale.exp().reshape(())

    def get_bias(self) -> Tensor | None:
        """Scalar: the bias of the logits; None for a softmax."""
        return None if self.bias is None else self.bias.reshape(())

    def reset_parameters(self) -> None:
        """Sets the initial values, unless others were loaded."""
        init.constant_(self.log_scale, self.init_value)
        if self.bias is not None:
            init.constant_(self.bias, self.init_bias)


def build_logit_scale(config: Any) -> LogitScale:
    """The temperature, and the bias of a sigmoid, that a configuration of a region model describes."""
    sigmoid = config.contrastive_objective == "sigmoid"
    return LogitScale(config.logit_scale_init_value, config.logit_bias_init_value if sigmoid else None)


class ScaledLinear(nn.Linear):
    """A linear layer that starts with weights of standard deviation `1 / sqrt(in_features)`."""


class AdapterBlock(nn.Module):
    """x + Linear(GELU(Linear(LayerNorm(x)))), twice as wide inside."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.fc2(F.gelu(self.fc1(self.norm(hidden_states))))


class MLPAdapter(nn.Module):
    """The text adaptor of the public PixCLIP checkpoint: L2-normalize, four residual MLPs, LayerNorm, projection."""

    def __init__(self, width: int, projection_dim: int):
        super().__init__()
        self.blocks = nn.ModuleList(AdapterBlock(width) for _ in range(4))
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, projection_dim)

    def forward(self, states: Tensor) -> Tensor:
        """(N, width) pooled states to (N, projection_dim)."""
        hidden_states = F.normalize(states, dim=-1)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return self.projection(self.norm(hidden_states))


class TextAdapter:
    """What is special about a family of text towers. This class describes what most of them do.

    To add one, register a subclass with `TEXT_ADAPTERS.register` in this file.
    """

    # Learned positions in the tower's state that `resize_positions` can stretch; most towers have none of this name.
    positions: ClassVar[str] = "embeddings.position_embedding.weight"
    # Name of the class of transformers that keeps the projection behind a tower that was saved alone.
    with_projection: ClassVar[str | None] = None
    # Whether the family projects what its towers pool; without, its features are the pooled states themselves.
    projects: ClassVar[bool] = True
    # Whether the towers pool themselves, from all the positions that they have: the padding behind a text is read too.
    reads_padding: ClassVar[bool] = False
    # What the family trained its two towers with.
    objective: ClassVar[str] = "softmax"
    # Starts of the names of weights that a checkpoint may lack, as masked language models do: the pooled states never
    # come from them.
    optional_weights: ClassVar[tuple[str, ...]] = ("pooler.",)
    # Long-CLIP (arXiv 2403.15378): the positions that short captions have trained well.
    kept_positions: ClassVar[int] = 20

    def is_eos(self, config: Any, input_ids: Tensor) -> Tensor:
        """Where the end-of-sequence tokens of `input_ids` are, bool of their shape."""
        eos = torch.tensor([-1] if config.eos_token_id is None else config.eos_token_id, device=input_ids.device)
        return torch.isin(input_ids, eos)

    def pad_id(self, config: Any) -> int:
        """The token behind the end of a text, for towers that read it."""
        return config.pad_token_id

    def resize_positions(self, weight: Tensor, shape: torch.Size) -> Tensor:
        """Stretches the position embeddings `(L, width)` to `shape` (Long-CLIP, arXiv 2403.15378).

        The first 20 stay, the others are spread over the rest and interpolated linearly; the last one stays the last.
        """
        if weight.shape == shape:
            return weight
        kept = self.kept_positions
        rest = F.interpolate(weight[kept:].float().T[None], size=shape[0] - kept, mode="linear", align_corners=True)
        return torch.cat([weight[:kept], rest[0].T.to(weight.dtype)])


TEXT_ADAPTERS = AdapterRegistry(TextAdapter())


@TEXT_ADAPTERS.register("clip_text_model")
class CLIPTextAdapter(TextAdapter):
    """CLIP's text tower."""

    with_projection = "CLIPTextModelWithProjection"

    def is_eos(self, config: Any, input_ids: Tensor) -> Tensor:
        """Where the end-of-sequence tokens of `input_ids` are, bool of their shape."""
        if config.eos_token_id == 2:
            # The first CLIP checkpoints carry a wrong id; their end-of-sequence token is the vocabulary's largest.
            return input_ids == input_ids.max(-1, keepdim=True).values
        return super().is_eos(config, input_ids)


@TEXT_ADAPTERS.register(*SELF_POOLING_TEXT_TOWERS)
class SiglipTextAdapter(TextAdapter):
    """SigLIP's text tower and SigLIP 2's: no attention mask, the state at the last of all positions through a head of
    the tower's own, and no projection behind it."""

    # A longer table would move the padding that a short text is read through.
    positions = ""
    projects = False
    reads_padding = True
    objective = "sigmoid"

    def pad_id(self, config: Any) -> int:
        """The token behind the end of a text."""
        # The configurations of SigLIP 2 name the padding of SigLIP's tokenizer; their own is Gemma's.
        return 0 if config.vocab_size >= GEMMA_VOCABULARY else super().pad_id(config)


def build_text_projection(config: Any) -> nn.Module:
    """From pooled text states to the shared space, by `config.text_projection`."""
    if config.text_projection == "linear":
        return nn.Linear(config.text_hidden_size, config.projection_dim, bias=False)
    return MLPAdapter(config.text_hidden_size, config.projection_dim)


def build_text_model(config: Any) -> PreTrainedModel | None:
    """The tower of `config.text_config`, or None without one.

    Raises:
        ValueError: `bidirectional` for a tower that has no causal attention to turn off.
    """
    if config.text_config is None:
        return None
    text_model = AutoModel.from_config(config.text_config)
    if config.bidirectional:
        set_bidirectional(text_model)
    return text_model


def set_bidirectional(text_model: PreTrainedModel) -> None:
    """Lets every token of a decoder see every other.

    `config.is_causal` decides in the mask creation of sdpa and eager attention, the modules' own flag in flash
    attention.

    Raises:
        ValueError: the tower's attention is not causal by such a flag (an encoder; CLIP's text tower).
    """
    causal = [module for module in text_model.modules() if getattr(module, "is_causal", False) is True]
    if not causal:
        raise ValueError(
            f"`bidirectional=True` needs a decoder as text tower: {text_model.config.model_type!r} has no causal "
            "attention that can be turned off."
        )
    text_model.config.is_causal = False
    for module in causal:
        module.is_causal = False


def announce_own_code(text_model: PreTrainedModel, config: Any, name: str) -> None:
    """Warns of a checkpoint that comes with code of its own for its model, which is not run.

    Such code often turns the causal attention of a language model off, and nothing in the configuration says so.

    Args:
        text_model: the tower that was loaded in its place.
        config: the checkpoint's configuration.
        name: the checkpoint.
    """
    own = {task: code for task, code in (getattr(config, "auto_map", None) or {}).items() if "AutoModel" in task}
    if not own or hasattr(config, "text_pooling"):  # a region model's own code is this one
        return
    message = (
        f"{name!r} comes with code of its own ({', '.join(map(str, own.values()))}), which is not run: its weights "
        f"are loaded into {type(text_model).__name__} of transformers. "
    )
    if any(getattr(module, "is_causal", False) is True for module in text_model.modules()):
        message += (
            "The attention there is causal. If its own code lets every token see every other, as those of text "
            "embeddings do, set `bidirectional=True` (`--config_overrides '{\"bidirectional\": true}'`); if not, "
            "`bidirectional=False` silences this warning."
        )
    else:
        message += "Whatever its own code does otherwise is lost."
    logger.warning(message)


def right_pad(input_ids: Tensor, attention_mask: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
    """Moves the real tokens of each row to its front, in their order, and what belongs to them in `more` (`(N, L)`)
    along."""
    real = attention_mask.bool()
    # Counted rather than sorted: ONNX has no stable sort.
    padded = real.sum(-1, keepdim=True) + (~real).cumsum(-1)
    places = torch.where(real, real.cumsum(-1), padded) - 1
    return tuple(torch.zeros_like(rows).scatter(-1, places, rows) for rows in (input_ids, attention_mask, *more))


def pool_states(states: Tensor, attention_mask: Tensor, pooling: str, is_eos: Tensor | None = None) -> Tensor:
    """Pools right-padded token states.

    Args:
        states (`(N, L, D)`): last hidden states.
        attention_mask (`(N, L)`): 1 for real tokens, which come first in their row.
        pooling: `"mean"` over the real tokens, `"last"` real token, first end-of-sequence token (`"eos"`; the last
            real token of a row without one), or first token (`"cls"`).
        is_eos (`(N, L)` bool): where the end-of-sequence tokens are, for `"eos"`.

    Returns:
        `(N, D)`.
    """
    if pooling == "mean":
        # The sum of half-precision states may be beyond their range.
        weights = attention_mask.float()
        means = (states.float() * weights[..., None]).sum(1) / weights.sum(-1, keepdim=True).clamp(min=1)
        return means.to(states.dtype)
    rows = torch.arange(states.shape[0], device=states.device)
    if pooling == "cls":
        return states[:, 0]
    index = (attention_mask.sum(-1) - 1).clamp(min=0)
    if pooling == "eos":
        found = is_eos & attention_mask.bool()
        index = torch.where(found.any(-1), found.int().argmax(-1), index)
    return states[rows, index]


def fill_up(text_model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Tokens as a tower sees them that reads the padding too: `(N, max_position_embeddings)`.

    Args:
        input_ids, attention_mask (`(N, L)`): right-padded tokens. Whatever stands in their padding is replaced.

    Raises:
        ValueError: a text longer than the tower.
    """
    config = text_model.config
    pad, length = TEXT_ADAPTERS.of(config).pad_id(config), config.max_position_embeddings
    filled = torch.where(attention_mask.bool(), input_ids, pad)
    if filled.shape[1] <= length:
        return F.pad(filled, (0, length - filled.shape[1]), value=pad)
    if attention_mask[:, length:].any():
        longest = int(attention_mask.sum(-1).max())
        raise ValueError(f"`input_ids` must hold at most {length} tokens per text for this tower, got {longest}.")
    return filled[:, :length]


def encode_text(
    text_model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    pooling: str,
    position_ids: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    **kwargs: Any,
) -> BaseModelOutputWithPooling:
    """Runs a text tower and pools it.

    Rows are brought to right padding first: an embedding then depends neither on the padding side nor on how far its
    batch is padded, whatever way the tower counts positions. A tower that reads the padding too (SigLIP) gets rows of
    its full length and no attention mask, as it was trained. `last_hidden_state` is returned in that layout.

    Args:
        input_ids (`(N, L)`), attention_mask (`(N, L)`, 1 for real tokens; all real when None).
        position_ids, token_type_ids (`(N, L)` or `(1, L)`): positions of the tokens, which the tower counts when None,
            and the segments that BERT's tokenizers return.
        kwargs: arguments of the tower. `use_cache` changes nothing: no key-value cache is ever built.

    Returns:
        `pooler_output` `(N, D)`: pooled states, not projected.

    Raises:
        ValueError: `pooling` "tower" for a tower that does not pool itself, another one for one that does; or, for
            such a tower, a text longer than the tower, or positions or segments.
    """
    adapter = TEXT_ADAPTERS.of(text_model.config)
    if (pooling == "tower") != adapter.reads_padding:
        raise ValueError(f"`pooling` {pooling!r} does not fit a {text_model.config.model_type!r} tower.")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    given = {"position_ids": position_ids, "token_type_ids": token_type_ids}
    given = {name: values.expand_as(input_ids) for name, values in given.items() if values is not None}
    if adapter.reads_padding and given:
        raise ValueError(f"`{next(iter(given))}` must be None for a {text_model.config.model_type!r} tower.")
    input_ids, attention_mask, *moved = right_pad(input_ids, attention_mask, *given.values())
    kwargs |= zip(given, moved, strict=True)
    # Every token is read once. Left to their configurations, most language models would keep the keys and values of
    # all layers for tokens to come.
    kwargs |= {"use_cache": False, "return_dict": True}
    if adapter.reads_padding:
        outputs = text_model(input_ids=fill_up(text_model, input_ids, attention_mask), **kwargs)
        states, pooled = outputs.last_hidden_state, outputs.pooler_output
    else:
        outputs = text_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        states = outputs.last_hidden_state
        is_eos = adapter.is_eos(text_model.config, input_ids).to(states.device)
        pooled = pool_states(states, attention_mask.to(states.device), pooling, is_eos)
    return BaseModelOutputWithPooling(
        last_hidden_state=states,
        pooler_output=pooled,
        hidden_states=getattr(outputs, "hidden_states", None),
        attentions=getattr(outputs, "attentions", None),
    )


def text_features(
    text_model: PreTrainedModel | None,
    config: Any,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    text_states: Tensor | None,
    **kwargs: Any,
) -> BaseModelOutputWithPooling:
    """Pooled text states `(N, D)` as `pooler_output`, from token ids or as they are given.

    Raises:
        ValueError: both or neither of `input_ids` and `text_states`, token ids for a model without text tower, or
            states of another width than `config.text_hidden_size`.
    """
    if (input_ids is None) == (text_states is None):
        given = "neither" if input_ids is None else "both"
        raise ValueError(f"Exactly one of `input_ids` and `text_states` must be given, got {given}.")
    if text_states is not None:
        if text_states.shape[-1] != config.text_hidden_size:
            raise ValueError(
                f"`text_states` must have width {config.text_hidden_size}, got shape {tuple(text_states.shape)}."
            )
        return BaseModelOutputWithPooling(pooler_output=text_states)
    if text_model is None:
        expected = f" of {config.text_model_name}" if config.text_model_name else ""
        raise ValueError(
            f"`input_ids` were given to a model without text tower: pass the pooled states{expected} as `text_states`."
        )
    return encode_text(text_model, input_ids, attention_mask, config.text_pooling, **kwargs)
