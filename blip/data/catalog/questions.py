"""Rows of questions about pictures and videos."""

from __future__ import annotations

from dataclasses import replace

from blip.data.catalog.captions import (
    COCO_2014,
    GENOME,
    GENOME_LICENCE,
    GENOME_REMOTE,
    VIDEO_LICENCE,
)
from blip.data.catalog.rows import (
    ALL,
    BLIP,
    COCO,
    COCO_LICENCE,
    INSTRUCTED,
    LAVIS,
    RENAMED,
    VQA,
    Archive,
    Official,
    Row,
    Size,
    coco,
    remote,
    sizes,
    video_qa,
    words_read,
)

_VIZWIZ = "https://vizwiz.cs.colorado.edu/VizWiz_final/"
_PAIRS = {
    "train": ("v2_OpenEnded_mscoco_train2014_questions.json", "v2_mscoco_train2014_annotations.json"),
    "val": ("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"),
}
_COCO_ZIPS = remote(COCO, "train2014.zip", "val2014.zip")

QUESTIONS: dict[str, Row] = {
    "coco_vqa": Row(
        kind="vqa",
        splits={
            "train": ("coco/annotations/vqa_train.json", "coco/annotations/vqa_val.json"),
            "val": "coco/annotations/vqa_val_eval.json",
            "test": "coco/annotations/vqa_test.json",
        },
        images="coco/images",
        about="VQAv2: questions about COCO's pictures, ten answers each; training takes train and val",
        pictures="COCO's train2014.zip, val2014.zip and test2015.zip, unpacked into folders of these names",
        annotations="vqa_train.json, vqa_val.json, vqa_val_eval.json, vqa_test.json and answer_list.json as"
        " BLIP and LAVIS distribute them, or VQA's own v2_OpenEnded_mscoco_{train2014,val2014,test2015}"
        "_questions.json and v2_mscoco_train2014_annotations.json (which give a list of answers by the"
        " rule, 9 times or more, not BLIP's own); and VQA's own v2_mscoco_val2014_annotations.json",
        licence=f"questions and answers CC BY 4.0; {COCO_LICENCE}",
        sizes=sizes((658_111, 123_287), (214_354, 40_504), (447_793, 81_434)),
        answer_list="coco/annotations/answer_list.json",
        official={"val": "coco/annotations/v2_mscoco_val2014_annotations.json"},
        takes=(
            *(
                Official(
                    f"coco/annotations/vqa_{split}.json",
                    "vqa",
                    files,
                    {"pictures": f"{split}2014", "dataset": "vqa"},
                )
                for split, files in _PAIRS.items()
            ),
            Official(
                "coco/annotations/vqa_val_eval.json",
                "vqa",
                _PAIRS["val"][:1],
                {"pictures": "val2014", "dataset": "vqa"},
            ),
            Official(
                "coco/annotations/vqa_test.json",
                "vqa",
                ("v2_OpenEnded_mscoco_test2015_questions.json",),
                {"pictures": "test2015", "dataset": "vqa"},
            ),
            Official(
                "coco/annotations/answer_list.json",
                "frequent_answers",
                (_PAIRS["train"][1], _PAIRS["val"][1]),
            ),
        ),
        archives=(
            *COCO_2014,
            coco("test2015"),
            *(
                Archive(f"v2_{what}_{split}_mscoco.zip", "downloads/coco", "v2_")
                for what in ("Questions", "Annotations")
                for split in ("Train", "Val", "Test")
                if (what, split) != ("Annotations", "Test")
            ),
        ),
        remote={
            **remote(BLIP, "vqa_train.json", "vqa_val.json", "vqa_test.json", "answer_list.json"),
            **remote(f"{LAVIS}vqav2/", "vqa_val_eval.json"),
            **remote(VQA, "v2_Annotations_Val_mscoco.zip"),
            **_COCO_ZIPS,
            **remote(COCO, "test2015.zip"),
        },
    ),
    "vg_vqa": Row(
        kind="vqa",
        splits={"train": "vg/annotations/vg_qa.json"},
        images="vg/images",
        about="Visual Genome: questions with one answer each, to train on",
        pictures="Visual Genome's images.zip and images2.zip, unpacked into VG_100K and VG_100K_2",
        annotations="vg_qa.json as BLIP and LAVIS distribute it; or Visual Genome's own"
        " question_answers.json and image_data.json, which have all 1.4 million questions",
        licence=GENOME_LICENCE,
        takes=(
            Official(
                "vg/annotations/vg_qa.json",
                "genome_questions",
                ("question_answers.json", "image_data.json"),
            ),
        ),
        archives=GENOME,
        remote={**remote(f"{LAVIS}visual_genome/", "vg_qa.json"), **GENOME_REMOTE},
    ),
    "ok_vqa": Row(
        kind="vqa",
        splits={
            "train": "okvqa/annotations/okvqa_train.json",
            "test": "okvqa/annotations/vqa_val_eval.json",
        },
        images="coco/images",
        about="OK-VQA: questions that need knowledge, about pictures of COCO; five people's answers, doubled",
        pictures="COCO's train2014.zip and val2014.zip, unpacked into folders of these names",
        annotations="okvqa_train.json, vqa_val_eval.json (okvqa_val_eval.json) and answer_list.json"
        " (okvqa_answer_list_train.json) as LAVIS distributes them (the last two not to be confused with"
        " VQAv2's), or OK-VQA's own OpenEnded_mscoco_{train2014,val2014}_questions.json and"
        " mscoco_train2014_annotations.json (which give a list of all answers of train); and its own"
        " mscoco_val2014_annotations.json",
        licence=f"questions and answers CC BY 4.0; {COCO_LICENCE}",
        sizes=sizes((9_009, 8_998), (5_046, 5_033), splits=("train", "test")),
        answer_list="okvqa/annotations/answer_list.json",
        official={"test": "okvqa/annotations/mscoco_val2014_annotations.json"},
        takes=(
            Official(
                "okvqa/annotations/okvqa_train.json",
                "vqa",
                ("OpenEnded_mscoco_train2014_questions.json", "mscoco_train2014_annotations.json"),
                {"pictures": "train2014", "dataset": "okvqa"},
            ),
            Official("okvqa/annotations/vqa_val_eval.json", RENAMED, ("okvqa_val_eval.json",)),
            Official(
                "okvqa/annotations/vqa_val_eval.json",
                "vqa",
                ("OpenEnded_mscoco_val2014_questions.json",),
                {"pictures": "val2014", "dataset": "okvqa"},
            ),
            Official("okvqa/annotations/answer_list.json", RENAMED, ("okvqa_answer_list_train.json",)),
            Official(
                "okvqa/annotations/answer_list.json",
                "frequent_answers",
                ("mscoco_train2014_annotations.json",),
                {"least": "1"},
            ),
        ),
        archives=(
            *COCO_2014,
            *(
                Archive(f"{name}.json.zip", "downloads/okvqa", f"{name}.json")
                for split in ("train", "val")
                for name in (f"OpenEnded_mscoco_{split}2014_questions", f"mscoco_{split}2014_annotations")
            ),
        ),
        remote={
            **remote(
                f"{LAVIS}okvqa/",
                "okvqa_train.json",
                "okvqa_val_eval.json",
                "okvqa_answer_list_train.json",
                "mscoco_val2014_annotations.json",
            ),
            **_COCO_ZIPS,
        },
    ),
    "aok_vqa": Row(
        kind="vqa",
        splits={split: f"aokvqa/annotations/aokvqa_v1p0_{split}.json" for split in ALL},
        images="coco/images",
        about="A-OKVQA: questions that need knowledge, four choices and ten direct answers each (test"
        " without)",
        pictures="COCO's train2014.zip, val2014.zip and test2015.zip, or train2017.zip, val2017.zip and"
        " test2017.zip, unpacked into folders of these names",
        annotations="aokvqa_v1p0_train.json, _val.json, _test.json as LAVIS or A-OKVQA's authors distribute"
        " them, and specialized_vocab_train_lavis.json (LAVIS: specialized_vocab_train.json; the authors:"
        " specialized_vocab_train.csv)",
        licence=f"questions and answers Apache 2.0; {COCO_LICENCE}",
        sizes=sizes(17_056, 1_145, 6_702),
        answer_list="aokvqa/annotations/specialized_vocab_train_lavis.json",
        templates="choice",
        takes=(
            *(
                Official(
                    f"aokvqa/annotations/aokvqa_v1p0_{split}.json",
                    "aokvqa",
                    (f"aokvqa_v1p0_{split}.json",),
                    {"split": split},
                )
                for split in ALL
            ),
            *(
                Official("aokvqa/annotations/specialized_vocab_train_lavis.json", form, (file,))
                for form, file in (
                    (RENAMED, "specialized_vocab_train.json"),
                    ("vocabulary", "specialized_vocab_train.csv"),
                )
            ),
        ),
        archives=(
            *COCO_2014,
            *map(coco, ("test2015", "train2017", "val2017", "test2017")),
            Archive("aokvqa_v1p0.tar.gz", "downloads/aokvqa", ""),
        ),
        remote={
            **remote(f"{LAVIS}aokvqa/", *(f"aokvqa_v1p0_{split}.json" for split in ALL)),
            **remote(f"{LAVIS}aokvqa/", "specialized_vocab_train.json"),
            **_COCO_ZIPS,
            **remote(COCO, "test2015.zip"),
        },
    ),
    "gqa": Row(
        kind="vqa",
        splits={
            "train": "gqa/annotations/train_balanced_questions.json",
            "val": "gqa/annotations/val_balanced_questions.json",
            "test": "gqa/annotations/testdev_balanced_questions.json",
        },
        images="gqa/images",
        about="GQA: balanced questions on Visual Genome's pictures, one answer each; test is testdev",
        pictures="GQA's images.zip",
        annotations="train_balanced_questions.json, val_balanced_questions.json and"
        " testdev_balanced_questions.json as LAVIS or as GQA's authors (questions1.2.zip) distribute them",
        licence=GENOME_LICENCE,
        sizes=sizes((943_000, 72_140), (132_062, 10_234), (12_578, 398)),
        takes=tuple(
            Official(f"gqa/annotations/{name}.json", "gqa", (f"{name}.json",))
            for name in (
                *(f"{split}_balanced_questions" for split in ("train", "val", "testdev", "test")),
                "train_all_questions_0",
                "val_all_questions",
            )
        ),
        archives=(
            Archive("images.zip", "gqa", "images/"),
            Archive("questions1.2.zip", "downloads/gqa", ""),
        ),
        remote={
            **remote(f"{LAVIS}gqa/", *(f"{n}_balanced_questions.json" for n in ("train", "val", "testdev"))),
            **remote("https://downloads.cs.stanford.edu/nlp/data/gqa/", "images.zip"),
        },
    ),
    "text_vqa": Row(
        kind="vqa",
        about="TextVQA: questions that take reading, ten answers each (test without)",
        sizes=sizes((34_602, 21_953), (5_000, 3_166), (5_734, 3_289)),
        templates="ocr_vqa",
        **words_read("textvqa", "TextVQA_0.5.1_{}.json", ""),
    ),
    "ocr_vqa": Row(
        kind="vqa",
        splits=dict.fromkeys(ALL, "ocrvqa/annotations/ocrvqa.json"),
        within={"train": "1", "val": "2", "test": "3"},
        images="ocrvqa/images",
        columns={"image": "sample_id"},
        suffix=".jpg",
        about="OCR-VQA: about a million questions on 207,572 book covers, one answer each",
        pictures="the book covers as KEY.jpg, where KEY is their name in ocrvqa.json",
        annotations="ocrvqa.json as LAVIS distributes it, or OCR-VQA's own dataset.json; ocr_tokens in its"
        " records are shown where there are any",
        licence="research only; covers under the terms of their publishers",
        templates="ocr_vqa",
        takes=(Official("ocrvqa/annotations/ocrvqa.json", RENAMED, ("dataset.json",)),),
        remote=remote(f"{INSTRUCTED}ocrvqa/", "ocrvqa.json"),
    ),
    "iconqa": Row(
        kind="vqa",
        splits={split: f"iconqa/annotations/{split}.json" for split in ALL},
        images="iconqa/images",
        columns={"correct_choice": "answer"},
        about="IconQA, text choices: questions about icon pictures with choices",
        pictures="IconQA's pictures, under the paths that the annotations name, such as iconqa_data.zip",
        annotations="annotations_train.json, _val.json and _test.json of LAVIS; or IconQA's own"
        " problems.json and pid_splits.json",
        licence="CC BY-NC-SA 4.0",
        sizes=sizes(18_946, 6_316, 6_316),
        templates="choice",
        takes=(
            *(Official(f"iconqa/annotations/{s}.json", RENAMED, (f"annotations_{s}.json",)) for s in ALL),
            *(
                Official(
                    f"iconqa/annotations/{split}.json",
                    "problems",
                    ("problems.json", "pid_splits.json"),
                    {
                        "split": f"choose_txt_{split}",
                        "place": f"iconqa_data/iconqa/{split}/choose_txt/{{}}/image.png",
                    },
                )
                for split in ALL
            ),
        ),
        archives=(Archive("iconqa_data.zip", "iconqa/images", "iconqa_data/"),),
        remote=remote(f"{INSTRUCTED}iconqa/", *(f"annotations_{split}.json" for split in ALL)),
    ),
    "scienceqa": Row(
        kind="vqa",
        splits={split: f"scienceqa/annotations/problems_{split}.json" for split in ALL},
        images="scienceqa/images",
        columns={"correct_choice": "answer", "context": "hint"},
        about="ScienceQA: questions of school science with choices; those without a picture are left out",
        pictures="ScienceQA's pictures, under the paths that the annotations name, such as train/1/image.png",
        annotations="problems_train.json, problems_val.json and problems_test.json as LAVIS distributes"
        " them; or ScienceQA's own problems.json and pid_splits.json",
        licence="CC BY-NC-SA 4.0",
        sizes=sizes(6_218, 2_097, 2_017),
        templates="choice",
        takes=tuple(
            Official(
                f"scienceqa/annotations/problems_{split}.json",
                "problems",
                ("problems.json", "pid_splits.json"),
                {"split": split, "place": f"{split}/{{}}/image.png"},
            )
            for split in ALL
        ),
        archives=tuple(Archive(f"{split}.zip", "scienceqa/images", rf"{split}/\d+/") for split in ALL),
        remote=remote(f"{INSTRUCTED}scienceqa/", *(f"problems_{split}.json" for split in ALL)),
    ),
    "vizwiz_vqa": Row(
        kind="vqa",
        splits={split: f"vizwiz/annotations/{split}.json" for split in ("val", "test")},
        images="vizwiz/images",
        about="VizWiz: questions of blind people, ten answers each (test without)",
        pictures="VizWiz's val.zip and test.zip, unpacked into folders of these names",
        annotations="val.json and test.json as VizWiz distributes them (Annotations.zip)",
        licence="CC BY 4.0",
        sizes=sizes((4_319, 4_319), (8_000, 8_000), splits=("val", "test")),
        archives=(
            *(Archive(f"{split}.zip", "vizwiz/images", f"{split}/VizWiz_") for split in ("val", "test")),
            Archive("Annotations.zip", "downloads/vizwiz", ""),
        ),
        remote={
            **remote(f"{_VIZWIZ}images/", "val.zip", "test.zip"),
            **remote(f"{INSTRUCTED}vizwiz/", "val.json", "test.json"),
        },
    ),
    "visdial": Row(
        kind="vqa",
        splits={"val": "visdial/annotations/visdial_1.0_val.json"},
        images="visdial/images",
        about="VisDial 1.0: dialogs of ten questions, 100 candidate answers each",
        pictures="VisDial's VisualDialog_val2018.zip, unpacked into a folder of this name",
        annotations="visdial_1.0_val.json as VisDial distributes it; for NDCG also its"
        " visdial_1.0_val_dense_annotations.json beside it",
        licence=f"dialogs CC BY 4.0; {COCO_LICENCE}",
        sizes={"val": Size(20_640, 2_064)},
        templates="dialog",
        archives=(
            Archive("VisualDialog_val2018.zip", "visdial/images", "VisualDialog_val2018/"),
            Archive("visdial_1.0_val.zip", "downloads/visdial", "visdial_1.0_val"),
        ),
    ),
    "msrvtt_qa": video_qa(
        "MSRVTT", "mp4", sizes((158_581, 6_513), (12_278, 497), (72_821, 2_990)), VIDEO_LICENCE
    ),
    "msvd_qa": video_qa("MSVD", "avi", sizes((30_933, 1_200), (6_415, 250), (13_157, 520)), VIDEO_LICENCE),
    "ivqa": replace(
        video_qa("iVQA", "mp4", sizes((5_994, 5_994), (2_000, 2_000), (2_000, 2_000)), VIDEO_LICENCE),
        about="iVQA: questions about video clips, five answers each",
        annotations="iVQA's own train.csv, val.csv and test.csv; or qa_train.json, _val.json, _test.json:"
        " lists of {video, question, question_id, answer: [five texts]}, and qa_ans2label.json: the answers"
        " of training",
        takes=(
            *(
                Official(f"ivqa/annotations/qa_{split}.json", "ivqa", (f"{split}.csv",), {"ending": "mp4"})
                for split in ALL
            ),
            Official("ivqa/annotations/qa_ans2label.json", "ivqa_answers", ("train.csv",)),
        ),
        archives=(),
        remote={},
    ),
}
