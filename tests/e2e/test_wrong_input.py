"""Whatever is wrong with what a user gives, the command ends with code 2 and one paragraph.

It names the key, file or record, the nearest valid choice where there is one, and what to do. A run that
fails before its first step leaves no folder behind. For data see test_wrong_data.py.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from blip.evaluate import main as evaluate
from blip.train import main
from tests.e2e.conftest import Recipe
from tests.e2e.runs import ROOT, Commands, write_recipe
from tests.e2e.wrong import SHORT, cut, paragraph, removed

# What stands in a configuration

CONFIG: dict[str, tuple[list[str], list[str]]] = {
    "misspelt key": (
        ["run.batch_size_trian=3"],
        ["run.batch_size_trian (command line): no such key; did you mean run.batch_size_train?"],
    ),
    "key in the wrong section": (
        ["model.batch_size_train=3"],
        ["model.batch_size_train (command line): no such key; did you mean run.batch_size_train?"],
    ),
    "misspelt key of a part": (
        ["model.qformer.wdith=64"],
        ["model.qformer.wdith (command line): no such key; did you mean model.qformer.width?"],
    ),
    "unknown section": (["runs.seed=1"], ["runs (command line): no such key; did you mean run?"]),
    "no value": (["run.seed"], ["'run.seed' is no override; write key=value, as in run.max_iters=100"]),
    "a section that is a value": (["run=3"], ["run (command line): 3 is not a section of keys and values"]),
    "text for a number": (
        ["run.max_iters=lots"],
        ["run.max_iters (command line): 'lots' is not a whole number"],
    ),
    "fraction for a whole number": (
        ["run.log_freq=1.5"],
        ["run.log_freq (command line): 1.5 is not a whole"],
    ),
    "number for a switch": (["run.drop_last=2"], ["run.drop_last (command line): 2 is not true or false"]),
    "section for a number": (["run.seed={a: 1}"], ["run.seed", "(command line)"]),
    "out of range": (["run.batch_size_train=0"], ["run.batch_size_train (command line): 0 is below 1"]),
    "no length": (["run.max_iters=null"], ["neither max_epoch nor max_iters is given; set one of them"]),
    "unknown arch": (
        ["model.arch=blip3"],
        ["model.arch (command line): unknown model 'blip3'; did you mean"],
    ),
    "unknown model type": (
        ["model.model_type=pretrian"],
        ["model.model_type (command line): blip2 has no type 'pretrian'; did you mean 'pretrain'?"],
    ),
    "unknown task": (
        ["run.task=image_text_pretrian"],
        ["run.task (command line): unknown task 'image_text_pretrian'; did you mean 'image_text_pretrain'?"],
    ),
    "unknown dataset": (
        ["datasets.scnes.sample_ratio=1"],
        ["datasets.scnes (command line): has no path and is not in the catalogue; did you mean 'scenes'?"],
    ),
    "unknown processor": (
        ["datasets.scenes.vis_processor.train.name=blip_image_trian"],
        ["datasets.scenes.vis_processor.train.name", "'blip_image_trian'; did you mean 'blip_image_train'?"],
    ),
    "unknown option of a processor": (
        ["datasets.scenes.vis_processor.train.image_sise=32"],
        ["image_sise (command line): no such key; did you mean", "vis_processor.train.image_size?"],
    ),
    "unknown optimizer": (
        ["run.optimizer=adam"],
        ["run.optimizer (command line): 'adam' is not one of adamw; did you mean 'adamw'?"],
    ),
    "unknown schedule": (
        ["run.lr_sched=linear_warmup_cosine"],
        ["run.lr_sched (command line): 'linear_warmup_cosine' is not one of", "'linear_warmup_cosine_lr'?"],
    ),
    "unknown precision": (
        ["run.precision=bf61"],
        ["run.precision (command line): 'bf61' is not one of auto, bf16, fp16, fp32; did you mean 'bf16'?"],
    ),
    "unknown tower": (
        ["model.vit_model=vit_lagre"],
        ["unknown vision tower 'vit_lagre'; did you mean 'vit_large'?"],
    ),
    "unknown objective": (["model.vit_train_objectives=[itk]"], ["unknown objective 'itk'; did you mean"]),
    "unknown split": (
        ["run.train_splits=[tran]"],
        ["run.train_splits: no dataset has a split 'tran'; there are test, train, val; name its files"],
    ),
    "unknown metric": (
        ["run.valid_splits=[val]", "run.monitor=r_maen"],
        ["run.monitor: the evaluation gives no 'r_maen'; did you mean 'r_mean'?"],
    ),
    "picture no multiple of the patch": (
        ["model.image_size=30"],
        ["model.image_size (command line): 30 is not a multiple of the patch size 8", "use 24 or 32"],
    ),
    "width no multiple of the heads": (
        ["model.vit.heads=3"],
        ["model.vit.heads (command line): 3 does not divide the width 32", "set heads or width"],
    ),
    "width of the Q-Former no multiple of the heads": (
        ["model.qformer.num_heads=5"],
        ["model.qformer.num_heads (command line): 5 does not divide the width 32; set num_heads or width"],
    ),
    "texts longer than the positions": (
        ["model.max_txt_len=100"],
        ["model.max_txt_len (command line): 100 exceeds qformer.max_positions, which is 48"],
    ),
    "pictures of another size than the tower's": (
        ["model.image_size=16"],
        ["datasets.scenes.vis_processor.train.image_size: 32, where model.image_size is 16; set both"],
    ),
    "too small a vocabulary": (
        ["model.vocab_size=5"],
        ["model.vocab_size: 5 rows of word embeddings are too few", "tokenizer 'scenes'; set it to"],
    ),
    "no such vocabulary": (["model.tokenizer=words.txt"], ["model.tokenizer: no vocabulary 'words.txt'"]),
    "too few candidates": (
        ["run.k_test=5"],
        ["run.k_test (command line): 5 is below 10", "use 0 or at least 10"],
    ),
    "GPU that is not there": (
        ["run.device=cuda"],
        ["run.device: 'cuda' was asked for, but torch sees no GPU; use run.device=auto or cpu"],
    ),
    "fp16 on a CPU": (["run.precision=fp16"], ["run.precision: fp16 needs a GPU; use fp32 or bf16 on a CPU"]),
    "batch larger than the dataset": (
        ["run.batch_size_train=1000"],
        ["run.batch_size_train: scenes has 128 samples, fewer than one step takes (1000 rows", "lower"],
    ),
    "step larger than the dataset": (
        ["run.accum_grad_iters=9"],
        ["scenes has 128 samples, fewer than one step takes", "x 9", "accum_grad_iters"],
    ),
    "nothing to evaluate on": (
        ["run.evaluate=true"],
        ["run.test_splits: nothing to evaluate on; name a split"],
    ),
    "evaluation without weights": (
        ["run.evaluate=true", "run.test_splits=[test]"],
        ["model.init_from: nothing says which weights to evaluate; give model.init_from=RUN_FOLDER"],
    ),
    "a value that would be computed": (
        ["run.seed=${oc.env:HOME}"],
        ["run.seed", "a recipe is data; write the value"],
    ),
}


@pytest.mark.parametrize("case", CONFIG)
def test_a_wrong_value_is_named_with_its_key_and_what_is_right(
    commands: Commands, recipe: Recipe, tmp_path: Path, case: str
) -> None:
    argv, told = CONFIG[case]
    env = {"CUDA_VISIBLE_DEVICES": ""}
    ended = commands("--cfg", recipe(run=SHORT), *argv, f"run.output_dir={tmp_path / 'run'}", env=env)
    text = paragraph(ended)
    assert [words for words in told if words not in text] == [], text
    assert not (tmp_path / "run").exists()


def test_all_mistakes_are_reported_at_once(commands: Commands, recipe: Recipe, tmp_path: Path) -> None:
    wrong = recipe(run={**SHORT, "task": "pretrain", "log_freq": "often"}, model={"num_query_tokens": 8})
    ended = commands("--cfg", wrong, "run.batch_size_trian=3", "datasets.scenes.lanes=0", "k=1")
    text = paragraph(ended)
    problems = [line.strip().partition(" ")[0] for line in text.splitlines()[1:]]
    assert sorted(problems) == [
        "datasets.scenes.lanes",
        "k",
        "model.num_query_tokens",
        "run.batch_size_trian",
        "run.log_freq",
        "run.task",
    ]
    assert f"run.log_freq ({wrong}): 'often' is not a whole number" in text


# What stands in a file

FILES: dict[str, tuple[bytes, list[str]]] = {
    "nothing": (b"", ["wrong.yaml: the file is empty; a recipe has the sections model, datasets and run"]),
    "a list": (b"- model\n", ["wrong.yaml: expected the sections model, datasets and run, found a list"]),
    "an open bracket": (b"model: {arch: blip2\nrun: {task: x}\n", ["wrong.yaml, line 2: not valid YAML"]),
    "a tab": (b"model:\n  arch: blip2\n\tmodel_type: x\n", ["wrong.yaml, line 3: not valid YAML"]),
    "a key that stands twice": (
        b"run:\n  seed: 1\n  seed: 2\n",
        ["wrong.yaml, line 3: the key 'seed' stands twice in this section, first on line 2; keep one"],
    ),
    "no text": (b"\xff\xfe\x00\x80", ["wrong.yaml: cannot be read", "give a YAML text file"]),
    "code": (
        b"model: !!python/object/apply:os.system ['touch proof']\n",
        ["wrong.yaml, line 1: not valid YAML", "os.system"],
    ),
    "no sections": (
        b"model: {}\n",
        ["wrong.yaml: 3 problems:", "model.arch (", "run.task (", "missing; choose from", "max_iters"],
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_recipe_is_named_with_the_line(
    commands: Commands, tmp_path: Path, case: str
) -> None:
    content, told = FILES[case]
    (tmp_path / "wrong.yaml").write_bytes(content)
    text = paragraph(commands("--cfg", tmp_path / "wrong.yaml", f"run.output_dir={tmp_path / 'run'}"))
    assert [words for words in told if words not in text] == [], text
    assert not (ROOT / "proof").exists()


def test_a_recipe_that_is_not_there_gets_its_nearest_names(commands: Commands) -> None:
    text = paragraph(commands("--cfg", "pretrain_stag1.yaml"))
    assert "--cfg pretrain_stag1.yaml: no such file or recipe; did you mean" in text
    assert "blip2/pretrain_stage1" in text
    assert "tiny/pretrain_stage1" in text
    text = paragraph(commands("--cfg", "nothing/of/the/kind"))
    assert "choose from " in text
    assert " blip2/pretrain_stage1, " in text


def test_a_name_that_several_recipes_have_lists_them(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / "configs" / folder).mkdir(parents=True)
        (tmp_path / "configs" / folder / "mine.yaml").write_text("model: {arch: blip2}\n")
    ended = outside(tmp_path, "-m", "blip.train", "--cfg", "mine")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert (
        ended.stderr == "error: --cfg mine: several recipes have this name; choose from one/mine, two/mine\n"
    )


def test_the_bare_recipe_without_its_data_says_how_to_go_on(commands: Commands, tmp_path: Path) -> None:
    text = paragraph(commands("--cfg", "pretrain_stage1.yaml", env={"BLIP_DATA": str(tmp_path)}))
    recipe = yaml.safe_load((ROOT / "configs/blip2/pretrain_stage1.yaml").read_text())
    for name in recipe["datasets"]:
        assert f"datasets.{name}.path: " in text
    assert f"'coco/annotations/coco_karpathy_train.json' under '{tmp_path}'" in text
    assert f"'{tmp_path}/laion400M/part0_node00_shard000000.tar'" in text
    assert (
        "'blip data prepare coco_caption vg_caption conceptual_caption_3m conceptual_caption_12m sbu_" in text
    )
    assert "set run.data_root (or BLIP_DATA)" in text
    assert "--cfg tiny/pretrain_stage1.yaml runs now, on what 'blip data make scenes' makes" in text


@pytest.mark.parametrize(
    ("recipe", "tiny"),
    [
        ("blip/caption_coco_ft", "tiny/blip_caption"),
        ("blip/retrieval_flickr_ft", "tiny/blip_retrieval"),
        ("blip/aokvqa_ft", "tiny/blip_vqa"),
        ("blip/nlvr_ft", "tiny/blip_nlvr"),
        ("blip/pretrain_14m", "tiny/blip_pretrain"),
        ("blip/retrieval_msrvtt_eval", "tiny/blip_retrieval"),
    ],
)
def test_a_recipe_without_its_data_names_the_tiny_one_of_its_kind(
    recipe: str, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = f"run.data_root={tmp_path}"
    command, start = (evaluate, "blip train ") if recipe.endswith("_eval") else (main, "")
    assert command(["--cfg", recipe, root, f"run.output_dir={tmp_path / 'run'}"]) == 2
    text = capsys.readouterr().err
    assert text.endswith(f"; {start}--cfg {tiny}.yaml runs now, on what 'blip data make scenes' makes\n")


def test_the_tiny_recipe_without_its_data_names_the_one_command(commands: Commands, tmp_path: Path) -> None:
    text = paragraph(commands("--cfg", "tiny/pretrain_stage1.yaml", env={"BLIP_DATA": str(tmp_path)}))
    assert "'scenes/annotations/train.json'" in text
    assert text.endswith("; run 'blip data make scenes'\n")


def outside(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """A command as a user starts it, in a folder of his."""
    return subprocess.run([sys.executable, *argv], cwd=folder, capture_output=True, text=True)


# Weights, checkpoints and folders; resuming with what does not fit is in test_resume.py


@pytest.fixture(scope="module")
def trained(commands: Commands, data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("trained")
    recipe = write_recipe(place / "json.yaml", data_root, "json", run=SHORT)
    ended = commands("--cfg", recipe, f"run.output_dir={place / 'run'}")
    assert ended.code == 0, ended.output
    return place / "run"


LAST = "checkpoints/step-00000002"
WEIGHTS: dict[str, tuple[Callable[[Path], list[str]], list[str]]] = {
    "half a checkpoint": (
        lambda run: [f"run.resume={cut(run / LAST / 'model.safetensors').parent}"],
        [f"{LAST}' is no complete checkpoint: model.safetensors has ", " bytes; use another one"],
    ),
    "checkpoint without its last file": (
        lambda run: [f"run.resume={removed(run / LAST / 'state.json').parent}"],
        [f"{LAST}' is no complete checkpoint: no state.json; use another one"],
    ),
    "half a weight file": (
        lambda run: [f"model.init_from={cut(run / 'model/model.safetensors')}"],
        ["model.init_from: '", "model.safetensors' is damaged or no safetensors file", "use another"],
    ),
    "no weight file": (
        lambda run: [f"model.init_from={run / 'config.yaml'}"],
        ["model.init_from: '", "config.yaml' is damaged or no weight file: it does not begin", "use another"],
    ),
    "folder without weights": (
        lambda run: [f"model.init_from={run / 'predictions'}"],
        ["model.init_from: no weights ", "predictions'"],
    ),
    "weights that are not there": (
        lambda run: [f"model.init_from={run}2"],
        ["model.init_from: no weights at '", "no such file or folder; give a weight file or a run folder"],
    ),
    "checkpoint that is not there": (
        lambda run: [f"run.resume={run}2"],
        ["run.resume: '", "does not exist; give a folder like checkpoints/step-00000100"],
    ),
    "weights of a wider model": (
        lambda run: [f"model.init_from={run}", "model.qformer.width=64"],
        ["model.init_from: ", "of another shape (itm_head.weight is (2, 32), needed (2, 64)", "another arch"],
    ),
    "weights of a deeper model": (
        lambda run: [f"model.init_from={run}", "model.qformer.depth=1"],
        ["model.init_from: ", "unexpected (qformer.layers.1.", "it is of another arch or other sizes"],
    ),
    "checkpoint of another model": (
        lambda run: [f"run.resume={run}", "model.qformer.width=64", "run.max_iters=4"],
        ["checkpoints/step-00000002' (model.arch blip2)", "of another shape", "another arch or other sizes"],
    ),
    "tower that is not there": (
        lambda run: ["model.vit_init_from=tower.pth"],
        ["model.vit_init_from: no file 'tower.pth'", "data root", "give another weight file, or null"],
    ),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_do_not_fit_are_refused_with_the_reason(
    commands: Commands, recipe: Recipe, trained: Path, tmp_path: Path, case: str
) -> None:
    run = tmp_path / "trained"
    shutil.copytree(trained, run, symlinks=True)
    make, told = WEIGHTS[case]
    argv = [*make(run), f"run.output_dir={tmp_path / 'run'}"]
    text = paragraph(commands("--cfg", recipe(run=SHORT), *argv))
    assert [words for words in told if words not in text] == [], text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["file", "file/run", "/proc/run", "/dev/null"])
def test_a_folder_that_cannot_be_written_to_is_named(
    commands: Commands, recipe: Recipe, tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").write_text("not a folder")
    folder = tmp_path / place
    text = paragraph(commands("--cfg", recipe(run=SHORT), f"run.output_dir={folder}"))
    assert f"run.output_dir: cannot write to '{folder}': " in text
    assert text.endswith("; choose a folder that you may write to\n")
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_default_folder_that_cannot_be_made_is_named(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "output").write_text("not a folder")
    monkeypatch.chdir(tmp_path)
    assert main(["--cfg", str(recipe(run=SHORT))]) == 2
    assert capsys.readouterr().err.startswith("error: run.output_dir: cannot write to 'output")


# The other commands


def test_evaluating_takes_the_same_care(
    commands: Commands, recipe: Recipe, trained: Path, tmp_path: Path
) -> None:
    cfg, folder = recipe(run={**SHORT, "test_splits": ["test"]}), f"run.output_dir={tmp_path / 'run'}"
    for argv, told in (
        ([], "nothing says which weights to evaluate"),
        ([f"model.init_from={trained}", "run.k_tset=16"], "no such key; did you mean run.k_test?"),
        ([f"model.init_from={trained}", "model.qformer.depth=1"], "unexpected (qformer.layers.1."),
        ([f"run.resume={tmp_path}"], "holds no complete checkpoint"),
    ):
        text = paragraph(commands("--cfg", cfg, folder, *argv, module="blip.evaluate"))
        assert told in text, text


@pytest.mark.parametrize(
    "argv", [["--cfg"], [], ["--config", "x"], ["--cfg", "x", "--no-such-switch"]], ids=str
)
def test_a_command_line_that_cannot_be_read_gets_the_usage(commands: Commands, argv: list[str]) -> None:
    ended = commands(*argv)
    assert ended.code == 2
    assert ended.output.startswith("usage: blip train ")
    assert "blip train: error: " in ended.output
    assert "Traceback" not in ended.output


def test_debug_adds_the_traceback(commands: Commands, recipe: Recipe) -> None:
    ended = commands("--cfg", recipe(run=SHORT), "run.seeed=1", "--debug")
    assert ended.code == 2
    assert "Traceback" in ended.output
    assert ended.output.splitlines()[-1].startswith("error: run.seeed (command line): no such key")
