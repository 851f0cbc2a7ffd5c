"""LAVIS's keys in our terms: renamed, ignored with the reason, or refused with the reason.

`translate` works on the sections as written, before they are typed, so that LAVIS's own files of the BLIP
family are accepted as they are and nothing in them is dropped silently.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from blip.registry import PROCESSORS, TASKS

LAUNCH = "torchrun's environment says how many processes there are and how they meet"
UNRELEASED = "it belongs to a runner that LAVIS never released"
ONE_LOOP = "epochs and iterations are numbers of one training loop (max_epoch, max_iters)"

IGNORED_ROOTS = {
    "env": "datasets lie below run.data_root or the environment variable BLIP_DATA",
    "preprocess": "processors are part of each dataset's section",
}
IGNORED_RUN = {
    "runner": ONE_LOOP,
    "dist_url": LAUNCH,
    "world_size": LAUNCH,
    "distributed": LAUNCH,
    "gpu": LAUNCH,
    "rank": LAUNCH,
    "dist_backend": LAUNCH,
    "save_last": "the last checkpoint is always kept",
    "use_dist_eval_sampler": "evaluation is spread over all processes and exact for every task",
    "use_datapipe": "the format of a dataset is recognised by its path",
    **dict.fromkeys(
        ("annotation_file", "anno_files", "ques_files", "load_gt_from_file"),
        "what to compare with is the dataset's: its records, or datasets.NAME.annotation_file",
    ),
    **dict.fromkeys(
        ("caption_key", "sample_id_key"), "datasets.NAME.columns says what a file calls its columns"
    ),
    "task_config": UNRELEASED,
}
IGNORED_MODEL = {
    "med_config_path": "the sizes of the text model are keys of the model section",
    "format_candidates_prompt": "it serves 3D classification, which is no part of the BLIP family",
    "predict_with_gen": "it serves 3D classification, which is no part of the BLIP family",
    **dict.fromkeys(
        ("num_few_shot_examples", "few_shot_prob"),
        "no dataset has samples of a few shots, and the published models were trained without",
    ),
}
LANGUAGE_MODELS = ("opt_model", "t5_model")
"""What LAVIS calls `llm_model` in BLIP-2."""
IGNORED_DATASET = {
    "batch_size": "batches are made after mixing; run.batch_size_train says how large",
    "kw_processor": "no model of the BLIP family reads keywords",
    "pc_processor": "point clouds are no part of the BLIP family",
    "audio_processor": "audio is no part of the BLIP family",
}
TASK_KEYS = {
    **dict.fromkeys(("max_len", "min_len", "num_beams", "length_penalty"), "generating tasks"),
    **dict.fromkeys(("repetition_penalty", "top_p", "temperature"), "generating tasks"),
    **dict.fromkeys(("inference_method", "num_ans_candidates", "prompt"), "question-answering tasks"),
    **dict.fromkeys(("report_metric", "img_ids"), "captioning"),
    "k_test": "retrieval",
    "segments": "video classification",
}
"""Run keys that belong to some task; with another task they have no effect."""

QUESTION_TASKS = ("vqa", "gqa", "aok_vqa")
GENERATING = ("max_len", "min_len", "num_beams")
"""Run keys of question answering that answers which are ranked have no use for."""

MODEL_TYPES = {("blip_caption", "base"): "base_coco", ("blip_caption", "large"): "large_coco"}
"""Model types that LAVIS's files name but its zoo does not have."""

DOWNLOAD = "nothing is downloaded here; the files of `storage` have to be in place"
REFUSED_PROCESSORS = {
    "gpt_video_ft": "serves video dialogue, which is no part of the BLIP family",
    "gpt_dialogue": "serves video dialogue, which is no part of the BLIP family",
    "ulip_pc": "reads point clouds, and this library reads pictures and videos only",
}
_SOUND = "has sound, which no model here hears"
_POINTS = "has point clouds, which no model here sees"
_CLIPS = "is a set of videos that no paper of the BLIP family uses"
REFUSED_DATASETS = {
    **dict.fromkeys(("audiocaps", "audioset", "clotho", "esc50", "music_avqa", "valor", "wavcaps"), _SOUND),
    **dict.fromkeys(("avsd", "yt8m"), "serves video dialogue, which is no part of the BLIP family"),
    **dict.fromkeys(("modelnet40", "objaverse", "shapenet"), _POINTS),
    **dict.fromkeys(("audio_video", "image_pc"), "compares sound or point clouds, which no model here knows"),
    **dict.fromkeys(("charade", "coin", "violin", "vlep", "webvid2m", "youcook"), _CLIPS),
    "blip_diffusion": "serves BLIP-Diffusion, which makes pictures",
    "imagenet": "serves CLIP's zero-shot classification, which no paper of the BLIP family reports",
    "coyo": "is a web set without a row here",
    "sherlock": "is a set of regions that no paper of the BLIP family uses",
}
"""Start of the names of LAVIS's datasets that the catalogue does without -> the reason."""
REFUSED_TASKS = {"dialogue": "video dialogue is no part of the BLIP family"}

LAUNCH_KEYS = ("dist_url", "world_size", "distributed", "runner")
"""Keys that tell a file written for LAVIS: every file of its `projects` folder has some of them."""

SAME_FILES = {("coco_vqa", "eval")}
"""Variants of datasets whose files are those of the default one, with some splits left out."""
VARIANTS = {
    ("gqa", f"balanced_{name}"): {
        "train": "gqa/annotations/train_balanced_questions.json",
        "val": f"gqa/annotations/{name}_balanced_questions.json",
        "test": "gqa/annotations/test_balanced_questions.json",
    }
    for name in ("val", "testdev")
}
"""Variants of datasets -> the files of their splits; the pictures are those of the default one."""
UNUSED_OPTIONS = {
    "alpro_video_eval": {
        "min_scale": "evaluation crops nothing",
        "max_scale": "evaluation crops nothing",
        "full_video": "frames are always taken from the whole video",
    },
    "alpro_video_train": {"full_video": "frames are always taken from the whole video"},
}
"""Options of processors that change nothing in LAVIS, or nothing else than what is done here."""

LAVIS_SCHEDULE = (
    "counted and scheduled per optimizer step here; run.lr_per_epoch=true gives LAVIS's staircase, whose"
    " warm-up ends with the first epoch"
)


@dataclass
class Translation:
    """One source of the configuration in our keys."""

    tree: dict[str, Any]
    from_lavis: bool = False
    """Whether it is a file that was written for LAVIS."""
    notes: list[str] = field(default_factory=list)
    """`key: what became of it`."""
    problems: list[str] = field(default_factory=list)
    """Keys that cannot be translated, `key: reason`."""

    def note(self, key: str, text: str) -> None:
        self.notes.append(f"{key}: {text}")

    def refuse(self, key: str, text: str) -> None:
        self.problems.append(f"{key}: {text}")


Change = Callable[[Translation, dict[str, Any], Collection[str]], None]


def is_lavis(tree: dict[str, Any]) -> bool:
    """Whether a file was written for LAVIS."""
    run = tree.get("run")
    return isinstance(run, dict) and any(key in run for key in LAUNCH_KEYS)


def weights(model_class: Any, model_type: str) -> dict[str, str]:
    """What LAVIS's model configuration names as `finetuned` and `pretrained`; its recipes leave it out."""
    start, published = (getattr(model_class, name, {}).get(model_type) for name in ("starts", "published"))
    if start is None:
        return {}
    tuned = {} if published in (None, start) else {"finetuned": published}
    return {**tuned, "pretrained": start}


def translate(tree: dict[str, Any], run_keys: Collection[str], model_keys: Collection[str]) -> Translation:
    """The sections with LAVIS's keys replaced by ours.

    Args:
        tree: `model`, `datasets`, `run` as a file or the command line gives them; left as it is.
        run_keys: keys that the task's run section has; such a key is never translated.
        model_keys: the same for the model.

    Returns:
        What remains to be typed, with one note per key that was ignored or changed.
    """
    result = Translation(dict(tree), is_lavis(tree))
    for key, reason in IGNORED_ROOTS.items():
        if key in result.tree:
            del result.tree[key]
            result.note(key, f"ignored: {reason}")
    changes: dict[str, tuple[Change, Collection[str]]]
    changes = {"model": (_model, model_keys), "datasets": (_datasets, ()), "run": (_run, run_keys)}
    for name, (change, keys) in changes.items():
        if isinstance(result.tree.get(name), dict):
            result.tree[name] = dict(result.tree[name])
            change(result, result.tree[name], keys)
    return result


def _model(result: Translation, model: dict[str, Any], keys: Collection[str]) -> None:
    _ignore(result, model, "model", IGNORED_MODEL, keys)
    for key in (k for k in LANGUAGE_MODELS if k in model and k not in keys):
        name = model.pop(key)
        if model.setdefault("llm_model", name) != name:
            result.note(f"model.{key}", f"ignored: model.llm_model={model['llm_model']} is given too")
    arch, model_type = model.get("arch"), model.get("model_type")
    if isinstance(arch, str) and isinstance(model_type, str) and (arch, model_type) in MODEL_TYPES:
        model["model_type"] = MODEL_TYPES[arch, model_type]
        result.note("model.model_type", f"{model_type} is called {model['model_type']} in LAVIS's model zoo")


def refused_dataset(name: str) -> str:
    """Why one of LAVIS's datasets is not in the catalogue; empty where it is none of them."""
    for start, reason in REFUSED_DATASETS.items():
        if name == start or name.startswith(f"{start}_"):
            own = f"to read files of your own under this name, give datasets.{name}.path"
            return f"LAVIS's {name} {reason}; {own}"
    return ""


def _datasets(result: Translation, datasets: dict[str, Any], _: Collection[str]) -> None:
    for name, given in datasets.items():
        if not isinstance(given, dict):
            continue
        entry = datasets[name] = dict(given)
        where = f"datasets.{name}"
        _type(result, entry, name)
        _ignore(result, entry, where, IGNORED_DATASET, ())
        kinds = entry.get("data_type")
        if isinstance(kinds, list) and "images" in kinds:
            entry["data_type"] = "images"
            result.note(f"{where}.data_type", f"only the pictures of {kinds} are used")
        elif isinstance(kinds, list) and "videos" in kinds:
            entry["data_type"] = "videos"
            result.note(f"{where}.data_type", f"only the videos of {kinds} are used")
        _processors(result, entry, where)
        if _has_url(entry.get("build_info")):
            result.note(f"{where}.build_info", DOWNLOAD)


def _type(result: Translation, entry: dict[str, Any], name: str) -> None:
    """LAVIS's variant of a dataset, which says what files its splits have."""
    kind = entry.pop("type", None)
    base = name.removesuffix("_instruct")
    if (base, kind) in VARIANTS:
        own = entry.get("build_info")  # may name files itself, or pictures only
        own = own if isinstance(own, dict) else {}
        if "annotations" not in own:
            entry.setdefault("path", VARIANTS[base, kind])
        if "images" not in own:
            entry.setdefault("images", f"{base}/images")
        result.note(f"datasets.{name}.type", f"{kind} became the files that this variant has in LAVIS")
    elif kind in (None, "default") or (name, kind) in SAME_FILES:
        if kind is not None:
            text = f"{kind} ignored: the splits of run read the same files without it"
            result.note(f"datasets.{name}.type", text)
    else:
        text = f"{name} has no variant {kind!r} here; name its files by datasets.{name}.path"
        result.refuse(f"datasets.{name}.type", text)


def _processors(result: Translation, entry: dict[str, Any], where: str) -> None:
    for kind in ("vis_processor", "text_processor"):
        stages = entry.get(kind)
        for stage, options in stages.items() if isinstance(stages, dict) else ():
            name = options.get("name") if isinstance(options, dict) else None
            if isinstance(name, str) and name in REFUSED_PROCESSORS and name not in PROCESSORS:
                result.refuse(f"{where}.{kind}.{stage}.name", f"{name} {REFUSED_PROCESSORS[name]}")
            unused = set(options) & set(UNUSED_OPTIONS.get(str(name), ())) if name is not None else set()
            if unused:
                _drop(result, entry, (kind, stage), unused, f"{where}.{kind}.{stage}")
    stages, run = entry.get("text_processor"), result.tree.get("run")
    written = stages.get("eval") if isinstance(stages, dict) else None
    task = run.get("task") if isinstance(run, dict) else None
    if result.from_lavis and task == "captioning" and isinstance(written, dict) and "prompt" in written:
        text = "without effect, as in LAVIS: model.prompt is what captions begin with"
        result.note(f"{where}.text_processor.eval.prompt", text)


def _drop(
    result: Translation, entry: dict[str, Any], path: tuple[str, str], unused: set[str], where: str
) -> None:
    """Leave options of a processor out, with the reason."""
    kind, stage = path
    options = entry[kind][stage]
    kept = {key: value for key, value in options.items() if key not in unused}
    entry[kind] = {**entry[kind], stage: kept}
    for key in sorted(unused):
        result.note(f"{where}.{key}", f"ignored: {UNUSED_OPTIONS[options['name']][key]}")


def _run(result: Translation, run: dict[str, Any], keys: Collection[str]) -> None:
    from_lavis = result.from_lavis
    _ignore(result, run, "run", IGNORED_RUN, keys)
    for key in [k for k in run if k in TASK_KEYS and k not in keys]:
        del run[key]
        result.note(f"run.{key}", f"ignored: it is read by {TASK_KEYS[key]} only")
    task = run.get("task")
    if isinstance(task, str) and task in REFUSED_TASKS and task not in TASKS:
        result.refuse("run.task", f"{task}: {REFUSED_TASKS[task]}")
    _rename(result, run, "resume_ckpt_path", "resume")
    if "amp" in run:
        amp = run.pop("amp")
        if run.setdefault("precision", "auto" if amp else "fp32") not in ("auto", "fp32"):
            result.note("run.amp", f"ignored: run.precision={run['precision']} is given too")
        elif not isinstance(amp, bool):
            result.refuse("run.amp", f"{amp!r} is not true or false")
    elif from_lavis and "precision" not in run and _is_blip(result.tree.get("model")):
        run["precision"] = "fp32"
        result.note("run.amp", "not given, so that LAVIS computes in fp32; run.precision=auto is faster")
    _ratios(result, run)
    ids = run.get("img_ids")
    if isinstance(ids, list) and ids and all(isinstance(item, str) and not item.isdecimal() for item in ids):
        del run["img_ids"]
        result.note("run.img_ids", "names of clips ignored: all clips of the split are captioned and scored")
    _frequencies(result, run, from_lavis)
    if from_lavis and run.get("device") == "cuda":
        run["device"] = "auto"
        result.note("run.device", "cuda is read as auto, since every file of LAVIS has it")
    if from_lavis and run.get("warmup_lr") == -1:
        run["warmup_lr"] = run.get("init_lr", 0.0)
    if from_lavis and "lr_sched" in run and not run.get("evaluate"):
        result.note("run.lr_sched", LAVIS_SCHEDULE)
    if from_lavis and run.get("accum_grad_iters", 1) != 1:
        result.note("run.accum_grad_iters", "steps are counted after accumulation here, before it in LAVIS")
    if from_lavis and task in QUESTION_TASKS:
        _answers(result, run)
    if from_lavis and run.get("inference_method") == "rank" and "inference_method" in keys:
        for key in [key for key in GENERATING if key in run]:
            result.note(
                f"run.{key}", "without effect, as in LAVIS: run.inference_method=rank writes no answers"
            )
    if from_lavis and run.get("output_dir") is not None:
        result.note("run.output_dir", "the run lies right there; LAVIS makes a folder by date below it")


def _answers(result: Translation, run: dict[str, Any]) -> None:
    """What LAVIS's question answering does not hand on to the model."""
    model = result.tree.get("model")
    if run.pop("length_penalty", None) is not None:
        result.note("run.length_penalty", "without effect, as in LAVIS: answers take the model's own")
    if isinstance(model, dict) and "{}" in str(model.get("prompt")) and not run.get("prompt"):
        del model["prompt"]
        text = "without effect, as in LAVIS: run.prompt is what questions stand in; set that to apply it"
        result.note("model.prompt", text)


def _is_blip(model: Any) -> bool:
    """Whether it is a model of BLIP, none of which computes in half precision without `amp` in LAVIS."""
    return isinstance(model, dict) and str(model.get("arch")).startswith("blip_")


def _ratios(result: Translation, run: dict[str, Any]) -> None:
    ratios = run.pop("train_dataset_ratios", None)
    if ratios is None:
        return
    datasets = result.tree.get("datasets")
    if not isinstance(ratios, dict) or not isinstance(datasets, dict):
        result.refuse("run.train_dataset_ratios", "write datasets.NAME.sample_ratio instead")
        return
    for name, ratio in ratios.items():
        if name not in datasets:
            result.refuse(f"run.train_dataset_ratios.{name}", "there is no such dataset in this file")
            continue
        if isinstance(datasets[name], dict):
            datasets[name] = {"sample_ratio": ratio, **datasets[name]}
    result.note("run.train_dataset_ratios", "became datasets.*.sample_ratio")


def _frequencies(result: Translation, run: dict[str, Any], from_lavis: bool) -> None:
    """Inner epochs become step counts; LAVIS's `save_freq` counts epochs, ours optimizer steps."""
    save = run.get("save_freq")
    if isinstance(save, int) and (save < 0 or from_lavis):
        run["save_freq"] = None
        text = f"{save} (epochs) ignored: checkpoints are made at evaluations and at the end"
        result.note("run.save_freq", text)
    inner = run.pop("iters_per_inner_epoch", None)
    if inner is None:
        return
    for key in ("eval_freq", "save_freq"):
        if run.get(key) is None:
            run[key] = inner
    result.note("run.iters_per_inner_epoch", f"{inner} became run.eval_freq and run.save_freq")


def _rename(result: Translation, section: dict[str, Any], old: str, new: str) -> None:
    if old not in section:
        return
    value = section.pop(old)
    if section.setdefault(new, value) != value:
        result.note(f"run.{old}", f"ignored: run.{new}={section[new]} is given too")


def _ignore(
    result: Translation, section: dict[str, Any], where: str, table: dict[str, str], keys: Collection[str]
) -> None:
    for key in [k for k in section if k in table and k not in keys]:
        value = section.pop(key)
        shown = f"{value} " if isinstance(value, (str, int, float)) else ""
        result.note(f"{where}.{key}", f"{shown}ignored: {table[key]}")


def _has_url(tree: Any) -> bool:
    return isinstance(tree, dict) and any(key == "url" or _has_url(value) for key, value in tree.items())
