"""Rows of pictures with captions: COCO, Flickr30k, NoCaps, Visual Genome, and those of the web."""

from __future__ import annotations

from dataclasses import replace

from blip.data.catalog.rows import (
    ALL,
    BLIP,
    COCO,
    COCO_LICENCE,
    FLICKR_LICENCE,
    INSTRUCTED,
    LAVIS,
    WEB_LICENCE,
    Archive,
    Official,
    Row,
    Size,
    UrlList,
    clips,
    coco,
    lists,
    remote,
    sizes,
    web,
    words_read,
)

COCO_2014 = (coco("train2014"), coco("val2014"))
GENOME = (
    Archive("images.zip", "vg/images", "VG_100K/"),
    Archive("images2.zip", "vg/images", "VG_100K_2/"),
    *(
        Archive(f"{name}.json.zip", "downloads/vg", f"{name}.json")
        for name in ("image_data", "region_descriptions", "question_answers")
    ),
)
GENOME_REMOTE = remote("https://cs.stanford.edu/people/rak248/VG_100K_2/", "images.zip", "images2.zip")
FLICKR_PICTURES = (
    Archive("flickr30k-images.tar|flickr30k-images.tar.gz", "flickr30k/images", "flickr30k-images/"),
)
GENOME_LICENCE = "CC BY 4.0; pictures under the terms of their Flickr owners"
VIDEO_LICENCE = "research only; clips under the terms of their YouTube owners"

_COCO = Row(
    kind="caption",
    splits={split: f"coco/annotations/coco_karpathy_{split}.json" for split in ALL},
    images="coco/images",
    about="COCO 2014, Karpathy split: five captions of each picture",
    pictures="COCO's train2014.zip, val2014.zip and test2014.zip, unpacked into folders of these names",
    annotations="coco_karpathy_train.json, _val.json, _test.json as BLIP and LAVIS distribute them; or"
    " Karpathy's own dataset_coco.json",
    licence=COCO_LICENCE,
    sizes=sizes((566_747, 113_287), (25_010, 5_000), (25_010, 5_000)),
    takes=(
        *(
            Official(
                f"coco/annotations/coco_karpathy_{split}.json",
                "karpathy",
                ("dataset_coco.json",),
                {"split": split, "prefix": "coco_"},
            )
            for split in ALL
        ),
        *(
            Official(
                f"coco/annotations/coco_karpathy_{split}_gt.json",
                "coco_truth",
                ("dataset_coco.json",),
                {"split": split},
            )
            for split in ("val", "test")
        ),
    ),
    archives=(
        *COCO_2014,
        coco("test2014"),
        Archive("caption_datasets.zip", "downloads/coco", "dataset_"),
    ),
    remote={
        **remote(BLIP, *(f"coco_karpathy_{split}.json" for split in ALL)),
        **remote(COCO, "train2014.zip", "val2014.zip"),
    },
)
_FLICKR = Row(
    kind="retrieval",
    splits={split: f"flickr30k/annotations/{split}.json" for split in ALL},
    images="flickr30k/images",
    about="Flickr30k: five captions of each picture",
    pictures="Flickr30k's pictures in the folder flickr30k-images (to be requested from its authors)",
    annotations="flickr30k_train.json, _val.json, _test.json as BLIP and LAVIS distribute them; or Karpathy's"
    " own dataset_flickr30k.json",
    licence=FLICKR_LICENCE,
    sizes=sizes((145_000, 29_000), (5_070, 1_014), (5_000, 1_000)),
    takes=tuple(
        Official(
            f"flickr30k/annotations/{split}.json",
            "karpathy",
            ("dataset_flickr30k.json",),
            {"split": split, "prefix": "flickr_", "folder": "flickr30k-images"},
        )
        for split in ALL
    ),
    archives=(*FLICKR_PICTURES, Archive("caption_datasets.zip", "downloads/flickr30k", "dataset_")),
    remote=remote(BLIP, *(f"flickr30k_{split}.json" for split in ALL)),
)
_LAION = Row(
    kind="caption",
    splits={"train": "laion400M/*.tar"},
    format="shards",
    about="LAION-400M as shards; BLIP-2 uses 115 million of its pictures with CapFilt captions",
    pictures="shards of key.jpg and key.json with a caption, as img2dataset or 'blip data shards' makes"
    " them of LAION's lists of addresses",
    licence=WEB_LICENCE,
    sizes={"train": Size(400_000_000)},
)

CAPTIONS: dict[str, Row] = {
    "coco_caption": _COCO,
    "coco_retrieval": replace(_COCO, kind="retrieval"),
    "flickr30k": _FLICKR,
    "flickr30k_caption": replace(_FLICKR, kind="caption"),
    "vg_caption": Row(
        kind="caption",
        splits={"train": "vg/annotations/vg_caption.json"},
        images="vg/images",
        about="Visual Genome: captions of regions of pictures",
        pictures="Visual Genome's images.zip and images2.zip, unpacked into VG_100K and VG_100K_2",
        annotations="vg_caption.json as BLIP and LAVIS distribute it (its absolute paths are made"
        " relative); or Visual Genome's own region_descriptions.json and image_data.json, which have all"
        " 5.4 million regions",
        licence=GENOME_LICENCE,
        sizes={"train": Size(821_000, 100_000)},
        takes=(
            Official(
                "vg/annotations/vg_caption.json",
                "genome_regions",
                ("region_descriptions.json", "image_data.json"),
            ),
        ),
        archives=GENOME,
        remote={**remote(f"{LAVIS}visual_genome/", "vg_caption.json"), **GENOME_REMOTE},
    ),
    "nocaps": Row(
        kind="caption",
        splits={split: f"nocaps/annotations/nocaps_{split}.json" for split in ("val", "test")},
        images="nocaps/images",
        about="NoCaps: pictures of new objects; the ten captions of each in val have their own file",
        pictures="NoCaps's pictures of Open Images, in the folders val and test",
        annotations="nocaps_val.json and nocaps_test.json as BLIP and LAVIS distribute them, or NoCaps's own"
        " nocaps_test_image_info.json; and NoCaps's own nocaps_val_4500_captions.json",
        licence="captions CC BY 2.0; pictures of Open Images CC BY 2.0",
        sizes=sizes((45_000, 4_500), (0, 10_600), splits=("val", "test")),
        official={"val": "nocaps/annotations/nocaps_val_4500_captions.json"},
        uncaptioned=("val", "test"),
        takes=(
            Official(
                "nocaps/annotations/nocaps_val.json",
                "coco_pictures",
                ("nocaps_val_4500_captions.json",),
                {"folder": "val"},
            ),
            Official(
                "nocaps/annotations/nocaps_test.json",
                "coco_pictures",
                ("nocaps_test_image_info.json",),
                {"folder": "test"},
            ),
        ),
        remote={
            **remote(BLIP, "nocaps_val.json", "nocaps_test.json"),
            **remote(
                "https://nocaps.s3.amazonaws.com/",
                "nocaps_val_4500_captions.json",
                "nocaps_test_image_info.json",
            ),
        },
    ),
    "textcaps_caption": Row(
        kind="caption",
        about="TextCaps: captions that take reading, of pictures of OpenImages",
        sizes=sizes((109_765, 21_953), (15_830, 3_166), (0, 3_289)),
        uncaptioned=("test",),
        templates="ocr_caption",
        **words_read("TextCaps", "TextCaps_0.1_{}.json", "textcaps/"),
    ),
    "conceptual_caption_3m": web(
        "conceptual_caption",
        "cc3m",
        "images",
        "Conceptual Captions: web pictures, one text each",
        Size(3_318_333, 3_318_333),
        UrlList(
            ("Train_GCC-training.tsv|Train-GCC-training.tsv|cc3m.tsv",),
            "conceptual_caption/shards_3m",
            ("caption", "url"),
        ),
    ),
    "conceptual_caption_12m": web(
        "conceptual_caption",
        "cc12m",
        "images_12m",
        "Conceptual 12M: web pictures, one text each",
        Size(12_423_374, 12_423_374),
        UrlList(("cc12m.tsv",), "conceptual_caption/shards_12m", ("url", "caption")),
    ),
    "sbu_caption": web(
        "sbu_captions",
        "sbu",
        "images",
        "SBU Captions: Flickr pictures, one text each",
        Size(1_000_000, 1_000_000),
        UrlList(
            (
                "sbu-captions-all.json|SBU_captioned_photo_dataset_urls.txt",
                "sbu-captions-all.json|SBU_captioned_photo_dataset_captions.txt",
            ),
            "sbu_captions/shards",
        ),
        "research only; pictures under the terms of their Flickr owners",
    ),
    "laion400M": _LAION,
    "laion2B_multi": replace(
        _LAION,
        splits={"train": "laion2B_multi/*.tar"},
        about="LAION-2B in languages other than English, as shards",
        sizes={"train": Size(2_260_000_000)},
    ),
    "ccs_filtered": lists("ccs_filtered", "the web captions of CC3M, CC12M and SBU that pass the filter", 0),
    "ccs_synthetic_filtered": lists(
        "ccs_synthetic_filtered", "captions of a ViT-B captioner for CC3M, CC12M and SBU, filtered", 0
    ),
    "ccs_synthetic_filtered_large": lists(
        "ccs_synthetic_filtered_large", "captions of a ViT-L captioner for CC3M, CC12M and SBU, filtered", 0
    ),
    "laion_filtered": lists("laion_filtered", "the web captions of LAION-115M that pass the filter", 0),
    "laion_synthetic_filtered": lists(
        "laion_synthetic_filtered", "captions of a ViT-B captioner for LAION-115M, filtered", 0
    ),
    "laion_synthetic_filtered_large": lists(
        "laion_synthetic_filtered_large",
        "captions of a ViT-L captioner for LAION-115M, filtered, the web part of BLIP-2's 129 million"
        " pictures",
        115_000_000,
    ),
    "capfilt14m": Row(
        kind="caption",
        splits={"train": "capfilt14m/annotations/annotation.json"},
        images="capfilt14m/images",
        about="CapFilt's bootstrapped captions of the 14-million set",
        pictures="the pictures of COCO, VG, CC3M, CC12M and SBU under the paths that annotation.json names",
        annotations="annotation.json as LAVIS distributes it (its absolute paths are made relative)",
        licence=WEB_LICENCE,
        sizes={"train": Size(13_873_136)},
        remote=remote(f"{INSTRUCTED}capfilt14m/", "annotation.json"),
    ),
    "msrvtt_retrieval": clips(
        "retrieval", "retrieval", "MSRVTT", "mp4", {"test": Size(1_000, 1_000)}, VIDEO_LICENCE
    ),
    "didemo_retrieval": clips(
        *("retrieval", "retrieval", "DiDeMo", "mp4"),
        sizes((0, 8_395), (0, 1_065), (0, 1_004)),
        VIDEO_LICENCE,
    ),
    "msrvtt_caption": clips(
        *("caption", "cap", "MSRVTT", "mp4"),
        sizes((140_200, 7_010), (9_940, 497), (59_800, 2_990)),
        VIDEO_LICENCE,
    ),
    "msvd_caption": clips(
        "caption", "cap", "MSVD", "avi", sizes((0, 1_200), (0, 100), (0, 670)), VIDEO_LICENCE
    ),
    "vatex_caption": clips(
        "caption", "cap", "VATEX", "mp4", sizes((0, 25_991), (0, 3_000), (0, 6_278)), VIDEO_LICENCE
    ),
}
# BLIP-2's name of its web pictures: the list of LAION's with the best captions.
CAPTIONS["laion115M"] = replace(
    CAPTIONS["laion_synthetic_filtered_large"], same_as="laion_synthetic_filtered_large"
)
