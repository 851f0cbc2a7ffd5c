from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from blip.config.lavis import translate
from blip.config.load import load_config
from blip.config.schema import RunConfig
from blip.errors import ConfigError
from blip.registry import MODELS, PROCESSORS, TASKS
from tests.unit.config.conftest import StubModelConfig

Write = Callable[[str], str]
STAGE1 = Path(__file__).parent / "fixtures" / "lavis" / "pretrain_stage1.yaml"
LAUNCH = "device: cuda\n  world_size: 1\n  dist_url: 'env://'\n  distributed: True\n"

CAPTIONING_EVAL = f"""
model: {{arch: blip2_t5_instruct, load_pretrained: True}}
datasets:
  nocaps:
    data_type: images
    vis_processor: {{eval: {{name: blip_image_eval, image_size: 224}}}}
    text_processor: {{eval: {{name: blip_caption}}}}
    build_info:
      annotations:
        val: {{url: 'https://example.org/val.json', md5: abc, storage: nocaps/annotations/nocaps_val.json}}
      images: {{storage: /data/nocaps/}}
run:
  task: captioning
  lr_sched: linear_warmup_cosine_lr
  init_lr: 1e-5
  min_lr: 0
  warmup_lr: 1e-8
  warmup_steps: 1000
  weight_decay: 0.05
  max_epoch: 1
  batch_size_train: 16
  batch_size_eval: 1
  num_workers: 8
  accum_grad_iters: 1
  max_len: 80
  min_len: 10
  num_beams: 5
  inference_method: generate
  length_penalty: 1.
  annotation_file: https://example.org/captions.json
  img_ids: [2, 4, 5]
  seed: 42
  output_dir: output/nocaps/
  amp: True
  resume_ckpt_path: null
  evaluate: True
  valid_splits: [val]
  save_freq: -1
  val_freq: 1
  {LAUNCH}"""

RETRIEVAL = f"""
model: {{arch: blip2, model_type: coco, load_pretrained: True, load_finetuned: False, freeze_vit: False}}
datasets:
  coco_retrieval:
    vis_processor:
      train: {{name: blip2_image_train, image_size: 364}}
      eval: {{name: blip_image_eval, image_size: 364}}
    text_processor: {{train: {{name: blip_caption}}, eval: {{name: blip_caption}}}}
    build_info: {{images: {{storage: /data/coco/images/}}}}
run:
  task: retrieval
  lr_sched: linear_warmup_cosine_lr
  init_lr: 1e-5
  min_lr: 0
  max_epoch: 5
  batch_size_train: 14
  batch_size_eval: 16
  lr_layer_decay: 0.95
  train_splits: [train]
  valid_splits: [test]
  k_test: 128
  use_dist_eval_sampler: False
  {LAUNCH}"""

ITERATIONS = f"""
model: {{arch: blip_caption, model_type: large}}
datasets:
  laion2B_multi:
    batch_size: 75
    vis_processor: {{train: {{name: blip_image_train, image_size: 224}}}}
    text_processor: {{train: {{name: blip_caption, prompt: 'a picture of '}}}}
    build_info: {{storage: '/data/part-00000/{{00000..00001}}.tar'}}
run:
  runner: runner_iter
  use_datapipe: True
  max_iters: 1e6
  iters_per_inner_epoch: 1e4
  task: image_text_pretrain
  lr_sched: linear_warmup_step_lr
  init_lr: 3e-4
  min_lr: 1e-6
  warmup_lr: 1e-6
  lr_decay_rate: 0.9
  warmup_steps: 1e4
  batch_size_train: 75
  batch_size_eval: 75
  evaluate: False
  train_splits: [train]
  train_dataset_ratios: {{laion2B_multi: 3}}
  {LAUNCH}"""


@pytest.fixture(autouse=True)
def models_of_lavis(registries: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODELS.get("blip2"), "presets", {"pretrain": {}, "coco": {}, "large_coco": {}})


def test_stage_1_of_lavis_is_accepted_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(STAGE1.parent)
    config = load_config("pretrain_stage1.yaml")
    assert (config.model.arch, config.model.model_type, config.model.load_pretrained) == (
        "blip2",
        "pretrain",
        False,
    )
    assert asdict(config.model)["freeze_vit"] is True
    assert {name: data.vis_processor["train"] for name, data in config.datasets.items()} == {
        "coco_caption": {"name": "blip2_image_train", "image_size": 224},
        "vg_caption": {"name": "blip_image_train", "image_size": 224},
    }
    assert config.datasets["coco_caption"].build_info == {"images": {"storage": "/data/coco/images/"}}
    run = config.run
    assert (run.task, run.lr_sched, run.seed) == ("image_text_pretrain", "linear_warmup_cosine_lr", 42)
    assert (run.init_lr, run.min_lr, run.warmup_lr, run.weight_decay) == (1e-4, 1e-5, 1e-6, 0.05)
    assert (run.max_epoch, run.max_iters, run.warmup_steps) == (10, None, 5000)
    assert (run.batch_size_train, run.batch_size_eval, run.num_workers) == (100, 64, 4)
    assert (run.precision, run.resume, run.evaluate, run.train_splits) == ("auto", None, False, ["train"])
    assert (run.device, run.output_dir) == ("auto", "output/BLIP2/Pretrain_stage1")
    assert [note.split(" ")[:2] for note in config.notes] == [
        ["pretrain_stage1.yaml:", "run.world_size:"],
        ["pretrain_stage1.yaml:", "run.dist_url:"],
        ["pretrain_stage1.yaml:", "run.distributed:"],
        ["pretrain_stage1.yaml:", "run.device:"],
        ["pretrain_stage1.yaml:", "run.lr_sched:"],
        ["pretrain_stage1.yaml:", "run.output_dir:"],
    ]


def test_captioning_evaluation_of_lavis_loses_no_key_silently(write: Write) -> None:
    config = load_config(write(CAPTIONING_EVAL))
    noted = {note.split(": ")[1] for note in config.notes}
    ignored = {
        "max_len",
        "min_len",
        "num_beams",
        "inference_method",
        "length_penalty",
        "annotation_file",
        "img_ids",
    }
    assert noted == {f"run.{key}" for key in ignored} | {
        "datasets.nocaps.build_info",
        "run.device",
        "run.dist_url",
        "run.distributed",
        "run.output_dir",
        "run.save_freq",
        "run.world_size",
    }
    assert (config.run.save_freq, config.run.val_freq, config.run.evaluate) == (None, 1, True)


def test_a_key_of_the_chosen_task_is_no_lavis_key(write: Write) -> None:
    config = load_config(write(RETRIEVAL))
    assert asdict(config.run)["k_test"] == 128
    assert not any("k_test" in note for note in config.notes)
    assert any("run.use_dist_eval_sampler: False ignored" in note for note in config.notes)


def test_inner_epochs_become_steps_and_ratios_go_to_their_dataset(write: Write) -> None:
    config = load_config(write(ITERATIONS))
    assert (config.run.max_iters, config.run.eval_freq, config.run.save_freq) == (1_000_000, 10_000, 10_000)
    assert config.datasets["laion2B_multi"].sample_ratio == 3
    assert config.model.model_type == "large_coco"
    noted = {note.split(": ")[1] for note in config.notes}
    assert noted >= {
        "run.runner",
        "run.use_datapipe",
        "run.iters_per_inner_epoch",
        "run.train_dataset_ratios",
    }
    assert noted >= {"datasets.laion2B_multi.batch_size", "model.model_type", "run.lr_sched"}


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ({"amp": True}, {"precision": "auto"}),
        ({"amp": False}, {"precision": "fp32"}),
        ({"amp": True, "precision": "fp16"}, {"precision": "fp16"}),
        ({"resume_ckpt_path": "a.pth"}, {"resume": "a.pth"}),
        ({"resume_ckpt_path": None, "resume": "auto"}, {"resume": "auto"}),
        ({"save_freq": -1}, {"save_freq": None}),
        ({"save_freq": 5}, {"save_freq": 5}),  # our own files count steps
        ({"save_freq": 5, "distributed": True}, {"save_freq": None}),
        ({"warmup_lr": -1, "init_lr": 1e-4, "world_size": 1}, {"warmup_lr": 1e-4, "init_lr": 1e-4}),
        ({"device": "cuda"}, {"device": "cuda"}),
        ({"device": "cuda", "dist_url": "env://"}, {"device": "auto"}),
        ({"amp": True, "dist_url": "env://"}, {"precision": "auto"}),
        ({"precision": "bf16", "dist_url": "env://"}, {"precision": "bf16"}),
        ({"iters_per_inner_epoch": 9, "eval_freq": 3}, {"eval_freq": 3, "save_freq": 9}),
    ],
)
def test_run_keys_are_translated(run: dict[str, object], expected: dict[str, object]) -> None:
    given = {"run": run}
    assert translate(given, [], []).tree == {"run": expected}
    assert given == {"run": run}


def test_every_translation_that_changes_something_is_noted(write: Write) -> None:
    for key in ("runner", "use_dist_eval_sampler", "save_last", "task_config", "k_test", "segments"):
        translation = translate({"run": {key: 1}}, [], [])
        assert translation.tree == {"run": {}}
        assert [note.split(":")[0] for note in translation.notes] == [f"run.{key}"]
    assert translate({"env": {"cache_root": "/x"}, "preprocess": {}}, [], []).tree == {}


def test_a_file_for_lavis_starts_from_what_its_model_configurations_name(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls = MODELS.get("blip2")
    monkeypatch.setattr(cls, "published", {"coco": "https://x/tuned.pth"}, raising=False)
    monkeypatch.setattr(cls, "starts", {"coco": "https://x/pretrained.pth"}, raising=False)
    model = load_config(write(RETRIEVAL)).model
    assert (model.finetuned, model.pretrained) == ("https://x/tuned.pth", "https://x/pretrained.pth")
    assert not model.load_finetuned  # so that it starts from the pretrained one
    other = load_config("recipe.yaml", ["model.pretrained=mine.pth"])
    assert other.model.pretrained == "mine.pth"
    assert other.origins["model.finetuned"] == "LAVIS's blip2/coco"
    assert load_config("recipe.yaml", ["model.model_type=pretrain"]).model.finetuned is None
    own = RETRIEVAL.replace(LAUNCH, "")
    assert load_config(write(own)).model.finetuned is None  # a file of ours says itself where it starts


def test_without_amp_a_model_of_blip_computes_as_in_lavis(write: Write) -> None:
    amp = "  amp: True\n"
    without = CAPTIONING_EVAL.replace(amp, "")
    assert amp in CAPTIONING_EVAL
    assert load_config(write(without)).run.precision == "auto"  # BLIP-2 has autocast of its own
    text = without.replace("arch: blip2_t5_instruct", "arch: blip_caption")
    config = load_config(write(text))
    assert config.run.precision == "fp32"
    assert any("run.amp: not given" in note for note in config.notes)
    assert load_config("recipe.yaml", ["run.precision=bf16"]).run.precision == "bf16"
    assert load_config(write(text.replace(LAUNCH, ""))).run.precision == "auto"


def test_a_variant_of_a_dataset_is_known_or_refused(write: Write) -> None:
    text = CAPTIONING_EVAL.replace("data_type: images", "type: VARIANT").replace("nocaps:", "coco_vqa:")
    for kind in ("default", "eval"):
        config = load_config(write(text.replace("VARIANT", kind)))
        assert any(f"coco_vqa.type: {kind} ignored" in note for note in config.notes)
    with pytest.raises(ConfigError, match=r"coco_vqa.type.*no variant 'balanced'.*coco_vqa.path"):
        load_config(write(text.replace("VARIANT", "balanced")))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("name: blip_image_eval|name: gpt_video_ft", "gpt_video_ft serves video dialogue"),
        ("task: captioning|task: dialogue", "run.task.*video dialogue is no part of the BLIP family"),
        ("amp: True|amp: O1", "run.amp.*'O1' is not true or false"),
        (
            "seed: 42|train_dataset_ratios: {coco: 1}",
            "run.train_dataset_ratios.coco.*no such dataset in this file",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_reason(write: Write, change: str, problem: str) -> None:
    old, new = change.split("|")
    assert old in CAPTIONING_EVAL
    with pytest.raises(ConfigError, match=problem) as caught:
        load_config(write(CAPTIONING_EVAL.replace(old, new)))
    assert "problems:" not in str(caught.value)


def test_a_3d_configuration_uses_its_pictures_only(write: Write) -> None:
    text = CAPTIONING_EVAL.replace(
        "data_type: images", "data_type: [pc, images]\n    pc_processor: {eval: {name: ulip_pc}}"
    )
    config = load_config(write(text.replace("load_pretrained: True", "predict_with_gen: True")))
    assert config.datasets["nocaps"].data_type == "images"
    noted = {note.split(": ")[1] for note in config.notes}
    assert noted >= {"datasets.nocaps.data_type", "datasets.nocaps.pc_processor", "model.predict_with_gen"}


QUESTIONS = f"""
model: {{arch: blip2_t5_instruct, load_pretrained: True, prompt: 'Question: {{}} Short Answer:'}}
datasets:
  msvd_qa_instruct:
    vis_processor:
      train: {{name: alpro_video_train, n_frms: 4, min_scale: 0.9, full_video: True}}
      eval: {{name: alpro_video_eval, n_frms: 4, image_size: 224, min_scale: 0.9, max_scale: 1.0}}
    text_processor:
      train: {{name: blip_instruction, modality: video, task: qa}}
      eval: {{name: blip_caption}}
    build_info:
      annotations: {{test: {{url: 'https://example.org/qa.json', storage: msvd/annotations/qa_test.json}}}}
      videos: {{storage: /export/msvd/videos}}
      instance_id_key: question_id
run:
  task: gqa
  max_epoch: 1
  max_len: 30
  min_len: 1
  num_beams: 5
  inference_method: generate
  length_penalty: -1.
  evaluate: True
  valid_splits: [test]
  ques_files: {{test: /x.json}}
  anno_files: {{test: /y.json}}
  {LAUNCH}"""


@dataclass
class Asking(RunConfig):
    inference_method: str = "rank"
    num_beams: int = 3
    max_len: int = 10
    min_len: int = 1
    length_penalty: float | None = None
    prompt: str = ""


@dataclass
class Clips:
    image_size: int = 224
    n_frms: int = 8


@dataclass
class ClipsToTrain(Clips):
    min_scale: float = 0.5
    max_scale: float = 1.0


@dataclass
class Instruction:
    modality: str = "image"
    task: str = "caption"


@dataclass
class Prompted(StubModelConfig):
    prompt: str = ""


@pytest.fixture
def asking(monkeypatch: pytest.MonkeyPatch) -> None:
    task = type("Asked", (), {"run_config_class": Asking})
    model = type("Model", (), {"config_class": Prompted, "presets": {"flant5xl": {}}})
    monkeypatch.setitem(TASKS._classes, "gqa", task)
    monkeypatch.setitem(MODELS._classes, "blip2_t5_instruct", model)
    more = {"alpro_video_train": ClipsToTrain, "alpro_video_eval": Clips, "blip_instruction": Instruction}
    for name, cls in more.items():
        monkeypatch.setitem(PROCESSORS._classes, name, cls)


def test_questions_about_videos_are_asked_as_lavis_does(asking: None, write: Write) -> None:
    config = load_config(write(QUESTIONS))
    data = config.datasets["msvd_qa_instruct"]
    assert data.vis_processor == {
        "train": {"name": "alpro_video_train", "n_frms": 4, "min_scale": 0.9},
        "eval": {"name": "alpro_video_eval", "n_frms": 4, "image_size": 224},
    }
    run: Any = config.run
    assert (run.prompt, run.length_penalty, run.max_len) == ("", None, 30)
    assert asdict(config.model)["prompt"] == ""  # LAVIS's task reads that of the run only
    noted = {note.split(": ")[1] for note in config.notes}
    assert noted >= {
        "model.prompt",
        "run.length_penalty",
        "run.ques_files",
        "run.anno_files",
        "datasets.msvd_qa_instruct.vis_processor.train.full_video",
        "datasets.msvd_qa_instruct.vis_processor.eval.min_scale",
        "datasets.msvd_qa_instruct.vis_processor.eval.max_scale",
    }
    told = QUESTIONS.replace("  max_len: 30", "  max_len: 30\n  prompt: 'Question: {} Short Answer:'")
    run, model = load_config(write(told)).run, load_config("recipe.yaml").model
    assert (run.prompt, asdict(model)["prompt"]) == ("Question: {} Short Answer:",) * 2
    own = load_config(write(QUESTIONS.replace(LAUNCH, "")))
    assert (asdict(own.run)["length_penalty"], asdict(own.model)["prompt"]) == (
        -1.0,
        "Question: {} Short Answer:",
    )


def test_a_variant_of_gqa_names_its_files(asking: None, write: Write) -> None:
    text = CAPTIONING_EVAL.replace("data_type: images", "type: balanced_testdev").replace("nocaps:", "gqa:")
    start, end = text.index("    build_info:"), text.index("run:\n")
    config = load_config(write(text[:start] + text[end:]))
    assert config.datasets["gqa"].path == {
        "train": "gqa/annotations/train_balanced_questions.json",
        "val": "gqa/annotations/testdev_balanced_questions.json",
        "test": "gqa/annotations/test_balanced_questions.json",
    }
    assert config.datasets["gqa"].images == "gqa/images"
    assert any("gqa.type: balanced_testdev became the files" in note for note in config.notes)
    own = f"{text[:start]}    build_info: {{images: {{storage: /data/GQA/images/}}}}\n{text[end:]}"
    data = load_config(write(own)).datasets["gqa"]  # LAVIS's file names the folder of its pictures
    assert (data.path, data.images) == (config.datasets["gqa"].path, None)


def test_names_of_clips_do_not_part_a_split() -> None:
    found = translate({"run": {"img_ids": ["a_1_20.avi", "b_2.avi"]}}, ["img_ids"], [])
    assert found.tree == {"run": {}}
    assert found.notes == [
        "run.img_ids: names of clips ignored: all clips of the split are captioned and scored"
    ]
    assert translate({"run": {"img_ids": [3, 4]}}, ["img_ids"], []).tree == {"run": {"img_ids": [3, 4]}}
