"""What the experiments have in common: folders, options, and how jobs are put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from run_scripts.claims.jobs import Job

PICTURES = "{name: blip_image_eval, image_size: 63}"
PROCESSORS = (
    f"vis_processor={{train: {PICTURES}, eval: {PICTURES}}}",
    "text_processor={train: {name: blip_caption}, eval: {name: blip_caption}}",
)


@dataclass(frozen=True)
class Lab:
    """Where the experiments take place.

    Args:
        output: the runs' folder.
        data: where the embedded data lies, and the language model.
        options: key=value of all trainings, for trying things out.
        scenes: options of `blip data make scenes`, likewise.
        reader: options of `tiny_llm.py`, likewise.
    """

    output: Path
    data: Path
    options: tuple[str, ...] = ()
    scenes: tuple[str, ...] = ()
    reader: tuple[str, ...] = ()

    def job(self, name: str, *commands: Sequence[str], needs: Sequence[Job] = ()) -> Job:
        """A job whose folder is called `name`."""
        return Job(Path(self.folder(name)), tuple(tuple(one) for one in commands), tuple(needs))

    def folder(self, name: str) -> str:
        """The folder of the job that is called `name`."""
        return str(self.output / "runs" / name)

    def train(self, recipe: str, name: str, *options: str, data: Path | None = None) -> tuple[str, ...]:
        """The command that trains by a recipe into the folder of the job `name`."""
        where = (
            f"run.data_root={data or self.data}",
            f"run.output_dir={self.folder(name)}",
            "run.resume=auto",
        )
        return ("-m", "blip.train", "--cfg", recipe, *options, *self.options, *where)

    # The embedded data

    @property
    def noisy(self) -> Path:
        """Data root of a thousand pictures with people's captions, and five times as many of the web."""
        return self.output / "noisy"

    def scenes_job(self) -> Job:
        """The embedded data as all recipes know it: 10,000 pictures."""
        made = ("-m", "blip.data", "make", "scenes", "--data-root", str(self.data), *self.scenes)
        return self.job("data/scenes", made)

    def noisy_job(self) -> Job:
        """Few captions by people, many of the web, about other pictures than those of `scenes_job`."""
        sizes = ("--seed", "1", "--train", "1000", "--web", "5000", *self.scenes)
        made = ("-m", "blip.data", "make", "scenes", "--data-root", str(self.noisy), *sizes)
        return self.job("data/noisy", made)

    def tower_job(self) -> Job:
        """A tower that has learned to see, as those of the papers come from ImageNet or from CLIP."""
        name = "data/tower"
        return self.job(name, self.train("tiny/blip_tower.yaml", name), needs=[self.scenes_job()])

    def tower(self) -> str:
        """Option that starts from the tower."""
        return f"model.vit_init_from={self.folder('data/tower')}"
