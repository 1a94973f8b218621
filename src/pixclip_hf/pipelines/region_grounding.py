"""The `region-grounding` pipeline: where texts are in an image, with a score that is low where they are not."""

from typing import Any

import torch
from transformers import Pipeline

from .region_batches import IMAGE_KEYS
from .region_feature_extraction import RegionPipeline, given_parameters, image_item, is_one_image
from .text_embeddings import EmbeddedTexts, remembered_texts
from .zero_shot_region_classification import check_range, check_template, check_top_k, checked_labels, fill_template

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


class RegionGroundingPipeline(RegionPipeline):
    """Finds the box of each of several texts in an image, with a CLOC that grounds.

    All texts of an image come from one image pass, and a label that is given again, in this call or a later one, is
    embedded only once as long as the weights do not change.

    ```python
    find = pipeline("region-grounding", model="org/cloc")
    find(image, candidate_labels=["a red mug", "the cat on the left"], threshold=0.3)
    ```
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not getattr(self.model, "can_ground", False):
            raise ValueError(
                f"`model` must be a CLOC with `config.grounding=True`, got a {type(self.model).__name__} without a "
                "box head."
            )
        self._embedded_texts = EmbeddedTexts()

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """Finds texts.

        Args:
            inputs: an image (path, URL, PIL image, array or tensor), a dict
                `{"image": ..., "candidate_labels": [...]}` with texts of its own, or a list, generator or dataset of
                either.
            candidate_labels (`list[str]`): the texts to look for, of any length; for a list of images the texts of all
                images, or a list of such lists, one for each image.
            hypothesis_template (`str`): a text in which each label takes the place of `{}`; `"{}"` by default.
            threshold (`float`): least score of a box, 0.1 by default. A score is the cosine similarity of a text and
                the region that was found for it, in [-1, 1], as `CLOCModel.ground` gives it with `steady_scores`. It
                is lower where the text is absent; how much lower is for data like yours to say.
            top_k (`int`): keeps this many of the best boxes of each image; all of them by default.
            batch_size, num_workers: as in [`RegionFeatureExtractionPipeline`].

        Returns:
            For one image, a list of dicts `{"score": float, "label": str, "box": {"xmin", "ymin", "xmax", "ymax"} in
            pixels of the original image}`, best first; for a list of images a list of those; for a generator or
            dataset an iterator over them.

        Raises:
            OSError, TypeError, ValueError: labels missing, empty or given twice, a template without `{}`, `top_k`
                below 1, a `threshold` beyond [-1, 1], or an image that can't be read. The message names the image of a
                list, generator or dataset by its index.
        """
        if is_one_image(inputs):
            return Pipeline.__call__(self, inputs, **kwargs)
        labels = kwargs.get("candidate_labels")
        of_images = isinstance(labels, (list, tuple)) and any(isinstance(row, (list, tuple)) for row in labels)
        belongings = {"candidate_labels": kwargs.pop("candidate_labels")} if of_images else {}
        return self.call_on_many(inputs, belongings, _text_item, **kwargs)

    def _sanitize_parameters(
        self,
        candidate_labels: list[str] | None = None,
        hypothesis_template: str | None = None,
        threshold: float | None = None,
        top_k: int | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if candidate_labels is not None:
            candidate_labels = list(checked_labels(candidate_labels))
        if hypothesis_template is not None:
            check_template(hypothesis_template)
        check_range("threshold", threshold, -1)
        if top_k is not None:
            check_top_k(top_k)
        return (
            given_parameters({"candidate_labels": candidate_labels}),
            given_parameters({"hypothesis_template": hypothesis_template}),
            given_parameters({"threshold": threshold, "top_k": top_k}),
        )

    def preprocess(self, inputs: Any, candidate_labels: list[str] | None = None) -> dict[str, Any]:
        item = _text_item(inputs)
        labels = item.get("candidate_labels")
        if labels is not None:
            labels = checked_labels(labels)
        elif (labels := candidate_labels) is None:
            raise ValueError("`candidate_labels` must be a list of texts, got none.")
        # A region that is the whole image says how large that is.
        whole = {"boxes": [[0, 0, 1, 1]], "normalized": True, "return_regions": True}
        processed = self.processor(images=item["image"], **whole, return_tensors="pt")
        box = processed["regions"][0][0]["box"]
        size = (round(box["ymax"]), round(box["xmax"]))
        processed["pixel_values"] = processed["pixel_values"].to(self.dtype)
        return {
            **_images(processed),
            "region_attention_mask": torch.ones(1, len(labels), dtype=torch.long),
            "regions": [[{"label": label, "size": size} for label in labels]],
        }

    def _forward(self, model_inputs: dict[str, Any], hypothesis_template: str = "{}") -> dict[str, Any]:
        regions = model_inputs["regions"]
        labels = list(dict.fromkeys(text["label"] for texts in regions for text in texts))
        embeds = remembered_texts(
            self._embedded_texts, self.model, self.processor, fill_template(hypothesis_template, labels)
        )
        found = self.model.ground(**_images(model_inputs), text_embeds=embeds.to(self.dtype), steady_scores=True)
        rows = torch.cat([found.pred_boxes, found.scores[..., None].to(found.pred_boxes)], dim=-1).float()
        per_text = rows.new_zeros(len(regions), max(map(len, regions)), 5)
        for image, texts in enumerate(regions):
            per_text[image, : len(texts)] = rows[image, [labels.index(text["label"]) for text in texts]]
        return {"per_region": per_text, "regions": regions}

    def postprocess(
        self, model_outputs: dict[str, Any], threshold: float = 0.1, top_k: int | None = None
    ) -> list[dict[str, Any]]:
        rows, texts = self.split_outputs(model_outputs)
        if not texts:
            return []
        (boxes,) = self.processor.post_process_boxes(rows[None, :, :4], [texts[0]["size"]])
        found = [
            {"score": score, "label": text["label"], "box": dict(zip(_CORNERS, box, strict=True))}
            for text, box, score in zip(texts, boxes.tolist(), rows[:, 4].tolist(), strict=True)
            if score >= threshold
        ]
        return sorted(found, key=lambda entry: -entry["score"])[:top_k]


def _images(inputs: Any) -> dict[str, torch.Tensor]:
    """What the vision tower takes of some inputs."""
    return {name: inputs[name] for name in IMAGE_KEYS if name in inputs}


def _text_item(image: Any, **given: Any) -> dict[str, Any]:
    return image_item(image, ("candidate_labels",), **given)


__all__ = ["RegionGroundingPipeline"]
