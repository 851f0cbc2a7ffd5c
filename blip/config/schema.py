"""The typed configuration: `model`, `datasets` and `run`, with every default written here once.

A model adds its own sizes by subclassing `ModelConfig` beside its class, a task its own run keys by
subclassing `RunConfig`. The string under a field is its documentation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from blip import templates
from blip.config.published import published_problems
from blip.errors import ConfigError, hint

SPLITS = ("train", "val", "test")
SPECIAL = ("dec", "enc", "sep", "pad")
"""BERT's tokens that a model puts in or looks for itself."""


class SectionError(ConfigError):
    """Impossible combinations in one section, such as `run`; `problems` has one `key: reason` each."""

    def __init__(self, section: str, problems: list[str]) -> None:
        self.section = section
        self.problems = problems
        super().__init__("; ".join(f"{section}.{problem}" if section else problem for problem in problems))


class Section:
    """A part of the configuration that refuses impossible combinations when it is built."""

    section: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if problems := self.problems():
            raise SectionError(self.section, problems)

    def problems(self) -> list[str]:
        """What cannot be used as it stands, one `key: reason; what to do` each; subclasses extend it."""
        return []

    def _at_least(self, low: float, *keys: str) -> list[str]:
        values = {key: getattr(self, key) for key in keys}
        return [f"{k}: {v} is below {low}" for k, v in values.items() if v is not None and v < low]

    def _within(self, low: float, high: float, *keys: str) -> list[str]:
        values = {key: getattr(self, key) for key in keys}
        bad = {k: v for k, v in values.items() if v is not None and not low <= v <= high}
        return [f"{key}: {value} is not between {low:g} and {high:g}" for key, value in bad.items()]


@dataclass
class ModelConfig(Section):
    """What every model has; a model's own config class adds its sizes and switches."""

    section: ClassVar[str] = "model"

    arch: str = ""
    """Registry name of the model."""
    model_type: str = ""
    """Preset of the model; empty means its first one."""
    init_from: str | None = None
    """Run folder, checkpoint or weight file to start from; wins over `finetuned` and `pretrained`."""
    load_finetuned: bool = True
    """Start from `finetuned` where it names weights."""
    finetuned: str | None = None
    """Weights of the fine-tuned model: a file, folder or hub id, or `published`: those of the model type."""
    load_pretrained: bool = True
    """Start from `pretrained` where it names weights and no finetuned ones are loaded."""
    pretrained: str | None = None
    """Weights of the pre-trained model, likewise; `published`: what training of the type starts from."""
    special_ids: dict[str, int] = field(default_factory=dict)
    """Ids of `dec`, `enc`, `sep` and `pad` that are not the tokenizer's. Where none is read, since texts are
    given as ids, others are the last rows of the vocabulary, and BERT's 102 and 0."""

    def problems(self) -> list[str]:
        """Ids of no such token, or below 0."""
        unknown = [key for key in self.special_ids if key not in SPECIAL]
        low = [key for key, number in self.special_ids.items() if number < 0]
        found = [f"special_ids: no token {key!r}{hint(key, SPECIAL)}" for key in unknown]
        return super().problems() + found + [f"special_ids.{key}: below 0" for key in low]


@dataclass
class DatasetConfig(Section):
    """One entry of `datasets`; a name from the catalogue fills in what is left out."""

    section: ClassVar[str] = "datasets"

    kind: Literal["auto", "instruct", "caption", "vqa", "nlvr", "classification"] = "auto"
    """What a record is: a picture and an instruction with the expected output, a picture and captions, a
    picture and a question, two pictures and a sentence, or one picture and a sentence, both with a label;
    `auto` tells by the columns."""
    data_type: Literal["images", "videos"] = "images"
    """Pictures, or videos, which are also known by their column `video` or an `alpro_video_...` processor."""
    path: str | list[str] | dict[str, Any] | None = None
    """Annotations: a file, folder or shard pattern, several of them, or one entry per split (`train`, `val`,
    `test`). Relative to the data root."""
    images: str | list[str] | dict[str, Any] | None = None
    """Folder the records' image or video paths start from, likewise several or one per split; None: beside
    `path`."""
    features: str | None = None
    """Folder that `blip cache_features` has written: training reads the frozen tower's states from there, in
    place of pictures. Relative to the data root, unless it is there as given."""
    decoder: Literal["pil", "torchcodec"] = "pil"
    """What decodes color JPEGs: Pillow, or torchcodec where it is installed, with the same pixels. All other
    pictures are Pillow's; videos choose by what is installed."""
    format: Literal["auto", "json", "jsonl", "csv", "tsv", "folder", "shards", "hf"] = "auto"
    """Layout of `path`; `auto` tells by name and content."""
    split: str | None = None
    """Split that a plain `path` belongs to, or the only one to use of several; None: train for a plain
    `path`, all for a catalogue name."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our name -> the file's name, for image, video, caption, image_id, question, answer, ..."""
    types: list[str] = field(default_factory=list)
    """Use only the records of these types, as their column `type` calls them; empty: all."""
    templates: str | list[str] | None = None
    """Instructions to train on captions, questions or sentences with: names of lists (`caption`, `vqa`, ...,
    see `blip.templates`) and templates such as "Question: {question} Answer:". One is drawn for each sample;
    evaluation of instructions takes the first. None: where the task trains on instructions, those of the
    catalogue, else the list of the kind; elsewhere none."""
    ocr_file: str | dict[str, Any] | None = None
    """JSON with `ocr_tokens`, words read in the pictures, by `image_id`, or one file per split, for templates
    that show them; None: of the catalogue, else the records' own; empty: none."""
    answer_list: str | None = None
    """JSON list of the answers that are ranked; None: of the catalogue, else all answers of `train`."""
    measure: Literal["auto", "vqa", "exact", "direct", "pairs", "choice", "ranks", "auc"] = "auto"
    """What counts as right: the VQA accuracy; one of the reference answers, cleaned; A-OKVQA's min(1, n / 3)
    for n equal ones as written; iVQA's min(1, n / 2); the right one of a question's choices; the place of the
    right one among them (VisDial); the area under the ROC curve of two classes. `auto`: of the catalogue,
    else the VQA accuracy."""
    answer_weight: float = 1.0
    """Factor of the answers' weights in training. BLIP's own takes 0.2 for Visual Genome, LAVIS 1."""
    annotation_file: str | dict[str, Any] | None = None
    """Official annotations that evaluation compares with in place of the records' own, or one file per split:
    VQA's by `question_id`, COCO's captions by `image_id`; None: of the catalogue; empty: none."""
    classes: list[str] = field(default_factory=list)
    """Labels in the order of their class numbers; empty: of the catalogue, else those of `train`, sorted."""
    cut: float = 0.5
    """Where one picture that holds both of kind nlvr is cut in two, as a share of its width."""
    image_ids: bool = True
    """Give the model `image_id`, so that captions of one picture do not count as negatives of each other."""
    vis_processor: dict[str, dict[str, Any]] = field(default_factory=dict)
    """`{train: {name: ..., option: value}, eval: {...}}` for pictures or videos."""
    text_processor: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The same for texts."""
    sample_ratio: float | None = None
    """Weight in a mixture; None: in proportion to the number of samples. With `run.sampling`, a factor on the
    weight that follows from that (None: 1)."""
    prompt: str = ""
    """Put in front of every text of this dataset."""
    lanes: int = 16
    """Logical lanes that shards are dealt to; more ranks x workers than lanes leaves some idle."""
    window: int = 256
    """Samples per lane that are permuted among each other, in shards; 1 keeps the stored order."""
    remote: bool = False
    """Let `path` name shards that are not on this machine: urls of http(s), s3, gs, hf ..., such as
    s3://bucket/{00000..00099}.tar; they are fetched whole while others are read. Commands (`pipe:...`) need
    the environment variable BLIP_PIPES=1 besides."""
    cache_dir: str | None = None
    """Folder that fetched shards are kept in, one within it per dataset; None: `remote` in the data root."""
    cache_gb: float = 32.0
    """Gigabytes (1e9 bytes) of fetched shards to keep; two shards per lane let each lane fetch ahead."""
    num_samples: int | None = None
    """Samples in all shards; None: as sizes.json beside them tells, else counted, of remote ones in one."""
    max_samples: int | None = None
    """Use the first so many records of each split only."""
    build_info: dict[str, Any] = field(default_factory=dict)
    """LAVIS's `annotations.{split}.storage`, `images.storage` or `videos.storage`; `path`, `images` win."""

    def problems(self) -> list[str]:
        """Counts and ratios that make no sense."""
        found = self._at_least(1, "lanes", "window", "max_samples", "num_samples") + self._at_least(
            0, "sample_ratio"
        )
        if self.cache_gb <= 0:
            found.append(f"cache_gb: {self.cache_gb} is not above 0")
        if self.answer_weight <= 0:
            found.append(f"answer_weight: {self.answer_weight} is not above 0")
        if not 0 < self.cut < 1:
            found.append(f"cut: {self.cut} is not between 0 and 1")
        if repeated := [name for name in self.classes if self.classes.count(name) > 1]:
            found.append(f"classes: {repeated[0]!r} stands there twice")
        for key in ("vis_processor", "text_processor"):
            for stage, options in getattr(self, key).items():
                if stage not in ("train", "eval"):
                    found.append(f"{key}.{stage}: no such stage; choose train or eval")
                elif not isinstance(options, dict) or not isinstance(options.get("name"), str):
                    found.append(
                        f"{key}.{stage}: needs the name of a processor, as in {{name: blip_caption}}"
                    )
        if isinstance(self.path, list) and not self.path:
            found.append("path: the list is empty; name at least one file")
        if self.templates is not None:
            found += [f"templates: {problem}" for problem in templates.problems(self.templates)]
        if repeated := [name for name in self.types if self.types.count(name) > 1]:
            found.append(f"types: {repeated[0]!r} stands there twice")
        return found


@dataclass
class CommandRun(Section):
    """What every command that reads a configuration knows of its run."""

    section: ClassVar[str] = "run"

    task: str = ""
    """Registry name of the task."""
    seed: int = 42
    """Key of all randomness of the run."""
    output_dir: str | None = None
    """Run folder; None: `output/<config name>/<start time>`."""
    resume: str | None = None
    """`auto`: continue the newest complete checkpoint in `output_dir`; a path: that checkpoint."""
    overwrite: bool = False
    """Replace a run that `output_dir` already holds."""
    data_root: str | None = None
    """Where datasets lie; None: the environment variable BLIP_DATA, else `data`."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """`auto` takes the GPU where there is one."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Autocast type of the trained parts; `auto`: bf16 where the GPU has it, else fp16, and fp32 on a CPU."""
    deterministic: bool = False
    """Bit-identical results on a GPU too, at some speed."""
    timeout_s: float = 1800.0
    """Seconds a collective waits for a missing rank before the run fails."""

    batch_size_eval: int = 64
    """Samples per process that are looked at together where nothing is trained."""
    num_workers: int = 2
    """Loader processes per rank; 0 loads in the main process."""
    train_splits: list[str] = field(default_factory=lambda: ["train"])
    """Splits to train on."""
    max_bad_ratio: float = 0.05
    """Share of unreadable records above which a run stops."""

    def problems(self) -> list[str]:
        """Values out of range."""
        found = self._at_least(1, "batch_size_eval") + self._at_least(0, "num_workers", "seed")
        found += self._within(0.0, 1.0, "max_bad_ratio")
        if self.timeout_s <= 0:
            found.append(f"timeout_s: {self.timeout_s} is not above 0")
        return super().problems() + found


@dataclass
class RunConfig(CommandRun):
    """How to train and evaluate. LAVIS's names; counts are optimizer steps unless said otherwise."""

    evaluate: bool = False
    """Evaluate only, without training."""
    batch_size_train: int = 32
    """Samples per process and micro-batch."""
    drop_last: bool = True
    """Leave out the samples of an epoch that do not fill a batch."""
    accum_grad_iters: int = 1
    """Micro-batches per optimizer step."""
    accum_mode: Literal["mean", "cached"] = "mean"
    """`mean` averages the micro-batches' losses; `cached` gives the contrastive loss of the whole batch."""

    max_epoch: int | None = None
    """Length in epochs."""
    max_iters: int | None = None
    """Length in optimizer steps; with `max_epoch` the run ends at whichever comes first."""
    lr_sched: Literal["linear_warmup_cosine_lr", "linear_warmup_step_lr", "constant_lr"] = (
        "linear_warmup_cosine_lr"
    )
    """Schedule after the warm-up."""
    lr_per_epoch: bool = False
    """LAVIS's staircase: the rate changes at epoch ends only, and warm-up ends with the first epoch."""
    init_lr: float = 1e-4
    """Peak learning rate."""
    min_lr: float = 0.0
    """Lowest learning rate after the warm-up."""
    warmup_lr: float = 0.0
    """Learning rate the warm-up starts from."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up."""
    lr_decay_rate: float = 1.0
    """Factor per epoch of `linear_warmup_step_lr`."""

    optimizer: Literal["adamw"] = "adamw"
    """Update rule."""
    weight_decay: float = 0.05
    """Decoupled decay of matrices; biases and norms have none."""
    beta1: float = 0.9
    """AdamW's first moment."""
    beta2: float = 0.999
    """AdamW's second moment."""
    adam_eps: float = 1e-8
    """AdamW's epsilon."""
    lr_layer_decay: float = 1.0
    """Factor on the learning rate per vision block, from the last to the first."""
    lr_scales: dict[str, float] = field(default_factory=dict)
    """Factor on the learning rate of parameters whose names begin so, such as {qformer: 0.1}; `*` stands for
    anything, and where several fit, the longest decides."""
    max_grad_norm: float | None = None
    """Clip the global gradient norm to this."""
    ema_decay: float | None = None
    """Keep a moving average of the weights with this decay, for evaluation and the final model."""
    max_nonfinite: int = 10
    """Non-finite steps in a row after which the run stops; each is skipped."""

    log_freq: int = 50
    """Steps between lines of the log."""
    save_freq: int | None = None
    """Steps between checkpoints; None: at every evaluation and at the end."""
    save_minutes: float | None = None
    """Also save when so many minutes have passed since the last checkpoint."""
    keep_last: int = 2
    """Checkpoints to keep beside the best one."""
    eval_freq: int | None = None
    """Steps between evaluations of `valid_splits`; None: every `val_freq` epochs."""
    val_freq: int = 1
    """Epochs between evaluations where `eval_freq` is not given."""
    monitor: str | None = None
    """Metric that decides the best checkpoint; None: the task's own."""
    monitor_mode: Literal["max", "min"] = "max"
    """Whether more or less of `monitor` is better."""
    tensorboard: bool = False
    """Write TensorBoard files into the run folder."""
    wandb: str | None = None
    """Weights & Biases project to log to."""

    sampling: Literal["proportional", "sqrt", "uniform"] | None = None
    """How often micro-batches come from each dataset: in proportion to its size, to the square root of that
    (InstructBLIP, section 2.4), or from all equally often, times its `sample_ratio`; None: the sample ratios
    are the weights themselves, or, where there is none, all datasets are one."""
    valid_splits: list[str] = field(default_factory=list)
    """Splits to evaluate during training; the first one decides the best checkpoint."""
    test_splits: list[str] = field(default_factory=list)
    """Splits to evaluate at the end, with the best checkpoint."""
    published: list[dict[str, Any]] = field(default_factory=list)
    """What others have reached, shown beside the last scores: rows of `source`, `data` (DATASET/SPLIT),
    `scores` (metric -> value as papers print it) and, where it matters, `model_type`, `weights`, `server`,
    `note`; see `blip.config.published`."""

    def problems(self) -> list[str]:
        """Values out of range and combinations that contradict each other."""
        found = super().problems()
        found += self._at_least(1, "batch_size_train", "accum_grad_iters", "max_epoch", "max_iters")
        found += self._at_least(
            1, "log_freq", "save_freq", "eval_freq", "val_freq", "keep_last", "max_nonfinite"
        )
        found += self._at_least(0, "warmup_steps", "min_lr", "warmup_lr", "weight_decay")
        found += self._within(0.0, 1.0, "beta1", "beta2", "ema_decay")
        for key in (
            "init_lr",
            "adam_eps",
            "lr_decay_rate",
            "lr_layer_decay",
            "max_grad_norm",
            "save_minutes",
        ):
            value = getattr(self, key)
            if value is not None and value <= 0:
                found.append(f"{key}: {value} is not above 0")
        for name, factor in self.lr_scales.items():
            if factor <= 0:
                found.append(
                    f"lr_scales.{name}: {factor} is not above 0; model.freeze_vit and the like freeze"
                )
        if self.monitor_mode not in ("max", "min"):
            found.append(f"monitor_mode: {self.monitor_mode!r} is unknown; choose max or min")
        if self.min_lr > self.init_lr:
            found.append(
                f"min_lr: {self.min_lr:g} is above init_lr ({self.init_lr:g}); lower it or raise init_lr"
            )
        if self.warmup_steps and self.warmup_lr > self.init_lr:
            found.append(
                f"warmup_lr: {self.warmup_lr:g} is above init_lr ({self.init_lr:g}), where the warm-up ends"
            )
        if self.max_epoch is None and self.max_iters is None and not self.evaluate:
            found.append(
                "max_iters: neither max_epoch nor max_iters is given; set one of them, or evaluate: true"
            )
        if not self.train_splits and not self.evaluate:
            found.append("train_splits: empty; name a split to train on, or set evaluate: true")
        if self.lr_per_epoch and self.max_epoch is None and not self.evaluate:
            found.append("lr_per_epoch: the staircase needs max_epoch")
        return found + published_problems(self.published, SPLITS)


@dataclass
class Config:
    """All that a command needs to know: three typed sections, and where each value came from."""

    model: Any
    """`ModelConfig`, or what the task has in its place."""
    datasets: dict[str, DatasetConfig]
    run: Any
    """`RunConfig`, or what else the task has."""
    name: str = ""
    """Name of the recipe, for the default output folder."""
    origins: dict[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Dotted key -> `default`, `preset blip2/pretrain`, a file name, or `command line`."""
    notes: list[str] = field(default_factory=list, compare=False, repr=False)
    """What was accepted but has no effect here, with the reason; commands show these as warnings."""
