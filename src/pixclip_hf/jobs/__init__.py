"""Restartable work over shards: what annotation and embedding of millions of images run on.

A [`Plan`] cuts the items of a source into shards. A *pass* takes shards one after another, reads, works, writes, and
yields each with its manifest, a small dict that says what became of it:

    @dataclass
    class CountWords:
        output: Path
        num_gpus: ClassVar[float] = 0

        def __call__(self, shards: Iterator[Shard]) -> Iterator[tuple[Shard, dict]]:
            source = open_source("images folder=photos")
            for shard in shards:
                words = [len((source.read(i).alt_text or "").split()) for i in shard.positions]
                with whole_file(self.output / "data" / f"{shard.number:05d}.json") as unfinished:
                    unfinished.write_text(json.dumps(words))
                yield shard, {"words": sum(words)}

[`run_passes`] calls the passes of a job in this process, in processes of this machine, or in actors of Ray. Whoever
works on a shard also writes its files, each under a hidden name that becomes its own when the file is whole, and its
manifest last. The coordinating process sees manifests only. A run that is killed at any point is started again with
the same settings and goes on with the shards that have no manifest; what a killed worker had begun is done again.

- A pass pickles; models, clients and the like are loaded on the first call, once per process.
- A pass writes the same bytes for a shard whatever was done before it.
- Stages that need other hardware are passes of their own, with the shards between them on disk (`between_path`).
"""

from .folder import JobFolder
from .passes import Pass, between_path, run_passes
from .plan import Plan, Shard, plan_shards

__all__ = ["JobFolder", "Pass", "Plan", "Shard", "between_path", "plan_shards", "run_passes"]
