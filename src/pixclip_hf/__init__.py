"""PixCLIP and CLOC as Hugging Face models.

Importing the package registers its configurations, models, processors and pipelines with transformers, so that
`AutoModel`, `AutoProcessor` and `pipeline` know them. Data and training need extra requirements and load on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .versions import check_versions

check_versions()  # before anything of transformers: a clear message, not a name that some version lacks

# ruff: noqa: E402, I001
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
)
from transformers.pipelines import PIPELINE_REGISTRY

from .modeling.configuration_cloc import CLOCConfig
from .modeling.configuration_eva02 import Eva02VisionConfig
from .modeling.configuration_pipelines import SavesPipelines
from .modeling.configuration_pixclip import PixCLIPConfig
from .modeling.modeling_cloc import CLOCModel, CLOCOutput, CLOCPreTrainedModel, CLOCVisionModel
from .modeling.modeling_eva02 import Eva02VisionModel
from .modeling.modeling_pixclip import PixCLIPModel, PixCLIPOutput, PixCLIPPreTrainedModel, PixCLIPVisionModel
from .pipelines.region_detection import RegionDetectionPipeline
from .pipelines.region_feature_extraction import RegionFeatureExtractionPipeline
from .pipelines.region_grounding import RegionGroundingPipeline
from .pipelines.zero_shot_region_classification import ZeroShotRegionClassificationPipeline
from .processing.image_processing_region import RegionImageProcessor
from .processing.processing_cloc import CLOCProcessor
from .processing.processing_pixclip import PixCLIPProcessor

if TYPE_CHECKING:  # the lazy names below, for editors and type checkers
    from .data.collator import RegionCollator
    from .data.parquet_shards import save_records
    from .scenes.dataset import make_scene, scenes_dataset
    from .data.sources import load_records
    from .scenes.tokenizer import scenes_tokenizer, train_tokenizer
    from .encoders.region_encoder import RegionEncoder
    from .encoders.view_encoder import ViewEncoder, load_encoder
    from .detection import coco_results, detect
    from .hub import publish
    from .mask_models import MaskModel, masks_from_points
    from .record import record_features, validate_record
    from .training.text_cache import TextEmbeddingCache
    from .training.trainer import RegionTrainer

__version__ = "0.2.0.dev0"

# Public names whose modules need an extra (`pip install pixclip-hf[train]`, `[data]`): imported on first access.
_MODULE_OF_LAZY_NAME = {
    "coco_results": ".detection",
    "detect": ".detection",
    "load_records": ".data.sources",
    "make_scene": ".scenes.dataset",
    "masks_from_points": ".mask_models",
    "publish": ".hub",
    "record_features": ".record",
    "save_records": ".data.parquet_shards",
    "scenes_dataset": ".scenes.dataset",
    "scenes_tokenizer": ".scenes.tokenizer",
    "train_tokenizer": ".scenes.tokenizer",
    "validate_record": ".record",
    "MaskModel": ".mask_models",
    "RegionCollator": ".data.collator",
    "RegionEncoder": ".encoders.region_encoder",
    "RegionTrainer": ".training.trainer",
    "TextEmbeddingCache": ".training.text_cache",
    "ViewEncoder": ".encoders.view_encoder",
    "load_encoder": ".encoders.view_encoder",
}

__all__ = [
    "CLOCConfig",
    "CLOCModel",
    "CLOCOutput",
    "CLOCPreTrainedModel",
    "CLOCProcessor",
    "CLOCVisionModel",
    "Eva02VisionConfig",
    "Eva02VisionModel",
    "MaskModel",
    "PixCLIPConfig",
    "PixCLIPModel",
    "PixCLIPOutput",
    "PixCLIPPreTrainedModel",
    "PixCLIPProcessor",
    "PixCLIPVisionModel",
    "RegionCollator",
    "RegionDetectionPipeline",
    "RegionEncoder",
    "RegionFeatureExtractionPipeline",
    "RegionGroundingPipeline",
    "RegionImageProcessor",
    "RegionTrainer",
    "TextEmbeddingCache",
    "ViewEncoder",
    "ZeroShotRegionClassificationPipeline",
    "coco_results",
    "detect",
    "load_encoder",
    "load_records",
    "make_scene",
    "masks_from_points",
    "publish",
    "record_features",
    "save_records",
    "scenes_dataset",
    "scenes_tokenizer",
    "train_tokenizer",
    "validate_record",
]


def _register() -> None:
    for config, model, vision_model, processor in (
        (CLOCConfig, CLOCModel, CLOCVisionModel, CLOCProcessor),
        (PixCLIPConfig, PixCLIPModel, PixCLIPVisionModel, PixCLIPProcessor),
    ):
        AutoConfig.register(config.model_type, config)
        # Of two classes a folder's `architectures` decides, and the first one where it decides nothing.
        AutoModel.register(config, (model, vision_model))
        AutoModelForZeroShotImageClassification.register(config, model)
        AutoImageProcessor.register(config, image_processor_classes={"pil": RegionImageProcessor})
        AutoProcessor.register(config, processor)
        # What makes `save_pretrained` put the code beside the weights, for those without this package.
        config.register_for_auto_class()
        model.register_for_auto_class("AutoModel")
        vision_model.register_for_auto_class("AutoModel")
        processor.register_for_auto_class("AutoProcessor")
    # The tower by itself; its configuration is registered where both models' configurations need it.
    AutoModel.register(Eva02VisionConfig, Eva02VisionModel)
    Eva02VisionConfig.register_for_auto_class()
    Eva02VisionModel.register_for_auto_class("AutoModel")
    RegionImageProcessor.register_for_auto_class("AutoImageProcessor")
    for task, pipeline_class in (
        ("region-feature-extraction", RegionFeatureExtractionPipeline),
        ("zero-shot-region-classification", ZeroShotRegionClassificationPipeline),
        ("region-grounding", RegionGroundingPipeline),
        ("zero-shot-region-detection", RegionDetectionPipeline),
    ):
        PIPELINE_REGISTRY.register_pipeline(task, pipeline_class, pt_model=AutoModel)
        SavesPipelines.pipeline_classes[task] = pipeline_class


_register()


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF_LAZY_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF_LAZY_NAME[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF_LAZY_NAME})
