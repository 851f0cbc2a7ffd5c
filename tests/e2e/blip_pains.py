"""What users of BLIP report of the original code, LAVIS and transformers; tests show that it is not so here.

Pains are numbered as in a survey of issue threads that orders 22 of them by how many people they stop. BLIP,
LAVIS and HF with a number are threads of salesforce/BLIP, salesforce/LAVIS and huggingface/transformers.
"""

from __future__ import annotations

HERE = "e2e/test_blip_pains.py::"
RECIPES, RESUME = "e2e/test_blip_recipes.py::", "e2e/test_blip_resume.py::"
TRAIN, WRONG = "e2e/test_train.py::", "e2e/test_wrong_input.py::"
PRETRAIN, RETRIEVAL = "unit/models/test_blip_pretrain.py::", "unit/models/test_blip_retrieval.py::"
CAPTION, VQA = "unit/models/test_blip_caption.py::", "unit/models/test_blip_vqa.py::"
WRITTEN, DECODING = "unit/models/test_blip_generate.py::", "unit/layers/test_decoding.py::"
FEATURES, WEIGHTS = "unit/models/test_blip_features.py::", "unit/models/test_blip_weights.py::"
HF, STEPS = "parity/test_blip_hf.py::", "parity/test_decoding_hf.py::"
RANKS, LOADER = "unit/models/test_blip_ranks.py::", "unit/data/test_loader.py::"
ACCURACY, CAPTIONS = "parity/test_vqa_accuracy.py::", "parity/test_caption_metrics.py::"

CONCERNS: dict[int, str] = {
    1: "LAVIS#691 LAVIS#752",
    2: "BLIP#37 BLIP#110 LAVIS#33",
    4: "LAVIS#101 LAVIS#774",
    5: "BLIP#51 BLIP#152 BLIP#200 BLIP#222 LAVIS#282",
    6: "BLIP#58 BLIP#165 BLIP#173 LAVIS#99 LAVIS#142 LAVIS#228 LAVIS#241 LAVIS#314 LAVIS#424 LAVIS#645"
    " LAVIS#707",
    7: "BLIP#90 LAVIS#97",
    8: "BLIP#43 BLIP#194 LAVIS#353",
    9: "LAVIS#153",
    10: "BLIP#27 LAVIS#24",
    11: "BLIP#149 LAVIS#106 LAVIS#418 HF#38858 HF#48583",
    12: "LAVIS#345",
    13: "BLIP#140 LAVIS#247",
    14: "LAVIS#267",
    16: "",
    17: "BLIP#101 LAVIS#72 LAVIS#225 LAVIS#463",
    18: "LAVIS#421",
    19: "LAVIS#32",
    20: "LAVIS#266 LAVIS#323",
    21: "BLIP#195",
    22: "",
}
"""Number of a pain -> threads about it, all that name BLIP itself among them."""

ELSEWHERE: dict[int, str] = {
    3: "instruction tuning and question answering are asked for of BLIP-2",
    15: "CapFilt (BLIP#10, BLIP#86, BLIP#94, BLIP#226) is a command that uses BLIP's models",
}
"""Number of a pain that is not one of BLIP's models -> why."""

SHOWN: dict[str, list[str]] = {
    "1: it asks for one version of transformers, and importing it for everything (LAVIS#691 LAVIS#752)": [
        "e2e/test_wheel.py::test_wheel_states_version_licence_and_lower_bounds_only",
        "test_floors.py::test_import_blip_loads_nothing_heavy_and_opens_no_socket",
        "test_floors.py::test_every_module_imports_without_the_optional_packages",
    ],
    "2: own pictures need a dataset class, a builder and a registration (BLIP#37 BLIP#110 LAVIS#33)": [
        HERE + "test_own_pictures_with_captions_train_and_are_scored_without_code",
        HERE + "test_own_questions_train_and_are_scored_without_code",
        "unit/data/test_sources.py::test_own_data_needs_no_code",
        "unit/data/test_data_command.py::test_own_columns_folders_and_tokenizers_are_understood",
    ],
    "4: own weights cannot be named, and what was not loaded is not told (LAVIS#101 LAVIS#774)": [
        RECIPES + "test_a_downstream_model_starts_from_pre_training_and_is_scored",
        RECIPES + "test_the_same_scores_come_from_evaluating_the_run",
        WEIGHTS + "test_question_answering_starts_from_both_views_of_pre_training",
        WEIGHTS + "test_what_has_no_counterpart_stays_and_is_refused_when_loaded",
        "unit/formats/test_load.py::test_what_starts_anew_is_told",
        "e2e/test_blip_starts.py::test_a_recipe_names_published_weights_and_another_start_wins",
    ],
    "5: ITM stays at 0.63, which is chance, and nothing says so (BLIP#152 BLIP#200 LAVIS#282)": [
        "unit/engine/test_display.py::test_the_chance_level_of_itm_is_the_entropy_of_one_in_three",
        "unit/engine/test_display.py::test_an_objective_at_chance_is_told_once_with_advice",
        HERE + "test_losses_of_pre_training_fall_below_chance",
    ],
    "5: one loss is logged, and nobody knows what it is made of (BLIP#51 BLIP#222)": [
        PRETRAIN + "test_a_step_gives_its_losses_and_figures",
        "parity/test_blip_pretrain_golden.py::test_losses_are_lavis_s",
        "parity/test_blip_pretrain_golden.py::test_gradients_are_lavis_s",
        "e2e/test_train.py::test_the_report_is_one_page_that_needs_nothing_else",
    ],
    "6: beams are expanded twice, so that beam search ends with unequal sizes"
    " (BLIP#165 BLIP#173 LAVIS#142 LAVIS#241)": [
        STEPS + "test_ids_and_scores_are_those_of_transformers",
        HF + "test_generated_captions_are_those_of_transformers",
        HF + "test_generated_answers_are_those_of_transformers",
        "unit/layers/test_cache.py::test_beams_look_at_what_they_would_look_at_with_keys_of_their_own",
        DECODING + "test_beam_search_is_the_plain_one_of_each_item",
    ],
    "6: all pictures of a batch get one prompt; batches change what is written (BLIP#58 LAVIS#228)": [
        WRITTEN + "test_captions_do_not_depend_on_the_batch",
        WRITTEN + "test_a_prompt_is_the_models_the_samples_or_the_pictures",
        WRITTEN + "test_sampled_captions_belong_to_seed_and_number",
        WRITTEN + "test_answers_do_not_depend_on_other_questions",
        STEPS + "test_prompts_of_different_length_are_those_of_transformers_padded_left",
        DECODING + "test_a_text_depends_neither_on_its_batch_nor_on_padding",
    ],
    "6: pairs are matched one at a time (LAVIS#424)": [
        FEATURES + "test_texts_of_different_lengths_are_judged_as_each_alone",
        HERE + "test_one_text_is_matched_with_several_pictures_at_once",
    ],
    "6: lengths count what was there before, to the point of being negative (LAVIS#707)": [
        STEPS + "test_lengths_that_count_the_prompt_are_those_of_transformers",
        DECODING + "test_a_prompt_that_fills_the_length_is_refused",
    ],
    "6: the prompt is learned with the caption": [
        CAPTION + "test_the_four_tokens_of_the_prompt_are_not_learned",
        CAPTION + "test_a_caption_without_the_prompt_is_refused_by_name",
    ],
    "6: accuracy of answers is not that of the benchmark (LAVIS#99)": [
        ACCURACY + "test_values_are_those_of_the_official_code",
        VQA + "test_ranking_is_that_of_plain_loops",
        VQA + "test_presets_are_lavis_recipes",
        "e2e/test_lavis_recipes.py::test_our_recipe_of_the_same_name_is_lavis_s",
    ],
    "6: recall is not that of the paper (LAVIS#314 LAVIS#645)": [
        RETRIEVAL + "test_the_passes_of_an_evaluation_are_those_of_plain_loops",
        "unit/metrics/test_retrieval.py::test_recalls_are_those_of_a_naive_loop",
        RESUME + "test_both_tasks_score_by_similarity_and_by_matching",
    ],
    "7: an evaluation of retrieval fills the memory, host's or device's (BLIP#90)": [
        "unit/tasks/test_retrieval.py::test_what_is_kept_of_pictures_is_what_the_task_says",
        "unit/tasks/test_retrieval.py::test_nothing_is_kept_of_pictures_that_are_not_re_ranked",
    ],
    "7: training needs more memory than there is (LAVIS#97)": [
        "unit/engine/test_recompute.py::test_torch_mode_keeps_fewer_activations",
        "unit/models/test_blip_frozen.py::test_a_frozen_tower_has_no_gradient_and_the_rest_has",
        "unit/models/test_blip_frozen.py::test_features_of_a_tower_in_half_precision",
    ],
    "8: one process fails without a process group (BLIP#43 BLIP#194 LAVIS#353)": [
        PRETRAIN + "test_lavis_samples_train_in_one_process_without_a_group",
        "unit/test_dist.py::test_everything_works_without_a_process_group",
        RECIPES + "test_a_downstream_model_starts_from_pre_training_and_is_scored",
    ],
    "8: a batch of one loses its dimension": [
        HERE + "test_a_batch_of_one_trains_and_is_answered",
        RETRIEVAL + "test_a_batch_of_one_keeps_its_dimensions",
        RETRIEVAL + "test_a_batch_of_one_picture_has_pairs_only",
        "parity/test_blip_pretrain_reference.py::test_a_batch_of_one_is_that_of_plain_loops",
    ],
    "9: a resumed run is another one; twin and queue are lost (LAVIS#153)": [
        RESUME + "test_a_run_that_was_stopped_and_killed_is_the_uninterrupted_one",
        RESUME + "test_twin_and_queue_of_a_checkpoint_are_of_this_run",
        RESUME + "test_a_checkpoint_without_the_twin_is_not_continued",
        PRETRAIN + "test_saved_and_loaded_training_goes_on_bit_by_bit",
    ],
    "10: annotations name paths of somebody else, and one missing picture ends a run (BLIP#27 LAVIS#24)": [
        "unit/data/test_data_command.py::test_prepare_makes_foreign_paths_relative",
        "unit/data/test_data_command.py::test_prepare_says_which_pictures_are_absent",
        TRAIN + "test_bad_pictures_are_skipped_counted_and_listed",
        "unit/data/test_sources.py::test_everything_missing_is_named_at_once",
    ],
    "11: weights of Hugging Face compute something else: 8 heads in place of 12, another epsilon"
    " (BLIP#149 LAVIS#106 LAVIS#418)": [
        HF + "test_a_configuration_that_leaves_a_wrong_default_in_force_is_refused",
        HF + "test_eight_heads_of_base_width_are_warned_of",
        HF + "test_values_read_from_a_folder_are_explicit",
        HF + "test_matching_logits_are_those_of_transformers",
        HF + "test_the_caption_loss_and_its_gradients_are_those_of_transformers",
        HF + "test_loss_gradients_and_logits_of_answers_are_those_of_transformers",
    ],
    "11: a version of transformers writes captions of one word (HF#38858)": [
        HF + "test_generated_captions_are_those_of_transformers",
        WRITTEN + "test_greedy_captions_are_those_of_whole_passes",
    ],
    "11: converting loses heads, the temperature, or one of two views (HF#48583)": [
        HF + "test_what_transformers_gets_of_a_model_is_that_model",
        "unit/formats/test_lavis_blip.py::test_every_weight_goes_over_and_back",
        "parity/test_blip_pretrain_golden.py::test_every_key_goes_over_and_back",
    ],
    "12: several processes hang, or train on something else than one (LAVIS#345)": [
        RANKS + "test_ranks_end_with_the_same_weights_twin_and_queue",
        RANKS + "test_two_processes_that_share_candidates_compute_what_one_does",
        RANKS + "test_two_processes_compute_what_plain_loops_over_both_ranks_do",
        RESUME + "test_two_processes_that_share_candidates_take_the_steps_of_one",
        "e2e/test_lavis_defects.py::test_a_lost_process_ends_the_others",
    ],
    "13: reading is slow and its memory grows (BLIP#140 LAVIS#247)": [
        "unit/data/test_records.py::test_workers_share_the_records_they_read",
        LOADER + "test_waiting_for_data_is_measured",
        PRETRAIN + "test_a_step_reads_nothing_back_from_the_device",
        PRETRAIN + "test_a_step_has_one_pass_for_all_pairs_and_computes_keys_once",
    ],
    "14: half precision gives NaN (LAVIS#267)": [
        PRETRAIN + "test_half_precision_leaves_queue_temperature_and_losses_in_float32",
        RESUME + "test_a_skipped_step_changes_neither_twin_nor_queue",
        TRAIN + "test_too_many_non_finite_steps_in_a_row_end_a_run_and_name_samples",
    ],
    "16: scores of captions need Java, and one that fails takes all with it": [
        CAPTIONS + "test_scores_are_pycocoevalcaps_with_java_and_without",
        "unit/metrics/test_caption.py::test_without_java_all_but_meteor_and_spice_is_there",
        "unit/metrics/test_caption.py::test_a_java_program_that_fails_is_left_out_with_a_warning",
        "unit/tasks/test_captioning.py::test_what_cannot_be_computed_is_said_before_training",
        HERE + "test_captions_are_written_before_they_are_scored",
    ],
    "17: the queue has to be a multiple of the batch, so the last one fails (BLIP#101)": [
        "unit/layers/test_momentum.py::test_the_queue_holds_the_newest_pairs_whatever_the_batches",
        PRETRAIN + "test_any_batch_goes_with_any_queue",
        RESUME + "test_a_last_batch_of_one_and_batches_larger_than_the_queue_train",
    ],
    "17: warm-up jumps, and losses of several micro-batches are others (LAVIS#72 LAVIS#225 LAVIS#463)": [
        "unit/engine/test_optim.py::test_warm_up_goes_on_across_epochs_without_a_jump",
        CAPTION + "test_parts_of_a_batch_add_up_to_its_loss",
        VQA + "test_rows_of_a_step_add_up_to_its_loss",
        PRETRAIN + "test_micro_batches_enter_the_queue_in_order_and_the_twin_moves_once",
        "e2e/test_lavis_defects.py::test_the_logged_loss_is_the_sum_of_its_parts_whatever_the_accumulation",
    ],
    "18: a key with a slip of the pen trains with the default (LAVIS#421)": [
        WRONG + "test_a_wrong_value_is_named_with_its_key_and_what_is_right",
        PRETRAIN + "test_values_that_cannot_be_used_are_named",
        RECIPES + "test_a_score_that_there_is_not_is_refused_before_training",
    ],
    "19: building a model fetches weights and vocabularies (LAVIS#32)": [
        "unit/test_zoo.py::test_random_weights_read_no_file_of_the_preset_but_those_that_are_asked_for",
        "unit/models/test_vocabulary.py::test_a_tokenizer_may_lie_below_the_data_root_of_a_run",
        "unit/formats/test_source.py::test_published_weights_are_found_in_torch_s_cache",
    ],
    "20: tower, text transformer and language cannot be exchanged (LAVIS#266 LAVIS#323)": [
        HERE + "test_any_timm_tower_will_do",
        HERE + "test_another_language_is_learned_and_written",
        PRETRAIN + "test_encoder_decoder_and_twin_start_from_bert",
        "unit/models/test_vocabulary.py::test_texts_begin_with_the_tokenizer_s_tokens",
    ],
    "21: other captions of the same picture count as its negatives in fine-tuning (BLIP#195)": [
        "parity/test_blip_pretrain_reference.py::test_retrieval_is_that_of_plain_loops",
        RESUME + "test_picture_numbers_of_retrieval_are_kept_and_those_of_pre_training_are_none",
        "unit/test_losses.py::test_a_positive_is_never_drawn",
    ],
    "22: there are no curves": [
        "unit/engine/test_tracker.py::test_tensorboard_gets_every_number",
        TRAIN + "test_the_report_is_one_page_that_needs_nothing_else",
    ],
}
