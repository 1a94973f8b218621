"""The `zero-shot-region-classification` pipeline."""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch.nn import functional as F

from .region_feature_extraction import RegionPipeline
from .text_embeddings import EmbeddedTexts, remembered_texts


class ZeroShotRegionClassificationPipeline(RegionPipeline):
    """Says which of several texts describes each region of an image. A label that is given again, in this call or a
    later one, is embedded only once as long as the weights do not change.

    ```python
    classify = pipeline("zero-shot-region-classification", model="org/pixclip")
    classify(image, masks=[mask], candidate_labels=["a red mug", "a blue mug"])
    ```
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._embedded_texts = EmbeddedTexts()

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """Scores texts against regions.

        Args:
            inputs, boxes, masks, points, point_labels, box_format, normalized, prompt, mode, size, max_num_patches,
            batch_size: as in
                [`RegionFeatureExtractionPipeline`].
            candidate_labels (`list[str]`): the T texts to choose from, of any length.
            hypothesis_template (`str`): a text in which each label takes the place of `{}`; `"{}"` by default.
            text_states (`torch.Tensor`): (T, D_text) pooled states of the texts, in place of encoding them: for a
                model without its text tower.
            top_k (`int`): keeps this many of the best labels per region; all of them by default.

        Returns:
            For one image, a list of R dicts `{"box": {"xmin", "ymin", "xmax", "ymax"} in pixels of the original image,
            "mask_area": pixels, "labels": best first, "scores": their softmax over all T texts of logit scale times
            cosine similarity}`; for a list of images a list of those; for a generator or dataset an iterator over
            them. Of a model that was trained with a sigmoid, a score is the sigmoid of that logit and its bias: each
            label by itself, and none may fit.

        Raises:
            ValueError: labels missing, empty or given twice, a template without `{}` or beside `text_states`, states
                for another number of labels, `top_k` below 1, an image without regions, regions that do not fit their
                image or the number of images, or no `text_states` for a model without text tower.
        """
        if "candidate_labels" not in kwargs and "candidate_labels" not in self._forward_params:
            raise ValueError("`candidate_labels` must be a list of texts, got none.")
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(
        self,
        candidate_labels: list[str] | None = None,
        hypothesis_template: str | None = None,
        text_states: torch.Tensor | None = None,
        top_k: int | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        preprocess_params, forward_params, postprocess_params = super()._sanitize_parameters(**kwargs)
        if candidate_labels is not None:
            labels = checked_labels(candidate_labels)
            forward_params["candidate_labels"] = labels
            postprocess_params["candidate_labels"] = labels
        if hypothesis_template is not None:
            check_template(hypothesis_template)
            if text_states is not None:
                raise ValueError(
                    f"`text_states` leave no text for a `hypothesis_template`, got {hypothesis_template!r}."
                )
            forward_params["hypothesis_template"] = hypothesis_template
        if text_states is not None:
            forward_params["text_states"] = text_states
        if top_k is not None:
            postprocess_params["top_k"] = check_top_k(top_k)
        return preprocess_params, forward_params, postprocess_params

    def _forward(
        self,
        model_inputs: dict[str, Any],
        candidate_labels: tuple[str, ...],
        hypothesis_template: str = "{}",
        text_states: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> dict[str, Any]:
        if text_states is None:
            texts = fill_template(hypothesis_template, candidate_labels)
            text_features = remembered_texts(self._embedded_texts, self.model, self.processor, texts)
        elif len(text_states) != len(candidate_labels):
            raise ValueError(
                f"`text_states` must hold one row per label, got {len(text_states)} for {len(candidate_labels)} "
                "labels."
            )
        else:
            states = text_states.to(self.device, self.dtype)
            text_features = self.model.get_text_features(text_states=states).pooler_output
        outputs = super()._forward(model_inputs, **model_kwargs)
        region_embeds = F.normalize(outputs["per_region"], dim=-1)
        text_embeds = F.normalize(text_features.float(), dim=-1).to(region_embeds.device)
        logits = self.model.get_logit_scale().float() * region_embeds @ text_embeds.T
        if (bias := self.model.get_logit_bias()) is not None:
            logits = logits + bias.float().to(logits.device)
        return {"per_region": logits, "regions": outputs["regions"]}

    def postprocess(
        self, model_outputs: dict[str, Any], candidate_labels: tuple[str, ...], top_k: int | None = None
    ) -> list[dict[str, Any]]:
        logits, regions = self.split_outputs(model_outputs)
        scores, order = self.label_scores(logits).sort(dim=-1, descending=True, stable=True)
        return [
            {**region, "labels": [candidate_labels[i] for i in best[:top_k]], "scores": values[:top_k]}
            for region, values, best in zip(regions, scores.tolist(), order.tolist(), strict=True)
        ]

    def label_scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits `(R, T)` to scores in [0, 1]: of all labels together, or, with a sigmoid, of each by itself."""
        sigmoid = self.model.config.contrastive_objective == "sigmoid"
        return logits.sigmoid() if sigmoid else logits.softmax(dim=-1)


def checked_labels(candidate_labels: list[str]) -> tuple[str, ...]:
    """Labels as they are.

    Raises:
        TypeError: no list of texts.
        ValueError: none, an empty one, or one that is given twice.
    """
    if isinstance(candidate_labels, str) or not all(isinstance(label, str) for label in candidate_labels):
        raise TypeError(f"`candidate_labels` must be a list of texts, got {candidate_labels!r}.")
    labels = tuple(candidate_labels)
    if not labels:
        raise ValueError("`candidate_labels` must hold at least one text, got an empty list.")
    if empty := [i for i, label in enumerate(labels) if not label.strip()]:
        raise ValueError(f"`candidate_labels[{empty[0]}]` must not be empty, got {labels[empty[0]]!r}.")
    if repeated := [label for i, label in enumerate(labels) if label in labels[:i]]:
        raise ValueError(f"`candidate_labels` must differ from each other, got {repeated[0]!r} more than once.")
    return labels


def check_template(hypothesis_template: str) -> None:
    """Raises `ValueError` for a template without `{}`."""
    if "{}" not in hypothesis_template:
        raise ValueError(
            f"`hypothesis_template` must contain '{{}}' where the label goes, got {hypothesis_template!r}."
        )


def check_top_k(top_k: int) -> int:
    """`top_k`; `TypeError` for one that is no whole number, `ValueError` for one below 1."""
    if isinstance(top_k, bool) or not isinstance(top_k, Integral):
        raise TypeError(f"`top_k` must be a whole number, got {top_k!r:.80}.")
    if top_k < 1:
        raise ValueError(f"`top_k` must be at least 1, got {top_k}.")
    return top_k


def check_range(name: str, value: float | None, low: float, high: float = 1) -> None:
    """`TypeError` for a value that is no number, `ValueError` for one beyond `[low, high]`; None is in every range."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` must be a number, got {value!r:.80}.")
    if not low <= value <= high:
        raise ValueError(f"`{name}` must lie in [{low}, {high}], got {value}.")


def fill_template(hypothesis_template: str, labels: Sequence[str]) -> list[str]:
    """The template with each label in the place of `{}`."""
    return [hypothesis_template.replace("{}", label) for label in labels]


__all__ = ["ZeroShotRegionClassificationPipeline"]
